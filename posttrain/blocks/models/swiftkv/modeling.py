"""SwiftKV networks (Qiao et al., arXiv:2410.03960): upper layers take their keys and values from one lower layer.

Teacher and student are one network. Below layer k both are the same. From there on the student computes queries with
weights of its own, and keys and values of every group of layers from the normalized input of layer k; attention
outputs, MLPs and norms are the teacher's. So a prompt passes the upper layers with its last row alone: keys and values
of all its rows are known before.

The classes follow transformers' own: `LlamaSwiftKVForCausalLM` and its relatives subclass the family's models, are
registered with the auto classes when this module is imported, and have Snowflake's tensor names.
"""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from posttrain.blocks.models.documents.attention import CACHE
from posttrain.blocks.models.swiftkv.config import FAMILIES, SUFFIX


@attrs.frozen
class Lower:
    """What the layers below k leave to those above."""

    hidden: Tensor
    """[rows, width, size], the input of layer k."""
    mask: Any
    position_ids: Tensor
    positions: tuple[Tensor, Tensor]
    """Cosines and sines of the rotary embedding."""
    cache: Any

    def last(self) -> "Lower":
        """Return the same for the last row of each sequence alone."""
        mask = self.mask[:, :, -1:] if isinstance(self.mask, Tensor) and self.mask.ndim == 4 else self.mask
        cos, sin = (x[:, -1:] for x in self.positions)
        return Lower(self.hidden[:, -1:], mask, self.position_ids[:, -1:], (cos, sin), self.cache)


@attrs.define(eq=False)
class Group:
    """What layers share their keys and values from. The first of them makes these, inside its own forward pass, where
    FSDP has gathered its weights."""

    hidden: Tensor
    """[rows, width, size], the normalized input of layer k."""
    positions: tuple[Tensor, Tensor]
    cache: Any
    slot: int
    """Of the cache."""
    made: tuple[Tensor, Tensor] | None = None
    """Keys and values, [rows, heads, width, size] each."""


@functools.cache
def family(kind: str) -> tuple[type, type]:
    """Return the configuration and the causal language model of a family, registered with the auto classes.

    Args:
        kind: `model_type` of the base model, one of FAMILIES.
    """
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    prefix = FAMILIES[kind]
    config = configuration(getattr(modeling, f"{prefix}Config"), kind)
    attention = attention_of(getattr(modeling, f"{prefix}Attention"))
    backbone = backbone_of(getattr(modeling, f"{prefix}Model"), attention, config)
    causal = causal_of(getattr(modeling, f"{prefix}ForCausalLM"), backbone, config)
    for made, name in ((config, "Config"), (attention, "Attention"), (backbone, "Model"), (causal, "ForCausalLM")):
        made.__name__ = made.__qualname__ = f"{prefix}SwiftKV{name}"
        globals()[made.__name__] = made  # where pickle looks for it
    AutoConfig.register(f"{kind}{SUFFIX}", config)
    AutoModelForCausalLM.register(config, causal)
    return config, causal


def configuration(base: Any, kind: str) -> type:
    """Return the family's configuration with the keys of SwiftKV."""

    @strict
    class Config(base):  # type: ignore[misc]
        model_type = f"{kind}{SUFFIX}"
        swiftkv: bool = True
        num_key_value_layers: int = 1
        key_value_group_size: int = 1

    return Config


