"""The networks that trainers call: transformers models whose logits exist only at supervised positions."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from posttrain.blocks.losses.cross_entropy import nll_sum, token_log_probs, top_log_probs, top_of
from posttrain.blocks.models.activations import Offload
from posttrain.blocks.models.attention import NAME, packed
from posttrain.errors import TrainingError
from posttrain.interfaces import Batch

MAX_SHARD_SIZE = "5GB"
"""Of an exported file; writing one may take as much memory again."""


class PackedModel(nn.Module):
    """A transformers model over batches of packed documents.

    What a subclass computes lies inside one `forward`, so that DDP, FSDP and ZeRO see every use of every
    parameter. `hf` is the transformers model, possibly wrapped by peft: what is exported.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.offload = False
        """Whether what is kept for the backward pass waits in the memory of the host."""
        self.saved_as: str | None = None
        """In which type to export what is trained in float32; None for as it is."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the passes through the decoder."""
        with packed(), Offload() if self.offload else nullcontext():
            yield

    @property
    def base(self) -> Any:
        """The transformers model itself, with peft's layers in it but without its wrapper."""
        return without_adapters_wrapper(self.hf)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.base.get_input_embeddings().num_embeddings)

    def layout(self, batch: Batch) -> Batch:
        """Return the batch with the tokens that pairs begin with only once, where the attention can branch.

        Raises:
            TrainingError: the batch holds a token that the model does not have.
        """
        if batch["max_token"] >= self.vocabulary:  # on a GPU it would be an assertion in a kernel
            raise TrainingError(
                f"the data holds token {batch['max_token']}, but the model has a vocabulary of {self.vocabulary}: "
                "tokenizer and model do not belong together"
            )
        branches = "branch" in batch and self.base.config._attn_implementation == NAME
        return {**batch, **batch["branch"]} if branches else batch

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the last hidden states, [rows, width, size]."""
        with self.running():
            output = self.base.get_decoder()(**inputs(batch))
        return output.last_hidden_state  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what `from_pretrained` and vLLM load: safetensors and configuration, or peft's adapters.

        Args:
            folder: is made.
            state_dict: parameters to write instead of this module's, by this module's names.
        """
        if state_dict is not None:
            state_dict = {name.removeprefix("hf."): value for name, value in state_dict.items()}
        shown = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()  # it would tear the live line of the console
        try:
            self.hf.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE)
        finally:
            if shown:
                transformers.utils.logging.enable_progress_bar()


class CausalLM(PackedModel):
    """A causal language model."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.plain_head = has_plain_head(hf)

    def forward(
        self,
        batch: Batch,
        output: Literal["nll", "log_probs", "logits", "hidden"] = "nll",
        tokens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute something at the supervised positions of a batch (see layout.py).

        Args:
            batch: its `input_ids`, `position_ids`, `cu_seqlens`, `max_seqlen`, `max_token`, `supervised` and `targets`
                are used.
            output: what to return.
            tokens: int64 [n, k], for log_probs: the tokens that are asked about, instead of the targets.
            temperature: for log_probs: what logits are divided by.

        Returns:
            nll: a scalar, the summed negative log-likelihood of the targets, in nats.
            log_probs: [n], each target's log-probability, or [n, k], those of `tokens`.
            logits: [n, vocabulary]; mind the memory.
            hidden: [rows, width, size], the last hidden states, of every position.

        Raises:
            TrainingError: the batch holds a token that the model does not have.
        """
        layout = self.layout(batch)
        if output == "hidden":
            return self.hidden_states(batch)
        if output == "logits":
            return self.logits(layout)
        if output == "nll" and self.plain_head:
            return nll_sum(*self.head_inputs(layout), batch["targets"])
        asked = batch["targets"][:, None] if tokens is None else tokens
        if self.plain_head:
            log_probs = token_log_probs(*self.head_inputs(layout), asked, temperature)
        else:
            log_probs = (self.logits(layout).float() / temperature).log_softmax(-1).gather(1, asked)
        log_probs = log_probs[:, 0].clone() if tokens is None else log_probs  # FSDP2 warns of views
        return -log_probs.sum() if output == "nll" else log_probs

    def head_inputs(self, layout: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the hidden states at the supervised positions, [n, size], and the head's weight and bias."""
        head = self.base.get_output_embeddings()
        return self.hidden_states(layout).flatten(0, 1).index_select(0, layout["supervised"]), head.weight, head.bias

    def logits(self, batch: Batch) -> Tensor:
        """Return the model's own logits at the supervised positions, [n, vocabulary]."""
        flat = inputs(batch)
        for name in ("input_ids", "position_ids"):  # one long row, since one index list serves all rows
            flat[name] = flat[name].reshape(1, -1)
        with self.running():
            return self.base(**flat, logits_to_keep=batch["supervised"]).logits[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def top_log_probs(
        self, batch: Batch, k: int, temperature: float = 1.0, vocabulary: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the k highest log-probabilities at the supervised positions, and their tokens: [n, k] each.

        Args:
            batch: see `forward`.
            k: at most the vocabulary.
            temperature: what logits are divided by.
            vocabulary: only this many tokens, from the first one on, are thought of; all by default.
        """
        layout, known = self.layout(batch), slice(vocabulary)
        if self.plain_head:
            hidden, weight, bias = self.head_inputs(layout)
            return top_log_probs(hidden, weight[known], None if bias is None else bias[known], k, temperature)
        return top_of(self.logits(layout)[:, known], k, temperature)

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        """Generate with transformers, in evaluation mode; arguments and result are transformers' own."""
        was_training = self.training
        self.eval()
        try:
            return self.hf.generate(use_cache=True, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.train(was_training)


def inputs(batch: Batch) -> dict[str, Any]:
    """Return what every transformers model needs to keep packed documents apart.

    Flash attention and ours go by the cumulative lengths. sdpa, eager and flex attention go by
    positions that restart, and only if there is no attention mask and no cache.
    """
    more: dict[str, Any] = {name: batch[name] for name in ("kv_index", "sequence_group") if name in batch}
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
        "cu_seq_lens_q": batch["cu_seqlens"],
        "cu_seq_lens_k": batch.get("cu_seqlens_k", batch["cu_seqlens"]),
        "max_length_q": batch["max_seqlen"],
        "max_length_k": batch.get("max_seqlen_k", batch["max_seqlen"]),
        **more,
    }


def without_adapters_wrapper(hf: Any) -> Any:
    """Return the transformers model inside peft's wrapper, if there is one."""
    return hf.get_base_model() if hasattr(hf, "get_base_model") else hf


def has_plain_head(hf: Any) -> bool:
    """Whether logits are a linear layer of the last hidden states, and nothing else.

    Some models scale or cap them (Cohere's logit_scale, Granite's logits_scaling, Gemma's soft cap).
    """
    base = without_adapters_wrapper(hf)
    if type(base.get_output_embeddings()) is not nn.Linear:
        return False
    suspicious = {k: v for k, v in base.config.get_text_config().to_dict().items() if "logit" in k or "multiplier" in k}
    return all(value in (None, 1, 1.0, False) or name.startswith("output_") for name, value in suspicious.items())
