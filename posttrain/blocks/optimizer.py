"""Optimizer blocks."""

from typing import TYPE_CHECKING, Any

from attrs.validators import ge, gt

from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


KNOWN = ("state", "param_groups", "defaults")
"""Attributes of an optimizer that checkpoints know."""


@block("optimizer", "adamw")
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101); fused where torch can."""

    lr: float = key(1e-5, also=("learning_rate",), check=gt(0))
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = key(1e-8, check=gt(0))
    """Added to the denominator."""
    weight_decay: float = key(0.0, check=ge(0))
    """Of matrices only: norms, biases and other vectors are left alone."""

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return `torch.optim.AdamW` over the parameters that require gradients."""
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.lr, betas=self.betas, eps=self.eps, fused=True
        )


def torch_optimizer(optimizer: Any) -> "Optimizer":
    """Return the optimizer that a block made, inside what Fabric and DeepSpeed made of it."""
    from torch.optim import Optimizer

    while True:
        held = vars(optimizer)
        if held.get("_optimizer") is not None:
            optimizer = held["_optimizer"]  # Fabric's
        elif held.get("optimizer") is not None and not isinstance(optimizer, Optimizer):
            optimizer = held["optimizer"]  # DeepSpeed's; what is an optimizer itself may wrap another, and has a state
        else:
            return optimizer  # type: ignore[no-any-return]


def members(optimizer: "Optimizer") -> "dict[str, Optimizer]":
    """Return an optimizer, as "", and those inside it, such as the one that Lookahead wraps, by where they are."""
    from torch.optim import Optimizer

    found, states = {"": optimizer}, {id(optimizer.state)}

    def look(value: Any, path: str) -> None:
        if isinstance(value, Optimizer):
            if id(value.state) not in states:
                states.add(id(value.state))
                found[path] = value
                for name, inner in vars(value).items():
                    look(inner, f"{path}.{name}")
        elif isinstance(value, list | tuple | dict):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                look(item, f"{path}.{key}")

    for name, value in vars(optimizer).items():
        if name not in KNOWN:
            look(value, name)
    return found


def hidden_tensors(optimizer: "Optimizer") -> list[str]:
    """Return the attributes in which an optimizer keeps tensors besides its state."""
    from torch import Tensor, nn

    def holds(value: Any, depth: int = 3) -> bool:
        if isinstance(value, Tensor):
            return not isinstance(value, nn.Parameter)
        if depth and isinstance(value, list | tuple | dict):
            return any(holds(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
        return False

    return [name for name, value in vars(optimizer).items() if name not in KNOWN and holds(value)]


def settings(optimizer: "Optimizer") -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return what the groups of an optimizer say but for their parameters, and the same of those inside it."""
    plain = {
        path: [{name: value for name, value in group.items() if name != "params"} for group in member.param_groups]
        for path, member in members(optimizer).items()
    }
    return plain.pop(""), plain


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the learning rates in force: `lr` of the first group, and `lr/NAME` of each group that has a name."""
    groups = torch_optimizer(optimizer).param_groups
    named = {f"lr/{group['name']}": float(group["lr"]) for group in groups if "name" in group}
    return {"lr": float(groups[0]["lr"]), **named}
