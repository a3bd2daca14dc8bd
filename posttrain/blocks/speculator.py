"""The MLP-speculator block (Wertheimer et al., arXiv:2404.19124): small heads that draft what a model will say next."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs.converters import optional as or_none
from attrs.validators import gt

from posttrain.blocks.model import HFModel
from posttrain.errors import CheckpointError, RecipeError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = {"ibm": "MLPSpeculatorPreTrainedModel", "arctic": "ArcticMLPSpeculatorPreTrainedModel"}
SHAPE = ("emb_dim", "inner_dim", "vocab_size", "n_predict", "tie_weights", "scale_input")
"""Keys of a speculator's configuration that say what its tensors are."""


@block("model", "mlp-speculator")
class SpeculatorModel(HFModel):
    """A frozen base model and the speculator that is trained for it. Only the speculator is exported."""

    n_predict: int = key(3, also=("n_speculator_heads",), check=gt(0))
    """Heads: how many tokens are drafted."""
    inner_dim: int = key(4096, also=("speculator_width",), check=gt(0))
    """Width of the speculator's states."""
    tie_weights: bool = key(False, also=("speculator_tie_weights",))
    """Let the heads share embeddings, projections but the first, norms and output layers."""
    scale_input: bool = key(False, also=("speculator_scale_input",))
    """Normalize the base model's hidden state first; it helps where its scale is not near 1."""
    speculator_path: Path | None = key(None, convert=or_none(Path))
    """A speculator exported before, to go on from; its shape is taken from there."""
    export: Literal["ibm", "arctic"] = "ibm"
    """The format of the export: IBM's, or the same with the names that arctic-inference looks for."""
    top_k_tokens_per_head: list[int] | None = None
    """How many candidates each head may propose, for servers that draft trees; by default one less each head."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        if self.lora is not None:
            yield "lora", "has no place here: the speculator is trained, and nothing else"
        if self.tie_weights and self.n_predict == 1:
            yield "tie_weights", "needs more than one head"
        given = self.top_k_tokens_per_head
        if given is not None and len(given) != self.n_predict:
            yield "top_k_tokens_per_head", f"has {len(given)} entries for n_predict={self.n_predict}"

    def freeze_parameters(self, hf: Any) -> None:
        """Freeze the base model."""
        hf.requires_grad_(False)

    def wrap(self, hf: Any) -> "nn.Module":
        """Return base model and speculator (see speculator_network.py).

        Raises:
            RecipeError: the speculator to go on from was made for another base model.
        """
        from posttrain.blocks.speculator_network import MLPSpeculator, Speculating, load_speculator

        config = self.configuration_for(hf.config.get_text_config())
        if self.speculator_path is None:
            return Speculating(hf, MLPSpeculator(config))
        speculator = load_speculator(self.speculator_path)
        if problem := misfit(speculator.config, hf.config.get_text_config()):
            raise RecipeError(f"model.speculator_path: {self.speculator_path} is for another base model: {problem}")
        return Speculating(hf, speculator)

    def configuration_for(self, base: Any) -> dict[str, Any]:
        """Return the configuration of a speculator for a base model, as it is exported."""
        defaults = [self.n_predict + 1 - i for i in range(self.n_predict)]
        said = {
            "architectures": [ARCHITECTURES[self.export]],
            "model_type": "mlp_speculator",
            "base_model_name_or_path": self.name_or_path,
            "emb_dim": base.hidden_size,
            "inner_dim": self.inner_dim,
            "vocab_size": base.vocab_size,
            "n_predict": self.n_predict,
            "n_candidates": 5,
            "top_k_tokens_per_head": self.top_k_tokens_per_head or defaults,
            "tie_weights": self.tie_weights,
            "scale_input": self.scale_input,
        }
        return said | ({"base_model_archs": base.architectures or []} if self.export == "arctic" else {})


def misfit(config: dict[str, Any], base: Any) -> str | None:
    """Say how a speculator does not fit a base model, if it does not."""
    for ours, theirs in (("emb_dim", "hidden_size"), ("vocab_size", "vocab_size")):
        if config[ours] != getattr(base, theirs):
            return f"its {ours} is {config[ours]}, the model's {theirs} {getattr(base, theirs)}"
    return None


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and the shape of every tensor of a speculator; tied ones are written under every index."""
    size, inner, vocabulary = config["emb_dim"], config["inner_dim"] or config["emb_dim"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config["n_predict"]):
        shapes |= {
            f"emb.{i}.weight": (vocabulary, inner),
            f"proj.{i}.weight": (inner, inner if i else size),
            f"ln.{i}.weight": (inner,),
            f"ln.{i}.bias": (inner,),
            f"head.{i}.weight": (vocabulary, inner),
        }
    return shapes


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an exported speculator.

    Raises:
        CheckpointError: there is none, or it is not a speculator's.
    """
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not the configuration of a speculator: {error}") from None
    if config.get("model_type") != "mlp_speculator" or not set(SHAPE) <= config.keys():
        raise CheckpointError(f"{file} is not the configuration of an MLP speculator")
    return config


def validate(folder: Path, base: Any = None) -> list[str]:
    """Return everything that would keep servers from loading an exported speculator, or make them load it wrongly.

    Servers leave tensors that are missing uninitialized, without a word.

    Args:
        folder: config.json and model.safetensors.
        base: configuration of the base model, to compare with.
    """
    from safetensors import safe_open

    config, found = read_config(folder), []
    if not isinstance(config.get("architectures"), list):
        found.append("architectures is not a list")
    counts = config.get("top_k_tokens_per_head")
    if not isinstance(counts, list) or len(counts) != config["n_predict"]:
        found.append(f"top_k_tokens_per_head needs n_predict={config['n_predict']} entries, and is {counts}")
    if base is not None and (problem := misfit(config, base)):
        found.append(problem)
    expected = tensor_shapes(config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = {name.removeprefix("speculator."): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found += [f"{name} is missing" for name in expected if name not in written]
    found += [f"{name} is unknown" for name in written if name not in expected]
    both = expected.keys() & written.keys()
    found += [f"{n} has the shape {written[n]}, not {expected[n]}" for n in sorted(both) if written[n] != expected[n]]
    return found
