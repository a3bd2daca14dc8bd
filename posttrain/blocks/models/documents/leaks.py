"""Which module lets documents of a packed row see each other: the first whose inputs are right and outputs are not."""

import functools
from typing import Any

from torch import Tensor, nn

from posttrain.blocks.models.documents.trial import close
from posttrain.blocks.models.documents.ways import flat


class Calls:
    """What each module of a network was given and gave, inside a `with`."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.seen: list[tuple[str, list[Tensor], list[Tensor]]] = []
        """Name, inputs and outputs of each call, in the order in which calls end."""
        self.entered: list[str] = []
        """The modules whose call has begun and not ended, innermost last."""

    def __enter__(self) -> "Calls":
        self.hooks = []
        for name, module in self.hf.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.entered.append(name)))
            self.hooks.append(module.register_forward_hook(functools.partial(self.note, name), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def note(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Remember a call that ends."""
        self.entered.pop()
        outputs = output.values() if isinstance(output, dict) else (output,)
        self.seen.append((name, tensors((*args, *kwargs.values())), tensors(outputs)))

    def inside(self) -> str | None:
        """Return the class of the innermost module whose call has not ended."""
        return type(self.hf.get_submodule(self.entered[-1])).__name__ if self.entered else None

    def of(self, name: str) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return inputs and outputs of the calls of one module."""
        return [(given, gave) for known, given, gave in self.seen if known == name]


def tensors(values: Any) -> list[Tensor]:
    """Return the floating-point tensors among values."""
    return [x for x in flat(tuple(values)) if isinstance(x, Tensor) and x.is_floating_point()]


def first_leak(calls: Calls, alone: list[Calls], lengths: tuple[int, ...]) -> str | None:
    """Return the class of the first module whose inputs are those of each document alone, and whose outputs are not.

    Args:
        calls: of the network on packed rows.
        alone: of the network on each document.
        lengths: of the documents; the first two share a row, the third has padding behind it.
    """
    counted: dict[str, int] = {}
    for name, given, gave in calls.seen:  # innermost modules come first
        number = counted[name] = counted.get(name, -1) + 1
        theirs = [one.of(name) for one in alone]
        if any(number >= len(found) for found in theirs):
            continue
        right = same(given, [found[number][0] for found in theirs], lengths)
        if right and same(gave, [found[number][1] for found in theirs], lengths) is False:
            return type(calls.hf.get_submodule(name)).__name__
    return None


def same(rows: list[Tensor], each: list[list[Tensor]], lengths: tuple[int, ...]) -> bool | None:
    """Whether the tensors of rows hold what those of each document do; None if none of them holds tokens."""
    compared = None
    places = [(0, 0), (0, lengths[0]), (1, 0)]
    for number, laid in enumerate(rows):
        if laid.ndim < 2 or laid.shape[:2] != (2, lengths[0] + lengths[1]):
            continue
        for (row, at), length, tensors_ in zip(places, lengths, each, strict=True):
            one = tensors_[number] if number < len(tensors_) else None
            if one is None or one.shape[:2] != (1, length) or one.shape[2:] != laid.shape[2:]:
                continue
            if not close(laid[row, at : at + length], one[0]):
                return False
            compared = True
    return compared
