"""Half precision for parameters alone, as transformers loads a model in bfloat16.

Rotary angles and the like are buffers in float32: rounded to bfloat16, a frequency is off by up to 0.4 %, which at
position 4,000 is another place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric
    from torch import nn


def keep_buffers(fabric: "Fabric") -> None:
    """Let a Fabric of precision `bf16-true` or `16-true` cast parameters, and not buffers."""
    import torch

    found: Any = fabric._precision
    types = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
    if dtype := types.get(found.precision):
        found.convert_module = partial(halve, dtype=dtype)


def halve(module: "nn.Module", dtype: "torch.dtype") -> "nn.Module":
    """Cast the parameters of a network in place, but for those that its transformers model keeps in float32."""
    kept = kept_precise(module, dtype)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not kept(name):
            parameter.data = parameter.data.to(dtype)
    return module


def kept_precise(module: "nn.Module", dtype: "torch.dtype") -> Callable[[str], bool]:
    """Return what tells the names of parameters that stay in float32, such as a router's bias."""
    import torch
    from transformers import PreTrainedModel

    names: set[str] = set()
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            names |= set(part._keep_in_fp32_modules_strict or ())
            names |= set(part._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    return lambda name: any(f".{part}." in f".{name}." for part in names)


@contextmanager
def keeping_buffers(module: "nn.Module") -> Iterator[None]:
    """Keep the precision of buffers while an engine casts the whole network."""
    before = [(part, dict(part.named_buffers(recurse=False))) for part in module.modules()]
    yield
    for part, buffers in before:
        for name, buffer in buffers.items():
            now = getattr(part, name)
            if now.dtype != buffer.dtype:
                setattr(part, name, buffer.to(now.device))
