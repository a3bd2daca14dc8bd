"""Optimizer blocks besides AdamW: what recipes say. Their steps are in `elementwise` and `matrices`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
from attrs.validators import and_ as both
from attrs.validators import ge, gt, lt, optional

from posttrain.blocks.optimizer import AdamW, Grouped
from posttrain.errors import RecipeError
from posttrain.registry import block, key, suggest

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

SHARE = both(ge(0), lt(1))
UNFIT = {
    "LBFGS": "it evaluates a step several times, which the loop does not",
    "SparseAdam": "gradients here are dense",
    "Muon": "write `type: muon`, which knows shards and leaves embeddings to AdamW",
    "Adafactor": "write `type: adafactor`, which knows shards",
}
"""Classes of torch.optim that cannot be used here, and why."""


@block("optimizer", "adamw-8bit")
class AdamW8bit(AdamW):
    """AdamW with moments of 8 bits (Dettmers et al., arXiv:2110.02861; extra `bnb`): 2 bytes a parameter instead of 8.

    Parameters with fewer than 4,096 numbers, and vectors, keep moments in float32.
    """

    not_flat: ClassVar[str] = "its scales are of 256 numbers of a row"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained."""
        from posttrain.blocks.optimizers.elementwise import AdamW8bit

        return AdamW8bit(self.divided(model), lr=self.lr, betas=self.betas, eps=self.eps)


@block("optimizer", "adamw-bf16")
class AdamWBF16(AdamW):
    """AdamW with moments in bfloat16, rounded at random, 4 bytes a parameter; parameters in bfloat16
    (`precision: bf16-true`) are rounded so, too, and all of training takes 8 bytes a parameter (arXiv:2010.06192)."""

    not_flat: ClassVar[str] = "its random bits are a function of the place in a parameter"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained."""
        from posttrain.blocks.optimizers.elementwise import AdamWBF16

        return AdamWBF16(self.divided(model), lr=self.lr, betas=self.betas, eps=self.eps)


@block("optimizer", "schedule-free")
class ScheduleFree(AdamW):
    """Schedule-free AdamW (Defazio et al., arXiv:2405.15682): an average of the weights in place of a schedule.

    Write `scheduler: constant`, with a warm-up, and a larger rate than AdamW's. The average is what is evaluated and
    exported.
    """

    lr: float = key(1e-4, also=("learning_rate",), check=gt(0))
    """Learning rate."""
    not_flat: ClassVar[str] = "its average could not be put in the place of the weights"
    constant: ClassVar[bool] = True

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained."""
        from posttrain.blocks.optimizers.elementwise import ScheduleFree

        return ScheduleFree(self.divided(model), lr=self.lr, betas=self.betas, eps=self.eps)


@block("optimizer", "lion")
class Lion(Grouped):
    """Steps by signs (Chen et al., arXiv:2302.06675): one moment, 4 bytes a parameter."""

    lr: float = key(3e-6, also=("learning_rate",), check=gt(0))
    """Peak learning rate: a third to a tenth of AdamW's."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the moment in the update, and of what is kept."""

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained."""
        from posttrain.blocks.optimizers.elementwise import Lion

        return Lion(self.divided(model), lr=self.lr, betas=self.betas)


@block("optimizer", "sgd")
class SGD(Grouped):
    """Stochastic gradient descent; with momentum, 4 bytes a parameter."""

    lr: float = key(1e-3, also=("learning_rate",), check=gt(0))
    """Peak learning rate."""
    momentum: float = key(0.0, check=SHARE)
    """Share of the last step in the next."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        if self.nesterov and not self.momentum:
            yield "nesterov", "looks ahead along the momentum: give one"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return `torch.optim.SGD` over the parameters that require gradients."""
        import torch

        return torch.optim.SGD(self.divided(model), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@block("optimizer", "adafactor")
class Adafactor(Grouped):
    """Means of squares by row and column (Shazeer and Stern, arXiv:1804.04235): next to no state.

    As `torch.optim.Adafactor` computes it: the rate is relative to the size of a parameter.
    """

    lr: float = key(1e-2, also=("learning_rate",), check=gt(0))
    """Peak learning rate, of parameters whose root mean square is 1."""
    beta2_decay: float = key(-0.8, check=lt(0))
    """The newest squares have the weight step ** beta2_decay."""
    clip: float = key(1.0, also=("clip_threshold",), check=gt(0))
    """Largest root mean square of an update."""
    least: float = key(1e-3, check=gt(0))
    """Size that smaller parameters are taken to have."""
    not_flat: ClassVar[str] = "it takes rows and columns of whole matrices"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained."""
        from posttrain.blocks.optimizers.matrices import Adafactor

        keys = {"lr": self.lr, "beta2_decay": self.beta2_decay, "clip": self.clip, "least": self.least}
        return Adafactor(self.divided(model), **keys)


