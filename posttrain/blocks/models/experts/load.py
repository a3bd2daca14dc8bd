"""How evenly the tokens of a step are spread over the experts of a mixture, and the biases that even it out.

Counted is what experts are given, so that it holds for any way to choose them; padding does not count. Sums of whole
numbers over micro-batches and ranks do not depend on how a step is cut.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from posttrain.batch import Layout
from posttrain.blocks.models.experts.router import documents_of
from posttrain.errors import RecipeError, TrainingError

SHOWN = 16
"""With more experts than that, only the most and the least of them are logged."""


@attrs.frozen
class Mixture:
    """One layer's experts."""

    experts: Any
    owner: nn.Module | None
    """Of the bias that is added to what experts are chosen by, and not to what they count; None if there is none."""
    name: str = ""

    @property
    def bias(self) -> Tensor:
        """The bias, [experts] or [1, experts]."""
        assert self.owner is not None
        found: Tensor = getattr(self.owner, self.name)
        return found


def mixtures(hf: nn.Module) -> list[Mixture]:
    """Return the layers of a transformers model, in which nothing is frozen yet, whose experts are told what they get.

    A bias for choosing has a number for each expert and is not trained: no other tensor beside experts is like that.
    """
    parts = dict(hf.named_modules())
    return [
        Mixture(part, *chosen_by(parts[name.rpartition(".")[0]], part))
        for name, part in parts.items()
        if "is_transposed" in vars(part)  # as all that transformers computes with one product
    ]


def chosen_by(beside: nn.Module, experts: Any) -> tuple[nn.Module | None, str]:
    """Return the module beside experts that holds the bias that they are chosen by, and its name."""
    own = {id(part) for part in experts.modules()}
    for part in (part for part in beside.modules() if id(part) not in own):
        fixed = {name: p for name, p in part.named_parameters(recurse=False) if not p.requires_grad}
        for name, tensor in {**dict(part.named_buffers(recurse=False)), **fixed}.items():
            if tensor.numel() == tensor.shape[-1] == experts.num_experts > 1:
                return part, name
    return None, ""


class Load:
    """Counts the tokens that experts get in a step, over all of its micro-batches."""

    def __init__(self, found: list[Mixture], rate: float) -> None:
        """Watch some layers.

        Args:
            found: of a network.
            rate: how far biases move after each step.

        Raises:
            RecipeError: biases are to be moved that are not there.
        """
        self.found, self.rate = found, rate
        self.real: Tensor | None = None
        """[tokens], 1, or 0 for padding: of the pass in hand."""
        self.given: list[Tensor] = []
        """Of the pass in hand, and of what is computed again for its gradient: [experts] each."""
        self.totals: list[Tensor] = []
        """Of the step so far."""
        if rate and not all(one.owner for one in found):
            raise RecipeError("model.router_bias_rate: this model has no biases that its experts are chosen by")
        for number, one in enumerate(found):
            if rate and one.name in one.owner._parameters:  # type: ignore[union-attr]
                value = one.bias.detach().clone()  # a buffer is what checkpoints keep, and no strategy takes apart
                delattr(one.owner, one.name)
                one.owner.register_buffer(one.name, value)  # type: ignore[union-attr]
            _, which, *_ = inspect.signature(one.experts.forward).parameters
            note = functools.partial(self.note, number, which)
            one.experts.register_forward_pre_hook(note, with_kwargs=True)

    def begin(self, layout: Layout) -> None:
        """Count what experts get in a pass.

        Raises:
            TrainingError: ranks have parts of rows, of which nobody knows where padding begins.
        """
        self.real, ids = None, layout.input_ids
        if layout.sequence_group is not None:
            if self.rate:
                raise TrainingError("model.router_bias_rate cannot count the tokens of rows that `sequence` cuts")
            return
        self.real = torch.ones(ids.numel(), device=ids.device)
        if layout.kv_index is None:  # where documents branch, there is no padding
            of, _, real = documents_of(layout, self.real)
            self.real = real[of]
        self.given = [torch.zeros(one.experts.num_experts, device=ids.device) for one in self.found]

    def end(self) -> None:
        """Add what was counted to the step."""
        if self.real is not None:
            self.totals = [a + b for a, b in zip(self.totals, self.given, strict=True)] if self.totals else self.given
            self.given = [torch.zeros_like(one) for one in self.given]  # what is computed again goes there

    def note(self, number: int, which: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what the experts of a layer are given."""
        index = args[1] if len(args) > 1 else kwargs[which]  # [tokens, k]
        if self.real is not None and len(index) == len(self.real):
            self.given[number].index_add_(0, index.flatten(), self.real.repeat_interleave(index.shape[1]))

    @torch.no_grad()
    def taken(self, summed: Callable[[Tensor], Tensor], moves: bool) -> dict[str, Tensor]:
        """Begin a new step, and return how even the last one was.

        A bias goes up by the rate where an expert got fewer tokens than the mean, and down where it got more: balancing
        without a loss (Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, 2.1.2).

        Args:
            summed: adds up what ranks have counted.
            moves: whether the biases are moved.

        Returns:
            expert_load/most, /least: of the tokens that the fullest and the emptiest expert of any layer got, as a
            multiple of an even share; expert_load/0, ...: the share of each expert, the mean over layers.
        """
        totals, self.totals, self.real = self.totals, [], None
        if not totals:
            return {}
        sizes = [len(one) for one in totals]
        totals = list(torch.split(summed(torch.cat(totals)), sizes))
        if self.rate and moves:
            for one, total in zip(self.found, totals, strict=True):
                one.bias.add_((self.rate * (total.mean() - total).sign()).view_as(one.bias))
        loads = [total / total.mean().clamp(min=1e-9) for total in totals]
        every = torch.cat(loads)
        found = {"most": every.max(), "least": every.min()}
        if len(set(sizes)) == 1 and sizes[0] <= SHOWN:
            shares = torch.stack(loads).mean(0) / sizes[0]
            found |= {str(i): share for i, share in enumerate(shares.unbind())}
        return {f"expert_load/{name}": value for name, value in found.items()}
