"""AdamW, the groups of parameters that all optimizer blocks know, and what the loop and checkpoints ask of them."""

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import and_ as both
from attrs.validators import ge, gt, le, optional

from posttrain.errors import RecipeError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from posttrain.run import Run


LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""The number of a layer in the name of a parameter."""
KNOWN = ("state", "param_groups", "defaults")
"""Attributes of an optimizer that checkpoints know."""


@attrs.frozen(kw_only=True, slots=False)
class ParameterGroup:
    """Parameters that are trained with numbers of their own."""

    match: str
    """Pattern of their names, such as `*.embed_tokens.*`; of several groups, the first that matches counts."""
    lr: float | None = key(None, check=optional(gt(0)))
    """Their peak learning rate; the optimizer's unless given."""
    weight_decay: float | None = key(None, check=optional(ge(0)))
    """Their weight decay, of vectors too; the optimizer's unless given."""
    name: str | None = None
    """Its learning rate is logged as `lr/NAME`; the pattern unless given."""


@attrs.frozen(kw_only=True, slots=False)
class Grouped:
    """What optimizers share: rates, and which parameters they are for."""

    lr: float = key(1e-5, also=("learning_rate",), check=gt(0))
    """Peak learning rate."""
    weight_decay: float = key(0.0, check=ge(0))
    """Of matrices only: norms, biases and other vectors are left alone."""
    groups: list[ParameterGroup] | None = key(None, also=("param_groups",))
    """Rates for parameters by name: `[{match: "*.embed_tokens.*", lr: 1e-6}]`."""
    layer_decay: float | None = key(None, also=("layerwise_lr_decay",), check=optional(both(gt(0), le(1))))
    """Layer by layer down from the last one, the rate is multiplied by this once more (Howard and Ruder,
    arXiv:1801.06146); embeddings get that of the first layer, the head that of the last."""

    def divided(self, model: "nn.Module") -> "list[dict[str, Any]]":
        """Return what is trained, in groups with `params`, `lr` and `weight_decay`; those of no pattern come first.

        Raises:
            RecipeError: a pattern matches nothing that is trained.
        """
        found: dict[Any, dict[str, Any]] = {}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors, known = self.factors(list(trained)), list(self.groups or [])
        for name, parameter in trained.items():
            own = next((i for i, group in enumerate(known) if fnmatch.fnmatchcase(name, group.match)), None)
            group = None if own is None else known[own]
            lr = (self.lr if group is None or group.lr is None else group.lr) * factors[name]
            decay = self.weight_decay if parameter.ndim >= 2 else 0.0
            decay = decay if group is None or group.weight_decay is None else group.weight_decay
            place = (-1 if own is None else own, -factors[name], parameter.ndim < 2)
            made = found.setdefault(place, {"params": [], "lr": lr, "weight_decay": decay})
            made["params"].append(parameter)
            if group is not None:
                made["name"] = group.name or group.match
        for i, group in enumerate(known):
            if i not in {place[0] for place in found}:
                raise RecipeError(
                    f"optimizer.groups: {group.match!r} matches nothing that is trained and in no group before it; "
                    f"a name is {next(iter(trained), None)!r}"
                )
        return [found[place] for place in sorted(found)]

    def factors(self, names: list[str]) -> dict[str, float]:
        """Return what the rate of each parameter is multiplied by.

        Raises:
            RecipeError: no names have a layer's number.
        """
        if self.layer_decay is None:
            return dict.fromkeys(names, 1.0)
        layers = {name: int(found[1]) for name in names if (found := LAYER.search(name))}
        if not layers:
            raise RecipeError("optimizer.layer_decay: the model has no numbered layers whose parameters are trained")
        first, last = min(layers.values()), max(layers.values())
        below = {name: first if "embed" in name else last for name in names if name not in layers}
        return {name: self.layer_decay ** (last - (layers | below)[name]) for name in names}


@block("optimizer", "adamw")
class AdamW(Grouped):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101); fused where torch can."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = key(1e-8, check=gt(0))
    """Added to the denominator."""

    def build(self, model: "nn.Module") -> "Optimizer":
        """Return `torch.optim.AdamW` over the parameters that require gradients."""
        import torch

        return torch.optim.AdamW(self.divided(model), lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


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


@contextmanager
def averaged(run: "Run") -> "Iterator[None]":
    """Let the weights be what an optimizer says is to be used, such as the average of schedule-free ones; then, to the
    last bit, what is trained again."""
    held = [inside for inside in members(torch_optimizer(run.optimizer)).values() if hasattr(inside, "averages")]
    pairs = [pair for inside in held for pair in inside.averages()]
    kept = [parameter.detach().clone() for parameter, _ in pairs]
    try:
        put(run, [(parameter, average) for parameter, average in pairs])
        yield
    finally:
        put(run, [(parameter, value) for (parameter, _), value in zip(pairs, kept, strict=True)])


def put(run: "Run", pairs: "list[tuple[Tensor, Tensor]]") -> None:
    """Give parameters other values."""
    if pairs:
        for _ in run.strategy.shards(run):  # what FSDP holds gathered is given up
            pass
    for parameter, value in pairs:
        parameter.data.copy_(value)


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the learning rates in force: `lr` of the first group, and `lr/NAME` of each group that has a name."""
    groups = torch_optimizer(optimizer).param_groups
    named = {f"lr/{group['name']}": float(group["lr"]) for group in groups if "name" in group}
    return {"lr": float(groups[0]["lr"]), **named}
