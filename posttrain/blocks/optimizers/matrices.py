"""Steps that look at a matrix as a whole. Sharded ones are gathered, or what is summed over their rows is."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain.blocks.optimizers.local import Stepper, first_row, grad_of, local, summed, zeros_by_row

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, from Jordan's Muon."""


def orthogonal(x: Tensor, steps: int, eps: float) -> Tensor:
    """Return matrices with singular values near 1 and the singular vectors of x, [..., rows, columns].

    Newton-Schulz with a quintic (Jordan et al., "Muon", 2024), in the precision of x.
    """
    a, b, c = QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(Stepper):
    """Momentum, made orthogonal (Jordan et al., 2024), with rates that suit AdamW's (Liu et al., arXiv:2502.16982)."""

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make the momentum."""
        state["momentum"] = torch.zeros_like(parameter)

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step. A matrix in shards is gathered; a stack of experts in shards has whole matrices on each rank."""
        mine, g, momentum = local(parameter), grad_of(parameter, grad), group["momentum"]
        buffer = local(state["momentum"])
        buffer.lerp_(g, 1 - momentum)
        update = g.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = update.to(getattr(torch, group["computed_in"]))
        if isinstance(parameter, DTensor) and parameter.ndim == 2:
            rows = DTensor.from_local(
                update, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                stride=parameter.stride(),
            )  # fmt: skip
            begin = first_row(parameter)
            whole = orthogonal(rows.full_tensor(), group["steps"], group["eps"])
            update = whole[begin : begin + mine.shape[0]]
        elif mine.shape[0]:
            update = orthogonal(update, group["steps"], group["eps"])
        scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
        mine.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


class Adafactor(Stepper):
    """Shazeer and Stern, arXiv:1804.04235, as `torch.optim.Adafactor` computes it, sharded too."""

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make the mean squares of rows and columns; of vectors, all of them."""
        shape = tuple(parameter.shape)
        if parameter.ndim < 2:
            state["variance"] = torch.zeros_like(parameter)
            return
        state["row_var"] = zeros_by_row(parameter, (*shape[:-1], 1), parameter.dtype)
        columns = (*shape[:-2], 1, shape[-1])
        state["col_var"] = (
            local(parameter).new_zeros(columns)
            if len(shape) == 2
            else zeros_by_row(parameter, columns, parameter.dtype)
        )

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step by what rows and columns say of the squares."""
        mine, g, step = local(parameter), grad_of(parameter, grad), float(state["step"])
        eps, new, count = torch.finfo(parameter.dtype).eps, step ** group["beta2_decay"], parameter.numel()
        if parameter.ndim < 2:
            variance = local(state["variance"]).lerp_(g * g, new).clone()
        else:
            variance = self.of_matrix(parameter, g, state, new, eps)
        norm = summed(mine.square().sum(), parameter).sqrt() / math.sqrt(count)
        rate = norm.clamp(min=group["least"]) * min(group["lr"], step**-0.5)
        mine.mul_(1 - group["lr"] * group["weight_decay"])
        update = variance.clamp_(min=eps * eps).rsqrt_().mul_(g)
        rms = summed(update.square().sum(), parameter).sqrt() / math.sqrt(count)
        mine.sub_(update * (rate / (rms / group["clip"]).clamp(min=1.0)))

    def of_matrix(self, parameter: Tensor, g: Tensor, state: dict[str, Any], new: float, eps: float) -> Tensor:
        """Return the squares that rows and columns amount to, [..., rows, columns] of this rank."""
        square, flat = g.square(), parameter.ndim == 2
        row = local(state["row_var"]).lerp_(square.mean(-1, keepdim=True), new)
        column = square.sum(-2, keepdim=True)
        column = (summed(column, parameter) if flat else column) / parameter.shape[-2]
        column = local(state["col_var"]).lerp_(column, new)
        mean = row.sum(-2, keepdim=True)
        mean = (summed(mean, parameter) if flat else mean) / parameter.shape[-2]
        return (row @ column).div_(mean.clamp(min=eps))
