"""Greedy generation with drafts: the base model checks several tokens in one pass, and says what it would have said."""

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache

from posttrain.blocks.models.documents.attention import CACHE
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.blocks.models.speculator.network import MLPSpeculator


@attrs.define
class Drafts:
    """How drafts fared."""

    accepted: list[int]
    """How often each head's token was right, with all before it."""
    steps: int = 0
    """Passes of the base model that checked drafts."""
    tokens: int = 0
    """Tokens that these passes gave."""

    @property
    def tokens_per_step(self) -> float:
        """What a pass gives; without drafts it is 1."""
        return self.tokens / self.steps if self.steps else 0.0

    def add(self, other: "Drafts") -> None:
        """Count another generation."""
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]
        self.steps, self.tokens = self.steps + other.steps, self.tokens + other.tokens


@torch.no_grad()
def speculate(
    hf: Any, speculator: "MLPSpeculator", ids: Tensor, max_new_tokens: int, count: int | None = None
) -> tuple[Tensor, Drafts]:
    """Generate greedily with drafts; the result is that of plain greedy generation.

    Args:
        hf: the base model, a causal language model of transformers in evaluation mode.
        speculator: trained for it.
        ids: int64 [1, width], the prompt.
        max_new_tokens: at most so many; an end token of the model's generation configuration ends it too.
        count: drafts in a pass; as many as the speculator has heads by default.

    Returns:
        The new tokens, int64 [n], and how the drafts fared.

    Raises:
        RecipeError: more drafts are asked for than there are heads.
    """
    heads = speculator.config["n_predict"]
    count = heads if count is None else count
    if not 1 <= count <= heads:
        raise RecipeError(f"{count} drafts in a pass were asked for, and the speculator has {heads} heads")
    ends = hf.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    cache, drafts, head = DynamicCache(), Drafts([0] * count), hf.get_output_embeddings()
    hidden = hf.get_decoder()(input_ids=ids, **{CACHE: cache}, use_cache=True).last_hidden_state[:, -1]
    said = head(hidden).argmax(-1).tolist()
    while len(said) < max_new_tokens and said[-1] not in ends:
        newest = torch.tensor(said[-1:], device=ids.device)
        drafted = speculator.draft(hidden, newest, count)
        asked = torch.cat([newest[:, None], drafted], 1)
        states = hf.get_decoder()(input_ids=asked, **{CACHE: cache}, use_cache=True).last_hidden_state[0]
        would_say = head(states).argmax(-1)
        right = int((would_say[:-1] == drafted[0]).cumprod(0).sum())
        if right < count:
            cache.crop(right - count)  # what was not accepted
        new = would_say[: right + 1].tolist()
        new = new[: next((i + 1 for i, token in enumerate(new) if token in ends), None)]
        new = new[: max_new_tokens - len(said)]
        drafts.add(Drafts([int(i < right) for i in range(count)], 1, len(new)))
        hidden = states[right : right + 1]
        said += new
    return torch.tensor(said, device=ids.device), drafts
