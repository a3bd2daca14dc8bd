"""A causal language model whose logits exist only at supervised positions."""

import inspect
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.batch import Batch, Layout
from posttrain.blocks.losses.cross_entropy import nll_sum, token_log_probs, top_log_probs, top_of
from posttrain.blocks.losses.entropy import log_probs_and_entropy, of_logits
from posttrain.blocks.models.documents.attention import CACHE
from posttrain.blocks.models.documents.ways import Way, head_of
from posttrain.blocks.models.packed import PackedModel
from posttrain.errors import TrainingError
from posttrain.registry import suggest

OF_MAMBA = "cache_params"
"""What transformers calls the cache of models that are Mamba layers alone."""
OUTPUTS = ("nll", "log_probs", "policy", "logits", "hidden")


class CausalLM(PackedModel):
    """A causal language model."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.plain_head = False
        """Whether logits are known to be a linear layer of the last hidden states: then they need not all be there."""

    def keep_apart(self, way: Way) -> None:
        """Keep the documents of rows apart in this way."""
        super().keep_apart(way)
        self.plain_head = way.plain_head

    def forward(
        self,
        batch: Batch,
        output: Literal["nll", "log_probs", "policy", "logits", "hidden"] = "nll",
        tokens: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute something at the supervised positions of a batch (see layout.py).

        Args:
            batch: its layout, `max_token` and `targets` are used.
            output: what to return.
            tokens: int64 [n, k], for log_probs: the tokens that are asked about, instead of the targets.
            temperature: for log_probs and policy: what logits are divided by.

        Returns:
            nll: a scalar, the summed negative log-likelihood of the targets, in nats.
            log_probs: [n], each target's log-probability, or [n, k], those of `tokens`.
            policy: [n] and [n], each target's log-probability, and the entropy of what it is drawn from, in nats.
            logits: [n, vocabulary]; mind the memory.
            hidden: [rows, width, size], the last hidden states, of every position.

        Raises:
            TrainingError: the batch holds a token that the model does not have, or there is no such output.
        """
        if output not in OUTPUTS:
            hint = suggest(output, OUTPUTS)
            raise TrainingError(f"the network has no output {output!r}{hint} (outputs: {', '.join(OUTPUTS)})")
        layout = self.layout(batch)
        if output == "hidden":
            return self.hidden_states(batch)
        if output == "logits":
            return self.logits(layout)
        if output == "policy" and self.plain_head:
            return log_probs_and_entropy(*self.head_inputs(layout), batch.targets, temperature)
        if output == "policy":
            return of_logits(self.logits(layout), batch.targets, temperature)
        if output == "nll" and self.plain_head:
            return nll_sum(*self.head_inputs(layout), batch.targets)
        asked = batch.targets[:, None] if tokens is None else tokens
        if self.plain_head:
            log_probs = token_log_probs(*self.head_inputs(layout), asked, temperature)
        else:
            log_probs = (self.logits(layout).float() / temperature).log_softmax(-1).gather(1, asked)
        log_probs = log_probs[:, 0].clone() if tokens is None else log_probs  # FSDP2 warns of views
        return -log_probs.sum() if output == "nll" else log_probs

    def head_inputs(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the hidden states at the supervised positions, [n, size], and the head's weight and bias."""
        head = head_of(self.base)
        return self.hidden_states(layout).flatten(0, 1).index_select(0, layout.supervised), head.weight, head.bias

    def logits(self, layout: Layout) -> Tensor:
        """Return the model's own logits at the supervised positions, [n, vocabulary]."""
        if self.unfolds:
            with self.running(layout):
                logits = self.unfolded(lambda ids: self.base(input_ids=ids).logits, layout)
            return logits.flatten(0, 1).index_select(0, layout.supervised)
        flat = self.given(layout)
        tokens = [name for name, extra in layout.arguments.items() if extra.per == "token" and name in flat]
        for name in ("input_ids", "position_ids", *tokens):  # one long row, since one index list serves all rows
            flat[name] = flat[name].flatten(-2).unsqueeze(-2)
        with self.running(layout):
            output = self.base(**flat, logits_to_keep=layout.supervised, **self.routed)
        self.add_router(output, layout)
        return self.joined(output.logits[0])

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

    @cached_property
    def cache_name(self) -> str:
        """What its forward calls the cache."""
        return OF_MAMBA if OF_MAMBA in inspect.signature(self.base.forward).parameters else CACHE

    @torch.no_grad()
    def next_logits(
        self, ids: Tensor, mask: Tensor, cache: Any, shift: Tensor | None = None, images: Layout | None = None
    ) -> Tensor:
        """Return the logits of the token that follows each row, float32 [rows, vocabulary].

        Args:
            ids: int64 [rows, new], tokens that the cache does not hold yet.
            mask: int64 [rows, width], 0 for padding at the left; of all tokens so far, the new ones included.
            cache: a transformers `Cache` of what came before, which the new tokens are added to.
            shift: int64 [axes, rows, 1], by how much positions of several axes are ahead of the number of tokens.
            images: where the new tokens hold images, their layout, with positions.
        """
        self.bounds.at = None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        positions = positions if shift is None else positions + shift
        name = self.cache_name
        masked = None if name == OF_MAMBA and ids.shape[1] < mask.shape[1] else mask  # a state, unlike keys, has none
        given = {"attention_mask": masked, "position_ids": positions, "use_cache": True, name: cache}
        if images is not None:
            given |= {"position_ids": images.position_ids, **self.images_of(images)}
        output = self.base(input_ids=ids, logits_to_keep=1, **given)
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        """Generate with transformers, in evaluation mode; arguments and result are transformers' own."""
        was_training, self.bounds.at = self.training, None
        self.eval()
        try:
            return self.hf.generate(use_cache=True, **kwargs)  # type: ignore[no-any-return]
        finally:
            self.train(was_training)
