"""Configurations of transformers with a recipe's changes: each of them takes effect, or is refused.

transformers itself keeps quiet about a key that it does not know, and since its version 5 about `rope_theta` too, which
lies in `rope_parameters` now.
"""

from collections.abc import Iterator
from typing import Any

from posttrain.errors import RecipeError
from posttrain.registry import suggest

ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def changed(name_or_path: str, changes: dict[str, Any], hub: dict[str, Any]) -> Any:
    """Return the configuration in a folder or on the hub, with changes.

    Raises:
        RecipeError: it has no such keys.
    """
    from transformers import AutoConfig

    rope = {key: changes[key] for key in ROPE if key in changes}
    rest = {key: value for key, value in changes.items() if key not in rope}
    config, unused = AutoConfig.from_pretrained(name_or_path, **rest, **hub, return_unused_kwargs=True)
    refuse(config, [key for key in unused if key not in hub and not hasattr(config, key)])
    refuse(config, list(_unknown_below(config, rest)))
    if rope:
        turn(config, rope)
    return config


def made(changes: dict[str, Any]) -> Any:
    """Return a configuration made of nothing but what a recipe says.

    Raises:
        RecipeError: its kind of model has no such keys.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**changes)
    plain = type(config)()
    rotated = isinstance(getattr(plain.get_text_config(), "rope_parameters", None), dict)
    allowed = ROPE if rotated else ()
    refuse(plain, [key for key in changes if key not in allowed and not hasattr(plain, key)])
    refuse(plain, list(_unknown_below(plain, changes)))
    return config


def turn(config: Any, rope: dict[str, Any]) -> None:
    """Change how positions are rotated; what a recipe does not say stays as the model has it.

    Raises:
        RecipeError: the model rotates nothing, or each type of layer in its own way.
    """
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if not found:
        refuse(config, list(rope))
    by_layer = any(isinstance(value, dict) for value in found.values())
    if by_layer and set(rope) != {"rope_parameters"}:
        raise RecipeError(
            f"model.config: {type(config).__name__} rotates each type of layer in its own way: write "
            f"rope_parameters: {{{next(iter(found))}: {{rope_theta: ...}}}}"
        )
    if by_layer:
        config.rope_parameters = {kind: {**old, **rope["rope_parameters"].get(kind, {})} for kind, old in found.items()}
        refuse(config, [f"rope_parameters.{kind}" for kind in rope["rope_parameters"].keys() - found.keys()])
        return
    scaling = rope.get("rope_scaling", {})
    if scaling is None:  # plain rotation
        found, scaling = {"rope_theta": found.get("rope_theta")}, {"rope_type": "default"}
    if "type" in scaling:
        scaling = {"rope_type": scaling["type"], **{key: value for key, value in scaling.items() if key != "type"}}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    config.rope_parameters = {**found, **scaling, **(rope.get("rope_parameters") or {}), **theta}


def refuse(config: Any, unknown: list[str]) -> None:
    """Refuse keys that would change nothing.

    Raises:
        RecipeError: there are some.
    """
    lines, text = [], config.get_text_config()
    for key in unknown:
        known = [name for name in config.to_dict() if not name.startswith("_")]
        below = text is not config and hasattr(text, key)
        hint = f"; write text_config: {{{key}: ...}}" if below else suggest(key, known)
        lines.append(f"model.config: {type(config).__name__} has no key {key!r}, so that it would change nothing{hint}")
    if lines:
        raise RecipeError("\n".join(lines))


def _unknown_below(config: Any, changes: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of nested configurations that they do not have."""
    for name in config.sub_configs:
        below = changes.get(name)
        if isinstance(below, dict):
            plain = type(getattr(config, name))()
            yield from (f"{name}.{key}" for key in below if key not in ROPE and not hasattr(plain, key))
