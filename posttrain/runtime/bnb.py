"""What quantized weights and optimizers of 8 bits need of bitsandbytes (extra `bnb`)."""

from typing import TYPE_CHECKING

from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

_maps: "dict[tuple[str, bool], Tensor]" = {}


def require(key: str) -> None:
    """Import bitsandbytes, which registers its operations with torch.

    Raises:
        RecipeError: it is not installed; `key` of the recipe needs it.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise RecipeError(f"{key} needs bitsandbytes: pip install 'posttrain[bnb]'") from None


def dynamic_map(device: str, signed: bool = True) -> "Tensor":
    """Return the 256 numbers that bytes stand for, times a scale (Dettmers et al., arXiv:2110.02861, 2.1)."""
    if (device, signed) not in _maps:
        import torch
        from bitsandbytes.functional import create_dynamic_map
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily(), torch.device("cpu"):  # a plan traces tensors without numbers
            _maps[device, signed] = create_dynamic_map(signed).to(device)  # type: ignore[no-untyped-call]
    return _maps[device, signed]
