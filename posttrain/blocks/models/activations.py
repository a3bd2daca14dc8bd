"""What a forward pass keeps for the backward pass, and where: less of it, in tiles, or in the memory of the host."""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.attention.varlen  # registers its operation
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from posttrain.blocks.models.documents.ways import decoder_of
from posttrain.errors import RecipeError

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
}
PRODUCTS = {aten.mm.default, aten.addmm.default}
LARGE = 2**20
"""Bytes from which on a tensor is worth moving to the host."""


def layers_of(hf: Any) -> list[nn.Module]:
    """Return the layers of a model's decoder, whatever it calls them: its first list of as many as there are layers.

    Raises:
        RecipeError: there is no such list.
    """
    decoder, count = decoder_of(hf), hf.config.get_text_config().num_hidden_layers
    lists = (part for part in decoder.modules() if isinstance(part, nn.ModuleList))
    found = next((part for part in lists if len(part) == count), None)
    if found is None:
        raise RecipeError(
            f"model: {type(decoder).__name__} has no list of its {count} layers, which activation_checkpointing, "
            "compile and tiled_mlp go by: leave them out"
        )
    return list(found)


class Compiled:
    """A layer's forward, compiled; a copy of the layer compiles its own, as a reference must not use the policy's."""

    def __init__(self, forward: Callable[..., Any], backend: str) -> None:
        self.forward, self.backend = forward, backend
        self.compiled = torch.compile(forward, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what forward returns."""
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Compiled":
        """Return the same of a copied layer."""
        return Compiled(copy.deepcopy(self.forward, memo), self.backend)


def checkpoint_activations(hf: Any, selective: bool) -> None:
    """Keep each layer's input and compute the rest again; selectively, keep what is dear to compute as well.

    Selective means attention and every second matrix product, as in torchtitan: a third of the work of computing all
    again, and about half of the memory. Not transformers' own switch: that does nothing in evaluation mode, in which
    SwiftKV trains.
    """
    options = {"context_fn": selective_contexts} if selective else {}
    for layer in layers_of(hf):
        layer.forward = functools.partial(again, layer.forward, options)


def again(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return what forward returns, to be computed again in the backward pass if there is one."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def selective_contexts() -> Any:
    """Return the contexts of one layer's forward pass and of its second one."""
    counts: Counter[bool] = Counter()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in PRODUCTS:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % 2 == 1
        else:
            kept = operation in ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def tile_mlps(hf: Any, tiles: int) -> None:
    """Let every layer's MLP work on one of so many tiles of the width at a time, and again in the backward pass.

    Exact, and each parameter still gets its gradient once (tiled as in ALST, arXiv:2506.13996). A number of tiles, not
    of tokens: ZeRO-3 gathers an MLP's weights for each, on all ranks together, whatever their widths.

    Raises:
        RecipeError: the layers have no plain MLP.
    """
    for layer in layers_of(hf):
        mlp = getattr(layer, "mlp", None)
        if mlp is None or hasattr(mlp, "experts"):
            raise RecipeError(f"model.tiled_mlp: {type(layer).__name__} has no plain MLP")
        mlp.forward = functools.partial(in_tiles, mlp.forward, tiles)


def in_tiles(forward: Callable[[Tensor], Tensor], tiles: int, hidden: Tensor) -> Tensor:
    """Return forward(hidden), [rows, width, size], computed in tiles of the width."""
    parts = torch.tensor_split(hidden, tiles, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


@attrs.define(eq=False)
class OnHost:
    """A tensor that waits in the memory of the host."""

    copy: Tensor
    device: torch.device
    before: "OnHost | None"
    """The one that was kept before it, and will be asked for after it."""
    back: Tensor | None = None

    def fetch(self) -> Tensor:
        """Return a copy on the device, which may still be under way on the side stream."""
        if self.back is None:
            self.back = self.copy.to(self.device, non_blocking=True)
        return self.back


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Moves what is kept meanwhile to pinned memory of the host, and back when it is asked for.

    Copies go over a stream of their own, and what is needed next is fetched ahead, so that computing goes on. Small
    tensors and parameters stay. On the CPU there is nothing to move.
    """

    def __init__(self, anywhere: bool = False) -> None:
        self.anywhere = anywhere
        self.last: OnHost | None = None
        self.side: torch.cuda.Stream | None = None
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """Return what is kept for a tensor."""
        small = tensor.numel() * tensor.element_size() < LARGE
        if isinstance(tensor, nn.Parameter) or not (self.anywhere or (tensor.is_cuda and not small)):
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            self.side = self.side or torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            self.side.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self.side):
                copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.side)
        else:
            copy.copy_(tensor)
        self.last = OnHost(copy, tensor.device, self.last)
        return self.last

    def unpack(self, kept: Any) -> Tensor:
        """Return a tensor again."""
        if not isinstance(kept, OnHost):
            return kept  # type: ignore[no-any-return]
        if self.side is None:
            return kept.fetch()
        now = torch.cuda.current_stream(kept.device)
        with torch.cuda.stream(self.side):
            tensor = kept.fetch()
            ready = self.side.record_event()
            if kept.before is not None:
                kept.before.fetch()
        now.wait_event(ready)
        tensor.record_stream(now)
        kept.back = None
        return tensor
