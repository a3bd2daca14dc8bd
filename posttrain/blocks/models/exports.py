"""Trained models, opened to be used: what a run has exported, any model of transformers, adapters and speculators."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.models.adapters import CONFIG, QUANTIZED
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.models.quantized.aware import QAT
from posttrain.errors import RecipeError
from posttrain.runtime.folder import recipe_of
from posttrain.values import expanded, missing_folder, similar_folder

if TYPE_CHECKING:
    from posttrain.blocks.models.speculator.network import MLPSpeculator

log = logging.getLogger("posttrain")
SPECULATOR = "mlp_speculator"


@attrs.frozen
class Opened:
    """A model that is ready to answer."""

    name: str
    hf: Any
    """Of transformers, in evaluation mode."""
    tokenizer: Any
    speculator: "MLPSpeculator | None" = None
    """Drafts for it, if it was opened by the folder of a speculator."""

    @property
    def ends(self) -> set[int]:
        """The tokens that end a reply."""
        return ends_of(self.hf, self.tokenizer)

    def __str__(self) -> str:
        size = sum(parameter.numel() for parameter in self.hf.parameters())
        first = next(self.hf.parameters())
        kind = f"{type(self.hf).__name__}, {size / 1e6:,.0f} million parameters"
        drafts = ", with a speculator" if self.speculator else ""
        return f"{self.name}: {kind}{drafts}, {str(first.dtype).removeprefix('torch.')} on {first.device.type}"


def export_of(name: str) -> str:
    """Return the folder of the model that a run has exported; any other name is returned as it is.

    Args:
        name: folder of a run or of a model, or a hub name.

    Raises:
        RecipeError: there is no such folder, or the run has exported nothing yet.
    """
    if problem := missing_folder(name):
        raise RecipeError(problem)
    run = expanded(name)
    if not run.exists() and (hint := similar_folder(name)):
        log.warning("there is no folder %s here, so it is looked for on the hub%s", name, hint)
    if not (run / "recipe.yaml").is_file() or _is_model(run):
        return name
    blocks = [block for block in recipe_of(run).get("checkpoint", []) if block.get("type") == "huggingface"]
    folder = Path((blocks[0].get("output_dir") if blocks else None) or run / "huggingface")
    if _is_model(folder):
        return str(folder)
    if steps := sorted(found for found in folder.glob("step-*") if _is_model(found)):
        log.info("%s is not finished: this is its export of %s", name, steps[-1].name)
        return str(steps[-1])
    raise RecipeError(
        f"{name} has exported no model yet: a run does so at its end, and before that if its checkpoint block of type "
        "huggingface says `every`; the command that started it goes on with it"
    )


def open_model(name: str, device: str = "auto") -> Opened:
    """Return a model and its tokenizer, ready to answer.

    Args:
        name: folder of a run, of a model, of an adapter (merged into its base) or of a speculator (which drafts for its
            base); or a hub name.
        device: `cpu`, `cuda`, `mps`, or `auto` for what there is.

    Raises:
        RecipeError: it cannot be loaded, or gives scores instead of text.
    """
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import posttrain.blocks.models.swiftkv.modeling  # noqa: F401 - registers the configurations with transformers

    if not sys.stderr.isatty():
        disable_progress_bar()
    place, speculator = export_of(name), None
    said = _config(place)
    if said.get("model_type") == SPECULATOR:
        from posttrain.blocks.models.speculator.network import load_speculator

        speculator, tokenizer_of = load_speculator(Path(place)), place
        place = said["base_model_name_or_path"]
    else:
        tokenizer_of = place
    if any("SequenceClassification" in kind for kind in said.get("architectures") or []):
        raise RecipeError(f"{name} is a reward model: it gives a conversation a score, and no text")
    device = chosen(device)
    hf = HFModel(name_or_path=place, dtype="bfloat16" if device == "cuda" else "float32").load()
    if (qat := qat_of(place)) is not None:  # as it was trained
        qat.prepare(hf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the tokenizer of {name} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    hf = hf.eval().requires_grad_(False).to(device)
    return Opened(name, hf, tokenizer, speculator.eval().to(device, hf.dtype) if speculator else None)


def qat_of(place: str) -> QAT | None:
    """Return how an exported model was trained to be quantized; None if it was not."""
    file = expanded(place) / QUANTIZED
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return QAT(**said["qat"]) if "qat" in said else None


def chosen(device: str) -> str:
    """Return a device by its name, or for `auto` the best that there is."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def ends_of(hf: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a reply: the model's, the tokenizer's, and what its chat template writes after one."""
    said = hf.generation_config.eos_token_id
    listed = said if isinstance(said, list) else [said]
    return {token for token in [*listed, tokenizer.eos_token_id, end_of_turn(tokenizer)] if token is not None}


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that a chat template writes behind a reply; None if there is none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "<<reply>>"}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    behind = tokenizer(text.rpartition("<<reply>>")[2], add_special_tokens=False)["input_ids"]
    return behind[0] if behind and behind[0] in tokenizer.all_special_ids else None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", CONFIG))


def _config(place: str) -> dict[str, Any]:
    """Return the configuration in a local folder, as it stands there; nothing of an adapter or a hub model."""
    file = expanded(place) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
