"""What mixes positions without knowing of documents, computed document by document.

Recurrent layers, convolutions and some attentions carry one document of a row into the next. Such a module is given the
documents of a row as a batch, padded on the right, where no causal module looks; the rest of the network stays packed.
No kernel has to know of documents for that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

TOLERATED = 0.75
"""Documents share a batch with one of this share of their own length at least; the rest is padding."""
SHORT = 16
"""Tokens; documents this short share a batch whatever their lengths."""
LAYOUT = ("cu_seq_lens", "max_length", "seq_idx", "kv_index", "cu_seqlens", "max_seqlen")
"""Beginnings of arguments that describe packed rows: a module that sees documents one by one needs none."""


@attrs.frozen
class Way:
    """How a network keeps documents apart."""

    attention: str
    """As transformers calls it."""
    separated: tuple[tuple[str, bool], ...] = ()
    """Classes of modules that compute by document, and whether each document is alone there."""
    unfolds: bool = False
    """Whether the network sees each document in a row of its own, padded on the right."""
    plain_head: bool = True
    """Whether logits are a linear layer of the last hidden states, and nothing else."""
    proven: bool = True
    """Whether a tiny copy of the network could be tried."""

    def __str__(self) -> str:
        if self.unfolds:
            return f"{self.attention} attention, each document in a row of its own"
        return f"{self.attention} attention" + "".join(f", {name} by document" for name, _ in self.separated)


@attrs.frozen(eq=False)
class Plan:
    """How the tokens of rows are laid out as batches of documents, on a device."""

    batches: list[Tensor]
    """int64 [documents, longest] each, the flat positions of their tokens; padding repeats a document's last."""
    real: list[Tensor]
    """int64 [tokens] each, the places in a flat batch that are not padding."""
    back: Tensor
    """int64 [rows * width], where each token of the rows is among the real ones of all batches."""

    @classmethod
    def of(cls, bounds: list[int], singly: bool, device: torch.device) -> "Plan":
        """Work it out on the host, which does not wait for a GPU to take it."""

        def given(values: np.ndarray) -> Tensor:
            found = torch.from_numpy(values)
            return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)

        found = list(groups(bounds, singly))
        order = np.concatenate([index[real] for index, real in found])
        batches, places = [given(index) for index, _ in found], [given(np.flatnonzero(real)) for _, real in found]
        return cls(batches, places, given(np.argsort(order)))


@attrs.define(eq=False)
class Bounds:
    """Where the documents of the rows begin that a network is computing: [0, ..., rows * width]."""

    at: list[int] | None = None
    """None while it computes something else, such as a generation. It stays after a pass that has a backward
    one, in which activations may be computed again."""
    _of: list[int] | None = None
    _plans: dict[tuple[bool, torch.device], Plan] = attrs.field(factory=dict)

    def plan(self, singly: bool, device: torch.device) -> Plan:
        """Return how documents become batches; it is worked out once for all modules."""
        assert self.at is not None
        if self._of is not self.at:
            self._of, self._plans = self.at, {}
        if (singly, device) not in self._plans:
            self._plans[singly, device] = Plan.of(self.at, singly, device)
        return self._plans[singly, device]


class ByDocument:
    """Mixed into the class of a module, whose forward pass then sees each document by itself."""

    _bounds: Bounds
    _singly: bool
    _fresh: dict[str, Any]
    """What the module remembered before it saw any document."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module does, for each document."""
        bounds, forward = self._bounds, super().forward  # type: ignore[misc]
        if bounds.at is None:
            return forward(*args, **kwargs)

        def one_batch(*args: Any, **kwargs: Any) -> Any:
            for name, value in self._fresh.items():  # rotary embeddings remember the longest that they have seen
                setattr(self, name, value.to(getattr(self, name).device) if isinstance(value, Tensor) else value)
            with short_chunks(self, first_tensor(args, kwargs)):
                return forward(*args, **kwargs)

        return by_document(one_batch, bounds, self._singly, args, kwargs)


_classes: dict[type, Any] = {}


def by_document_class(cls: type) -> Any:
    """Return a module's class that computes by document; it keeps its name, which others look for."""
    if cls not in _classes:
        _classes[cls] = type(cls.__name__, (ByDocument, cls), {"__module__": cls.__module__})
    return _classes[cls]


def separate(network: nn.Module, classes: dict[str, bool], bounds: Bounds) -> None:
    """Let every module of some classes compute by document.

    The class of a module is changed, not its attributes, so that copies of it compute with their own weights.

    Args:
        network: changed in place.
        classes: name -> whether documents must be alone, for a module that looks at how long the longest is.
        bounds: of the rows, set before each pass.
    """
    for module in network.modules():
        if type(module).__name__ in classes:
            if not isinstance(module, ByDocument):
                module.__class__ = by_document_class(type(module))
            module._bounds, module._singly = bounds, classes[type(module).__name__]  # type: ignore[assignment]
            module._fresh = remembered(module) if module._singly else {}  # type: ignore[assignment]


def remembered(module: nn.Module) -> dict[str, Any]:
    """Return the buffers and numbers of a module."""
    numbers = {n: v for n, v in vars(module).items() if isinstance(v, int | float) and not n.startswith("_")}
    return {**numbers, **{name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}}


