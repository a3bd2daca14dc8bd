"""A block of your own: Lion, an optimizer that steps by signs (Chen et al., arXiv:2302.06675, algorithm 2)."""

import torch

import posttrain
from posttrain import key


class Signs(torch.optim.Optimizer):
    """Lion's update; one moment per parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        for group in self.param_groups:
            (fast, slow), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - lr * group["weight_decay"]).add_((moment * fast + p.grad * (1 - fast)).sign(), alpha=-lr)
                    moment.lerp_(p.grad, 1 - slow)


@posttrain.block("optimizer", "own-lion")
class OwnLion:
    """Lion, written out; posttrain brings one as `lion`, too."""

    lr: float = key(3e-4, also=("learning_rate",))
    """Size of a step: a third to a tenth of AdamW's."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the moment in the update, and of what is kept."""
    weight_decay: float = 0.0
    """Decoupled."""

    def build(self, model):
        """Return the optimizer of the parameters that are trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return Signs(trained, {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay})
