"""The weights of the run as files of a checkpoint, for an engine beside the trainer; adapters are merged into them."""

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.blocks.models.packed import without_bars
from posttrain.runtime.launch import all_reduce

if TYPE_CHECKING:
    from posttrain.run import Run


class Watch:
    """Knows whether the weights have changed, whatever has changed them: an update, a checkpoint, an average that is
    put in their place for an evaluation."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.known: list[int] | None = None

    def changed(self) -> bool:
        """Whether they have since the last time, on any rank; all ranks ask together."""
        seen = [shard.values.detach() for shard in self.run.strategy.shards(self.run) if shard.values.numel()]
        found = [number for values in seen for number in _told(values)]
        differ = torch.tensor(float(found != self.known))
        self.known = found
        return bool(all_reduce(self.run.fabric, differ.to(self.run.fabric.device), "MAX"))


def _told(values: Tensor) -> list[int]:
    """Return all bits of some numbers, folded into one number, and their sum, as integers."""
    return torch.stack([torch.hash_tensor(values).view(torch.int64), values.double().sum().view(torch.int64)]).tolist()


def write(run: "Run", folder: Path) -> dict[str, str]:
    """Write the weights as the model's own class saves them. All ranks call it; rank zero writes.

    Returns:
        The SHA-256 of each tensor's bytes, by its name; nothing on other ranks.
    """
    module: Any = run.model.module
    parameters = run.strategy.full_parameters(run)
    if not run.fabric.is_global_zero:
        return {}
    with without_bars():
        if hasattr(module.hf, "peft_config"):
            module.base.save_pretrained(folder, state_dict=merged(module.base))
        else:
            module.save_pretrained(folder, state_dict=parameters)
    return digests(folder)


def merged(base: Any) -> dict[str, Tensor]:
    """Return the weights of a transformers model with peft's layers in it, each merged as peft merges it; what is
    trained stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Tensor] = {}
    inside: set[str] = set()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            alone: Any = copy.deepcopy(module)
            alone.merge(safe_merge=True)
            found |= {f"{name}.{key}": value.detach() for key, value in alone.get_base_layer().named_parameters()}
            inside.add(f"{name}.")
    for name, value in base.state_dict().items():
        if not any(name.startswith(prefix) for prefix in inside):
            found[name] = value.detach()
    return found


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the bytes of each tensor in a folder of safetensors."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - it is no dict
                data = content.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy()
                found[name] = hashlib.sha256(data).hexdigest()
    return found