@contextmanager
def short_chunks(module: Any, x: Tensor) -> Iterator[None]:
    """Let a scan that goes through a sequence in chunks fill none up with padding.

    Mamba 2 without kernels makes every sequence a multiple of its `chunk_size` long, 256 as a rule, and computes each
    chunk's square. How long chunks are changes nothing but rounding (Dao and Gu, arXiv:2405.21060, section 6): they
    become as few as before, and no longer than they must. Kernels want powers of two.

    Args:
        module: changed for as long as it computes.
        x: [documents, longest, ...], what it computes with.
    """
    size = vars(module).get("chunk_size")
    if not isinstance(size, int) or x.ndim < 2:
        yield
        return
    longest = x.shape[1]
    least = -(-longest // -(-longest // size)) if x.device.type == "cpu" else max(64, 1 << (longest - 1).bit_length())
    module.chunk_size = min(size, least)
    try:
        yield
    finally:
        module.chunk_size = size


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor of a module's arguments."""
    return next(x for x in flat((*args, *kwargs.values())) if isinstance(x, Tensor))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def by_document(
    forward: Callable[..., Any], bounds: Bounds, singly: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a module gives for the documents of packed rows, laid out like the rows again.

    Args:
        forward: of the module. Tensors of [rows, width, ...] hold something for each token, also with more axes
            in front, or with one row that stands for all; others are handed on, but for masks and packed layouts.
        bounds: of the documents, counted over rows * width.
        singly: whether each document must be alone; else documents of like length make a batch.
        args, kwargs: of the module.
    """
    assert bounds.at is not None
    shape = shape_of_rows((*args, *kwargs.values()), bounds.at[-1])
    if shape is None:  # it computes something else than the rows
        return forward(*args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith(LAYOUT)}
    kwargs |= {name: None for name in kwargs if name == "attention_mask"}
    plan = bounds.plan(singly, first_tensor(args, kwargs).device)
    found = []
    for at in plan.batches:
        given = [changed(x, lambda x, at=at: gathered(x, at, *shape)) for x in args]  # type: ignore[misc]
        named = {name: changed(x, lambda x, at=at: gathered(x, at, *shape)) for name, x in kwargs.items()}  # type: ignore[misc]
        found.append(forward(*given, **named))
    return together(found, plan, shape)


def shape_of_rows(values: tuple[Any, ...], total: int) -> tuple[int, int] | None:
    """Return the rows and the width of the tensors that hold something for each token, if there are any."""
    for x in flat(values):
        if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[0] * x.shape[1] == total:
            return x.shape[0], x.shape[1]
    return None


def groups(bounds: list[int], singly: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of documents of like length: the flat positions of their tokens, and which are not padding.

    Yields:
        int64 and bool [documents, longest]; padding repeats a document's last token.
    """
    begins, lengths = np.array(bounds[:-1]), np.diff(bounds)
    waiting = [int(i) for i in np.argsort(-lengths, kind="stable") if lengths[i] > 0]
    while waiting:
        longest = int(lengths[waiting[0]])
        least = longest if singly else 0 if longest <= SHORT else TOLERATED * longest
        count = 1 if singly else sum(1 for i in waiting if lengths[i] >= least)
        chosen, waiting = np.array(waiting[:count]), waiting[count:]
        steps = np.arange(longest)[None]
        real = steps < lengths[chosen][:, None]
        yield begins[chosen][:, None] + np.minimum(steps, lengths[chosen][:, None] - 1), real


def gathered(x: Tensor, index: Tensor, rows: int, width: int) -> Tensor:
    """Return what a tensor holds for the tokens of some documents, [documents, longest, ...]; others stay."""
    if x.ndim >= 2 and x.shape[:2] == (rows, width):
        return x.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])
    if x.ndim >= 2 and x.shape[0] == 1 and x.shape[1] == width:  # one row that stands for all
        return x[0][index % width]
    if x.ndim >= 3 and x.shape[-2:] == (rows, width):  # axes of positions in front
        return x.flatten(-2)[..., index]
    return x


def together(outputs: list[Any], plan: Plan, shape: tuple[int, int]) -> Any:
    """Put the outputs of all batches into the order of the rows."""
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)(together(list(part), plan, shape) for part in zip(*outputs, strict=True))
    if not (isinstance(first, Tensor) and first.ndim >= 2 and first.shape[:2] == plan.batches[0].shape):
        return first
    parts = [out.flatten(0, 1).index_select(0, real) for out, real in zip(outputs, plan.real, strict=True)]
    tokens = torch.cat(parts).index_select(0, plan.back)
    return tokens.view(*shape, *tokens.shape[1:])


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with the tensors inside tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(changed(item, change) for item in value)
    if type(value) is dict:
        return {name: changed(item, change) for name, item in value.items()}
    return value


def flat(values: Any) -> Iterator[Any]:
    """Yield what is inside tuples and lists."""
    for value in values:
        yield from flat(value) if type(value) in (tuple, list) else (value,)


def decoder_of(hf: Any) -> Any:
    """Return what makes hidden states: transformers' `get_decoder`, unless it answers with the model or its head."""
    from transformers import PreTrainedModel

    decoder = hf.get_decoder()
    for found in (decoder, hf.base_model, getattr(hf, "model", None), getattr(decoder, "model", None)):
        if isinstance(found, PreTrainedModel) and found is not hf and found.get_output_embeddings() is None:
            return found
    return hf.base_model


def head_of(hf: Any) -> Any:
    """Return the layer that makes logits of hidden states; some models keep a whole language model inside, with it."""
    from transformers import PreTrainedModel

    head, decoder = hf.get_output_embeddings(), hf.get_decoder()
    return decoder.get_output_embeddings() if head is None and isinstance(decoder, PreTrainedModel) else head