def attention_of(base: Any) -> type:
    """Return the family's attention with the student's projections beside the teacher's."""

    class Attention(base):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.q_proj_swiftkv = like(self.q_proj)
            if leads(config, layer_idx):
                self.k_proj_swiftkv, self.v_proj_swiftkv = like(self.k_proj), like(self.v_proj)

        def keys_and_values(self, group: Group) -> tuple[Tensor, Tensor]:
            """Return those of this layer's group, [rows, heads, width, size] each."""
            if leads(self.config, self.layer_idx):
                heads = (*group.hidden.shape[:-1], -1, self.head_dim)
                key = normed(self, "k_norm", self.k_proj_swiftkv(group.hidden).view(heads)).transpose(1, 2)
                value = self.v_proj_swiftkv(group.hidden).view(heads).transpose(1, 2)
                key = apply_rotary_pos_emb(key, key, *group.positions)[1]
                group.made = (key, value) if group.cache is None else group.cache.update(key, value, group.slot)
            assert group.made is not None, "the first layer of the group comes first"
            return group.made

        def forward(
            self,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Any = None,
            group: Group | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Any]:
            """Attend as the student to the keys and values of a group, or without one as the teacher."""
            if group is None:
                return super().forward(  # type: ignore[no-any-return]
                    hidden_states=hidden_states, position_embeddings=position_embeddings,
                    attention_mask=attention_mask, **kwargs,
                )  # fmt: skip
            taken(kwargs)
            shape = hidden_states.shape[:-1]
            query = normed(self, "q_norm", self.q_proj_swiftkv(hidden_states).view(*shape, -1, self.head_dim))
            query = apply_rotary_pos_emb(query.transpose(1, 2), query.transpose(1, 2), *position_embeddings)[0]
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            kv = self.keys_and_values(group)
            out, weights = attend(self, query, *kv, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
            return self.o_proj(out.reshape(*shape, -1)), weights

    return Attention


def backbone_of(base: Any, attention: type, config_class: type) -> type:
    """Return the family's decoder with the student's path through it."""

    class Backbone(base):  # type: ignore[misc]
        config_class: Any

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for index in range(config.num_key_value_layers, config.num_hidden_layers):
                self.layers[index].self_attn = attention(config, index)
            self.norm_swiftkv = type(self.norm)(config.hidden_size, eps=config.rms_norm_eps)
            self.post_init()

        @merge_with_config_defaults  # type: ignore[untyped-decorator]
        @capture_outputs  # type: ignore[untyped-decorator]
        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            use_cache: bool | None = None,
            last_row: bool = False,
            **kwargs: Any,
        ) -> BaseModelOutputWithPast:
            """Return the last hidden states: of every row, or with `last_row` of each sequence's last alone."""
            cache = taken(kwargs)
            below = self.below(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, **kwargs)
            path = self.student(below, last_row, **kwargs) if self.config.swiftkv else self.teacher(below, **kwargs)
            *_, hidden = path
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: below.cache})

        def below(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            cache: Any = None,
            inputs_embeds: Tensor | None = None,
            use_cache: bool | None = None,
            **kwargs: Any,
        ) -> Lower:
            """Run the layers that teacher and student have in common."""
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if use_cache and cache is None:
                cache = DynamicCache()
            if position_ids is None:
                seen = cache.get_seq_length() if cache is not None else 0
                position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
            mask = create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, position_ids=position_ids,
                **{CACHE: cache},
            )  # fmt: skip
            positions = self.rotary_emb(hidden, position_ids=position_ids)
            state = Lower(hidden, mask, position_ids, positions, cache)
            for layer in self.layers[: self.config.num_key_value_layers]:
                state = attrs.evolve(state, hidden=run(layer, state, **{CACHE: state.cache}, **kwargs))
            return state

        def student(self, below: Lower, last_row: bool = False, **kwargs: Any) -> Iterator[Tensor]:
            """Yield the input of each upper layer of the student, and the output of the last."""
            shared, at = self.norm_swiftkv(below.hidden), below.last() if last_row else below
            first, size = self.config.num_key_value_layers, self.config.key_value_group_size
            for index, layer in enumerate(self.layers[first:], start=first):
                yield at.hidden
                if leads(self.config, index):
                    group = Group(shared, below.positions, below.cache, slot=first + (index - first) // size)
                at = attrs.evolve(at, hidden=run(layer, at, group=group, **kwargs))
            yield at.hidden

        def teacher(self, below: Lower, **kwargs: Any) -> Iterator[Tensor]:
            """Yield the input of each upper layer of the teacher, and the output of the last."""
            at = below
            for layer in self.layers[self.config.num_key_value_layers :]:
                yield at.hidden
                at = attrs.evolve(at, hidden=run(layer, at, **{CACHE: at.cache}, **kwargs))
            yield at.hidden

    Backbone.config_class = config_class
    return Backbone


def causal_of(base: Any, backbone: type, config_class: type) -> type:
    """Return the family's causal language model around such a decoder."""

    class CausalLM(base):  # type: ignore[misc]
        config_class: Any

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = backbone(config)
            self.post_init()

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            labels: Tensor | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            **kwargs: Any,
        ) -> Any:
            """As the family's own; when only the last logits are wanted, upper layers see only the last row."""
            wants_last = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
            last_row = wants_last and not torch.is_grad_enabled()
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                logits_to_keep=logits_to_keep, last_row=last_row, **kwargs,
            )  # fmt: skip

    CausalLM.config_class = config_class
    return CausalLM


def taken(arguments: dict[str, Any]) -> Any:
    """Take the cache out of arguments, under either name."""
    found = [arguments.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in found if cache is not None), None)


def run(layer: nn.Module, state: Lower, **kwargs: Any) -> Tensor:
    """Return the output of a decoder layer."""
    return layer(  # type: ignore[no-any-return]
        state.hidden, attention_mask=state.mask, position_ids=state.position_ids,
        position_embeddings=state.positions, **kwargs,
    )  # fmt: skip


def leads(config: Any, index: int) -> bool:
    """Whether a layer computes the keys and values of its group."""
    return bool((index - config.num_key_value_layers) % config.key_value_group_size == 0)


def like(layer: nn.Linear) -> nn.Linear:
    """Return a linear layer of the same shape."""
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)


def normed(attention: nn.Module, name: str, heads: Tensor) -> Tensor:
    """Apply a norm over each head, where the family has one (Qwen3)."""
    return attention.get_submodule(name)(heads) if name in dict(attention.named_children()) else heads


@torch.no_grad()
def start_from_teacher(hf: Any) -> None:
    """Give the student the teacher's weights: its queries, and the mean of its keys and values over each group."""
    layers, first = hf.model.layers, hf.config.num_key_value_layers
    hf.model.norm_swiftkv.load_state_dict(layers[first].input_layernorm.state_dict())
    for index in range(first, len(layers)):
        attention = layers[index].self_attn
        attention.q_proj_swiftkv.load_state_dict(attention.q_proj.state_dict())
        if leads(hf.config, index):
            group = [layer.self_attn for layer in layers[index : index + hf.config.key_value_group_size]]
            for name in ("k_proj", "v_proj"):
                states = [member.get_submodule(name).state_dict() for member in group]
                mean = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
                attention.get_submodule(f"{name}_swiftkv").load_state_dict(mean)


for _kind in FAMILIES:
    family(_kind)
