"""Steps that treat every number of a parameter alone, so that ranks take theirs without a word to each other."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from posttrain.blocks.optimizers.local import Stepper, first_row, grad_of, local, pieces, zeros_by_row
from posttrain.blocks.optimizers.rounding import rounded
from posttrain.runtime.bnb import dynamic_map, require

BLOCK = 256
"""Numbers of a row that share a scale, in states of 8 bits."""
SMALL = 4096
"""Parameters with fewer numbers keep a state in float32, as bitsandbytes does it."""


class Lion(Stepper):
    """Chen et al., arXiv:2302.06675, algorithm 2."""

    early = False

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make the one moment."""
        state["exp_avg"] = torch.zeros_like(parameter)

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step by signs."""
        (fast, slow), lr = group["betas"], group["lr"]
        for _, (p, g, moment) in pieces(parameter, grad_of(parameter, grad), state["exp_avg"]):
            sign = moment.lerp(g, 1 - fast).sign_()
            p.mul_(1 - lr * group["weight_decay"]).add_(sign, alpha=-lr)
            moment.lerp_(g, 1 - slow)


def adam(step: int, group: dict[str, Any], p: Tensor, g: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, ...]:
    """Return a parameter and its moments after a step of AdamW, in float32: [n] each."""
    fast, slow = group["betas"]
    p, g = p.float(), g.float()
    mean = torch.lerp(mean.float(), g, 1 - fast)
    square = (square.float() * slow).addcmul_(g, g, value=1 - slow)
    scale = square.sqrt().div_(math.sqrt(1 - slow**step)).add_(group["eps"])
    moved = (p * (1 - group["lr"] * group["weight_decay"])).addcdiv_(mean, scale, value=-group["lr"] / (1 - fast**step))
    return moved, mean, square


class AdamWBF16(Stepper):
    """AdamW with moments in bfloat16, rounded at random; so is a parameter in bfloat16."""

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make both moments."""
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step, and round."""
        step = int(state["step"])
        rows = local(parameter)
        begin = first_row(parameter) * (rows.numel() // max(1, rows.shape[0]) if rows.ndim else 1)
        held = state["exp_avg"], state["exp_avg_sq"]
        for at, (p, g, mean, square) in pieces(parameter, grad_of(parameter, grad), *held):
            made = adam(step, group, p, g, mean, square)
            for i, (old, new) in enumerate(zip((p, mean, square), made, strict=True)):
                low = old.dtype == torch.bfloat16
                old.copy_(rounded(new, begin + at, key=(step * 2**20 + index) * 3 + i) if low else new)


class AdamW8bit(Stepper):
    """AdamW with moments of 8 bits, a scale for every 256 numbers of a row (Dettmers et al., arXiv:2110.02861)."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        require("optimizer: adamw-8bit")
        super().__init__(groups, **defaults)

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make both moments, as bytes if there are enough of them."""
        for name in ("exp_avg", "exp_avg_sq"):
            if parameter.ndim < 2 or parameter.numel() < SMALL:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                rows, blocks = parameter.shape[0], -(-parameter[0].numel() // BLOCK)
                state[f"{name}_codes"] = zeros_by_row(parameter, (rows, blocks * BLOCK), torch.uint8)
                state[f"{name}_scales"] = zeros_by_row(parameter, (rows, blocks), torch.float32)

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step in float32."""
        step, g = int(state["step"]), grad_of(parameter, grad)
        if "exp_avg" in state:
            for _, (p, part, mean, square) in pieces(parameter, g, state["exp_avg"], state["exp_avg_sq"]):
                for old, new in zip((p, mean, square), adam(step, group, p, part, mean, square), strict=True):
                    old.copy_(new)
            return
        rows, width = local(parameter).flatten(1), parameter[0].numel()
        grads, each = g.view_as(rows), max(1, 2**24 // width)
        names = (("exp_avg", True), ("exp_avg_sq", False))
        held = {name: local(state[name]) for kind, _ in names for name in (f"{kind}_codes", f"{kind}_scales")}
        for at in range(0, rows.shape[0], each):
            some = slice(at, at + each)
            mean, square = (self.read(held, name, signed, some)[:, :width] for name, signed in names)
            moved, mean, square = adam(step, group, rows[some], grads[some], mean, square)
            rows[some] = moved.to(rows.dtype)
            for (name, signed), value in zip(names, (mean, square), strict=True):
                self.write(held, name, signed, some, value)

    def read(self, held: dict[str, Tensor], name: str, signed: bool, part: slice) -> Tensor:
        """Return a moment of some rows, [rows, blocks * 256], in float32."""
        codes, scales = held[f"{name}_codes"][part], held[f"{name}_scales"][part]
        found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            codes.view(-1), scales.reshape(-1), dynamic_map(str(codes.device), signed), BLOCK, torch.float32
        )
        return found.view_as(codes)

    def write(self, held: dict[str, Tensor], name: str, signed: bool, part: slice, value: Tensor) -> None:
        """Keep a moment of some rows as bytes."""
        codes, scales = held[f"{name}_codes"], held[f"{name}_scales"]
        padded = F.pad(value, (0, codes.shape[1] - value.shape[1])).reshape(-1)
        new, absmax = torch.ops.bitsandbytes.quantize_blockwise(padded, dynamic_map(str(codes.device), signed), BLOCK)
        codes[part] = new.view(-1, codes.shape[1])
        scales[part] = absmax.view(-1, scales.shape[1])


class ScheduleFree(Stepper):
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682): parameters are y, a state is z, and x is what to use.

    y = (1 - beta1) z + beta1 x, so that x = y + (1 - 1 / beta1) (z - y). In x, a step has the weight of the largest
    rate so far, squared, as in the authors' code.
    """

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make the square; z begins as the parameter, when the first step is taken."""
        state["exp_avg_sq"] = torch.zeros_like(parameter)

    def begin(self, group: dict[str, Any]) -> None:
        """Weigh the step among all so far."""
        group["lr_max"] = max(group["lr"], group.get("lr_max", 0.0))
        weight = group["lr_max"] ** 2
        group["weight_sum"] = group.get("weight_sum", 0.0) + weight
        group["share"] = weight / group["weight_sum"]

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step z, and move y with it and with x."""
        if "z" not in state:
            state["z"] = parameter.detach().clone()
        (fast, slow), lr, share = group["betas"], group["lr"], group["share"]
        correction = math.sqrt(1 - slow ** int(state["step"]))
        held = state["z"], state["exp_avg_sq"]
        for _, (y, g, z, square) in pieces(parameter, grad_of(parameter, grad), *held):
            square.mul_(slow).addcmul_(g, g, value=1 - slow)
            step = g / (square.sqrt() / correction).add_(group["eps"])
            step.add_(y, alpha=group["weight_decay"])
            y.lerp_(z, share).add_(step, alpha=lr * (fast * (1 - share) - 1))
            z.sub_(step, alpha=lr)

    @torch.no_grad()
    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """Return all parameters with the x of each."""
        known = ((group["betas"][0], p) for group, p in self.each() if "z" in self.state[p])
        return [(p, p.lerp(self.state[p]["z"], 1 - 1 / beta)) for beta, p in known]
