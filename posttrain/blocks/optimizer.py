"""Optimizer blocks."""

from typing import TYPE_CHECKING, Any

from attrs.validators import ge, gt

from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


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
    """Return torch's own optimizer inside what Fabric and DeepSpeed made of it."""
    while (inner := vars(optimizer).get("_optimizer") or vars(optimizer).get("optimizer")) is not None:
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the learning rates in force: `lr` of the first group, and `lr/NAME` of each group that has a name."""
    groups = torch_optimizer(optimizer).param_groups
    named = {f"lr/{group['name']}": float(group["lr"]) for group in groups if "name" in group}
    return {"lr": float(groups[0]["lr"]), **named}
