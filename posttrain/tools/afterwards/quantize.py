"""`posttrain quantize`: a model with weights of 4 or 8 bits, and how far it is from the one that was trained."""

from pathlib import Path

import attrs

from posttrain.blocks.models.quantized.aware import QAT
from posttrain.errors import CheckpointError, RecipeError
from posttrain.tools.afterwards.closeness import Distance, distance, log_probs, texts_of
from posttrain.tools.afterwards.written import whole

CLOSE = {False: 1e-5, True: 1e-2}
"""Mean KL in nats below which a model that was trained to be quantized counts as the same; in half precision: True."""


@attrs.frozen
class Quantized:
    """What came of it."""

    folder: Path
    qat: QAT
    """How it was quantized."""
    trained: bool
    """Whether the model was trained for that."""
    rows: int
    """Texts that were compared."""
    apart: Distance
    """Between the model that was given and the one that was written."""
    bytes: tuple[int, int]
    """Of the files: before, and now."""


def quantize(name: str, folder: Path, qat: QAT | None = None, dtype: str | None = None) -> Quantized:
    """Quantize the linear layers of a model with torchao, write it, load what was written, and compare.

    Args:
        name: folder of a run, or a model. Of one that was trained with `model.qat`, it is compared with what was
            trained, which had these numbers in its products; of others, with the model in full precision.
        folder: where the quantized model goes; must be new or empty.
        qat: how; by default as it was trained for.
        dtype: of everything that is not quantized; by default as in the files.

    Raises:
        RecipeError: it is no whole model, was trained for other numbers, or the folder is in use.
        CheckpointError: a model that was trained for these numbers says something else; what was written is removed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    from posttrain.blocks.models.adapters import origin
    from posttrain.blocks.models.exports import export_of, qat_of
    from posttrain.blocks.models.model import HFModel

    place = export_of(name)
    if origin(place)[1]:
        raise RecipeError(f"{name} is an adapter: make one model of it first (posttrain merge)")
    config = HFModel(name_or_path=place).read_config()
    if getattr(config, "quantization_config", None):
        raise RecipeError(f"{name} is quantized already: name what it was made of")
    trained = qat_of(place)
    if trained and qat not in (None, trained):
        raise RecipeError(f"{name} was trained for {trained}: leave the options out")
    chosen = trained or qat
    if chosen is None:
        raise RecipeError(f"{name} was not trained to be quantized (model.qat): say how, as in --weights int4")
    with whole(folder) as aside:
        tokenizer = AutoTokenizer.from_pretrained(place)
        rows = texts_of(name, tokenizer)
        hf = HFModel(name_or_path=place).load().eval()
        wanted = getattr(torch, dtype) if dtype else config.dtype or torch.float32
        linear = {layer for layer, module in hf.named_modules() if isinstance(module, torch.nn.Linear)}
        left = sorted(linear - chosen.chosen(hf).keys())
        if trained:
            chosen.prepare(hf)
        given = log_probs(hf, rows)
        del hf
        how = TorchAoConfig(chosen.config(), modules_to_not_convert=left or None)
        made = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, quantization_config=how)
        made.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        del made
        written = AutoModelForCausalLM.from_pretrained(aside, dtype=wanted).eval()
        apart = distance(given, log_probs(written, rows), rows)
        sizes = size_of(Path(place)), size_of(aside)
        result = Quantized(folder, chosen, trained is not None, len(rows), apart, sizes)
        if trained and not apart.kl <= CLOSE[wanted != torch.float32]:
            raise CheckpointError(
                f"the quantized model differs from what was trained by {apart.kl:.3g} nats (mean KL, at most "
                f"{CLOSE[wanted != torch.float32]:g} was expected): it was not written"
            )
    return result


def size_of(folder: Path) -> int:
    """Return the bytes of a model's weights in files; 0 if they lie elsewhere."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
