"""SwiftKV in vLLM: upper layers share keys and values, and a prompt passes them with its last row alone.

Keys and values of every group live in a store, an attention layer that is written but never computes; the layers of
the group read from it, as vLLM's KV sharing allows. With `kv_sharing_fast_prefill=True` vLLM tells which rows are
sampled from, and only those go through the upper layers. Runs with `enforce_eager=True`; tried with vLLM 0.32 on CPUs.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import _encode_layer_name
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
           "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
"""Names in the checkpoint -> the stacked parameter that holds them, and their part of it."""


class Heads:
    """How this rank's heads are cut."""

    def __init__(self, config: Any, vllm_config: VllmConfig) -> None:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if config.num_key_value_heads % ranks:
            raise ValueError(f"{config.num_key_value_heads} key-value heads cannot be shared by {ranks} ranks")
        self.size, self.queries = config.head_dim, config.num_attention_heads // ranks
        self.keys, self.scale = config.num_key_value_heads // ranks, config.head_dim**-0.5

    def attention(self, vllm_config: VllmConfig, prefix: str, shares: str | None = None) -> Attention:
        """Return an attention layer; with `shares`, one that reads the keys and values of another."""
        return Attention(
            self.queries, self.size, self.scale, num_kv_heads=self.keys, cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config, prefix=prefix, kv_sharing_target_layer_name=shares,
        )  # fmt: skip


