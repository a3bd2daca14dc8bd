"""The files of an exported speculator: configuration, tensors, and what would keep servers from loading them."""

import json
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

ARCHITECTURES = {"ibm": "MLPSpeculatorPreTrainedModel", "arctic": "ArcticMLPSpeculatorPreTrainedModel"}
SHAPE = ("emb_dim", "inner_dim", "vocab_size", "n_predict", "tie_weights", "scale_input")
"""Keys of a speculator's configuration that say what its tensors are."""


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
