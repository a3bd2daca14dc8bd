"""Adapters that training begins from: the export of a run with `model.lora`, named like a model.

`model.name_or_path: runs/sft/huggingface` then means the model as it was trained, that is, the adapter's base with the
adapter merged into it. So a run with LoRA can be the start of another, with or without a new adapter.
"""

import json
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.values import expanded, missing_folder

CONFIG = "adapter_config.json"
QUANTIZED = "quantization.json"
"""Beside an adapter that was trained on a quantized base: how it was quantized."""


def origin(name_or_path: str) -> tuple[str, list[Path]]:
    """Return the model that a name leads to, a folder or a hub name, and the adapters on top of it, lowest first.

    Raises:
        RecipeError: an adapter does not say what it belongs to, or that is not there.
    """
    name, adapters = name_or_path, list[Path]()
    while (file := expanded(name) / CONFIG).is_file() and not file.with_name("config.json").exists():
        if file.parent in adapters:
            raise RecipeError(f"model {name_or_path!r}: the adapter {file.parent} is its own base")
        adapters.insert(0, file.parent)
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        problem = "it does not say which model it belongs to" if not base else missing_folder(base)
        if problem:
            advice = f"correct base_model_name_or_path in {file}"
            raise RecipeError(f"model {name_or_path!r} is an adapter, and {problem}; {advice}")
        name = str(base)
    return name, adapters


def merge(hf: Any, adapters: list[Path]) -> Any:
    """Return a transformers model with adapters merged into its weights, one after the other.

    Raises:
        RecipeError: peft is missing, or an adapter is of a kind that cannot be merged.
    """
    for folder in adapters:
        adapted = attach(hf, folder)
        if not hasattr(adapted, "merge_and_unload"):
            kind = next(iter(adapted.peft_config.values())).peft_type
            raise RecipeError(f"model: the adapter {folder} is of type {kind}, which cannot be merged into weights")
        hf = adapted.merge_and_unload(safe_merge=True)
    return hf.requires_grad_(True)  # peft had frozen it


def attach(hf: Any, folder: Path, task: str | None = None) -> Any:
    """Return a model with the adapter of a folder on it: to be trained for a task (peft's name of it), or frozen.

    Raises:
        RecipeError: peft is missing, or the adapter does not fit.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise RecipeError(f"{folder} is an adapter, and needs peft: pip install 'posttrain[peft]'") from None
    as_trained(hf, folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.task_type = task  # a reward model may begin from an adapter of a language model
        return PeftModel.from_pretrained(hf, str(folder), config=config, is_trainable=task is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"the adapter {folder} does not fit {hf.name_or_path or 'the model'}: {error}") from error


def as_trained(hf: Any, folder: Path) -> None:
    """Give a model, in place, the weights that an adapter was trained on: those of a quantized base, if it was one.

    On others the adapter would correct errors that are not there. What is quantized already stays.
    """
    file = folder / QUANTIZED
    if file.is_file():
        from posttrain.blocks.models.quantized.quantize import round_weights

        said = json.loads(file.read_text(encoding="utf-8"))
        round_weights(hf, said["quantize"], said["double_quantization"])