class Store(nn.Module):
    """The keys and values of a group of layers."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.heads = Heads(config, vllm_config)
        sizes = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.k_proj_swiftkv = ColumnParallelLinear(
            *sizes, bias=config.attention_bias, prefix=f"{prefix}.k_proj_swiftkv"
        )
        self.v_proj_swiftkv = ColumnParallelLinear(
            *sizes, bias=config.attention_bias, prefix=f"{prefix}.v_proj_swiftkv"
        )
        self.attn = self.heads.attention(vllm_config, f"{prefix}.attn")

    def forward(self, positions: Tensor, shared: Tensor, rotary: nn.Module) -> None:
        """Write the keys and values of all rows."""
        (key, _), (value, _) = self.k_proj_swiftkv(shared), self.v_proj_swiftkv(shared)
        key, _ = rotary(positions, key, None)
        shape = (-1, self.heads.keys, self.heads.size)
        name = _encode_layer_name(self.attn.layer_name)
        torch.ops.vllm.unified_kv_cache_update(key.view(shape), value.view(shape), name)


class UpperLayer(nn.Module):
    """A decoder layer that computes queries only."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str, store: str) -> None:
        super().__init__()
        heads, size = Heads(config, vllm_config), config.hidden_size
        self.self_attn = nn.Module()
        width, inner = config.num_attention_heads * config.head_dim, f"{prefix}.self_attn"
        self.self_attn.q_proj_swiftkv = ColumnParallelLinear(
            size, width, bias=config.attention_bias, prefix=f"{inner}.q_proj_swiftkv"
        )
        self.self_attn.o_proj = RowParallelLinear(width, size, bias=config.attention_bias, prefix=f"{inner}.o_proj")
        self.self_attn.attn = heads.attention(vllm_config, f"{inner}.attn", shares=store)
        self.mlp = LlamaMLP(
            size, config.intermediate_size, config.hidden_act, quant_config=vllm_config.quant_config,
            bias=config.mlp_bias, prefix=f"{prefix}.mlp",
        )  # fmt: skip
        self.input_layernorm = RMSNorm(size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor, rotary: nn.Module) -> tuple[Tensor, Tensor]:
        """Return hidden states and residual, of the same rows."""
        hidden, residual = self.input_layernorm(hidden, residual)
        query, _ = self.self_attn.q_proj_swiftkv(hidden)
        query, _ = rotary(positions, query, None)
        hidden, _ = self.self_attn.o_proj(self.self_attn.attn(query, None, None))
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class SwiftKVModel(nn.Module):
    """The decoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, depth = config, config.num_hidden_layers
        self.first, self.group = config.num_key_value_layers, config.key_value_group_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        lower = [LlamaDecoderLayer(vllm_config, prefix=f"{prefix}.layers.{i}") for i in range(self.first)]
        # Stores come before their readers: vLLM wants to know them first.
        names = [f"{prefix}.stores.{depth + i}" for i in range((depth - self.first) // self.group)]
        self.stores = nn.ModuleList(Store(config, vllm_config, name) for name in names)
        upper = [
            UpperLayer(config, vllm_config, f"{prefix}.layers.{i}", f"{names[(i - self.first) // self.group]}.attn")
            for i in range(self.first, depth)
        ]
        self.layers = nn.ModuleList([*lower, *upper])
        self.norm_swiftkv = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.upper_rows = 0
        """How many rows have gone through the upper layers so far."""

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Return the last hidden states, [rows, size]; those that nothing is sampled from may be anything."""
        hidden, residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, None
        for layer in self.layers[: self.first]:
            hidden, residual = layer(positions, hidden, residual)
        whole = hidden + residual
        shared = self.norm_swiftkv(whole)
        for store in self.stores:
            store(positions, shared, self.rotary)
        rows = self.sampled_rows()
        out = whole if rows is None else whole[rows]
        at = positions if rows is None else positions[rows]
        self.upper_rows += len(out)
        hidden, residual = torch.zeros_like(out), out  # each layer begins by adding both
        for layer in self.layers[self.first :]:
            hidden, residual = layer(at, hidden, residual, self.rotary)
        hidden, _ = self.norm(hidden, residual)
        if rows is None:
            return hidden
        result = torch.zeros_like(whole)
        result[rows] = hidden
        return result

    def sampled_rows(self) -> Tensor | None:
        """Return the rows that are sampled from; None in profiling, and without fast prefill."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return None
        found = metadata[self.layers[-1].self_attn.attn.layer_name]
        if not isinstance(found, KVSharingFastPrefillMetadata) or found.logits_indices_padded is None:
            return None
        return found.logits_indices_padded


class SwiftKVForCausalLM(nn.Module):
    """What vLLM loads for `LlamaSwiftKVForCausalLM`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = SwiftKVModel(vllm_config=vllm_config, prefix=f"{prefix}.model".lstrip("."))
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return embeddings, [rows, size]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states, [rows, size]."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits, [rows, vocabulary]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; the teacher's projections of the upper layers are left out.

        Raises:
            ValueError: a tensor has no place, or a parameter gets none.
        """
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if (target := self.place(name)) is None:
                continue
            place, part = target
            if place not in parameters:
                raise ValueError(f"{name} has no place in a SwiftKV model")
            parameter = parameters[place]
            if part is None:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            else:
                parameter.weight_loader(parameter, tensor, part)
            loaded.add(place)
        if missing := set(parameters) - loaded:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        return loaded

    def place(self, name: str) -> tuple[str, Any] | None:
        """Return the parameter for a tensor of the checkpoint, and its part of it; None if it is not needed."""
        if "rotary_emb" in name or (name.startswith("lm_head") and self.config.tie_word_embeddings):
            return None
        pieces = name.split(".")
        if pieces[:2] != ["model", "layers"]:
            return name, None
        index, first = int(pieces[2]), self.model.first
        projection = pieces[-2]
        if index >= first and projection in ("q_proj", "k_proj", "v_proj"):
            return None  # the teacher's
        if projection in ("k_proj_swiftkv", "v_proj_swiftkv"):
            store = (index - first) // self.model.group
            return f"model.stores.{store}.{projection}.{pieces[-1]}", None
        if projection in STACKED:
            stacked, part = STACKED[projection]
            return ".".join([*pieces[:-2], stacked, pieces[-1]]), part
        return name, None