@block("optimizer", "muon")
class Muon(AdamW):
    """Orthogonal momentum for matrices (Jordan et al., 2024; Liu et al., arXiv:2502.16982), AdamW for the rest:
    embeddings, head, vectors.

    Updates are as large as AdamW's, so one rate serves both; they are logged as `lr/muon` and `lr/adamw`. Stacks of
    experts are stepped matrix by matrix. Under fsdp, each matrix is gathered.
    """

    adamw_lr: float | None = key(None, check=optional(gt(0)))
    """Peak learning rate of what AdamW steps; `lr` unless given."""
    momentum: float = key(0.95, check=SHARE)
    """Share of the running mean that stays at each step."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    steps: int = key(5, also=("ns_steps",), check=gt(0))
    """Iterations that make an update orthogonal."""
    computed_in: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of these iterations."""
    not_flat: ClassVar[str] = "it makes whole matrices orthogonal"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return both as one (see joined.py)."""
        import torch

        from posttrain.blocks.joined import JoinedOptimizer
        from posttrain.blocks.optimizers.matrices import Muon

        groups, inside = self.divided(model), {id(p) for p in matrices(model)}
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for wanted, held in parts.items():
                if params := [p for p in group["params"] if (id(p) in inside) == wanted]:
                    held.append({**group, "params": params})
        if not parts[True]:
            raise RecipeError("optimizer: muon steps matrices inside of layers, and none of them is trained")
        for group in parts[False]:
            group["lr"] *= (self.adamw_lr or self.lr) / self.lr if "name" not in group else 1.0
        more = {"momentum": self.momentum, "nesterov": self.nesterov, "steps": self.steps, "eps": 1e-7}
        found: dict[str, Optimizer] = {"muon": Muon(parts[True], lr=self.lr, computed_in=self.computed_in, **more)}
        if parts[False]:
            found["adamw"] = torch.optim.AdamW(parts[False], lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return JoinedOptimizer(**found)


def matrices(model: "nn.Module") -> "Iterator[nn.Parameter]":
    """Yield the matrices, and stacks of them, that are neither embeddings nor a head."""
    from torch import nn
    from transformers import PreTrainedModel

    outside: set[int] = set()
    for module in model.modules():
        found: list[Any] = [module] if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd) else []
        if isinstance(module, PreTrainedModel):
            found.append(module.get_output_embeddings())
        outside |= {id(p) for part in found if part is not None for p in part.parameters()}
    return (p for p in model.parameters() if p.ndim in (2, 3) and id(p) not in outside)


@block("optimizer", "torch")
class TorchOptimizer(Grouped):
    """Any optimizer of `torch.optim`, by the name of its class."""

    name: str
    """Such as `RAdam` or `Adagrad`."""
    args: dict[str, Any] = attrs.field(factory=dict)
    """Its further arguments."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield why a class cannot be used."""
        if self.name in UNFIT:
            yield "name", f"{self.name} cannot be used here: {UNFIT[self.name]}"
        for name in ("lr", "weight_decay", "params"):
            if name in self.args:
                yield "args", f"{name} is not said here: lr, weight_decay and groups are keys of the block"

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return the optimizer of the parameters that are trained.

        Raises:
            RecipeError: there is no such class, or it does not take these arguments.
        """
        import inspect

        import torch

        kinds = {
            name: found for name, found in vars(torch.optim).items()
            if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name != "Optimizer"
        }  # fmt: skip
        if self.name not in kinds:
            raise RecipeError(f"optimizer.name: torch.optim has no class {self.name!r}{suggest(self.name, kinds)}")
        taken = inspect.signature(kinds[self.name]).parameters
        if unknown := [name for name in self.args if name not in taken]:
            hint = suggest(unknown[0], taken)
            raise RecipeError(f"optimizer.args: torch.optim.{self.name} takes no {unknown[0]!r}{hint}")
        groups = self.divided(model)
        if "weight_decay" not in taken:
            if any(group["weight_decay"] for group in groups):
                raise RecipeError(f"optimizer.weight_decay: torch.optim.{self.name} has none")
            groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
        try:
            made: Optimizer = kinds[self.name](groups, **{"lr": self.lr, **self.args})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"optimizer: torch.optim.{self.name} does not take these arguments: {error}") from error
        return made
