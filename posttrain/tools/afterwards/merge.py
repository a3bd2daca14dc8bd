"""`posttrain merge`: an adapter and its base made one model, and proof that it is the same one."""

from pathlib import Path

import attrs

from posttrain.errors import CheckpointError, RecipeError
from posttrain.tools.afterwards.closeness import Distance, distance, log_probs, texts_of
from posttrain.tools.afterwards.written import whole


@attrs.frozen
class Merged:
    """What came of a merge."""

    folder: Path
    base: str
    rows: int
    """Texts that were compared."""
    apart: Distance
    """Between the adapter on its base and the written model."""
    effect: Distance
    """Between the adapter on its base and the base alone: what the adapter does."""


def merge(name: str, folder: Path, dtype: str | None = None) -> Merged:
    """Write an adapter merged into its base, load what was written, and compare.

    Args:
        name: folder of a run with LoRA, or of an adapter.
        folder: where the model goes; must be new or empty.
        dtype: of the numbers in the files; by default that of the base.

    Raises:
        RecipeError: it is no adapter, or the folder is in use.
        CheckpointError: what was written is not the same model; it is removed again.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.blocks.models.adapters import as_trained, attach, origin
    from posttrain.blocks.models.adapters import merge as into
    from posttrain.blocks.models.exports import export_of
    from posttrain.blocks.models.model import HFModel

    place = export_of(name)
    base, adapters = origin(place)
    if not adapters:
        raise RecipeError(f"{name} has no adapter: its export, {place}, is a whole model already")
    with whole(folder) as aside:
        tokenizer = AutoTokenizer.from_pretrained(place)
        rows = texts_of(name, tokenizer)
        block = HFModel(name_or_path=base)
        hf = into(block.load(), adapters[:-1]).eval()
        as_trained(hf, adapters[-1])
        alone = log_probs(hf, rows)
        hf = attach(hf, adapters[-1]).eval()
        adapted = log_probs(hf, rows)
        hf = hf.merge_and_unload(safe_merge=True)
        wanted = dtype or block.saved_as() or "float32"
        hf.to(getattr(torch, wanted)).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        written = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32).eval()
        merged = log_probs(written, rows)
        result = Merged(folder, base, len(rows), distance(adapted, merged, rows), distance(adapted, alone, rows))
        apart, effect = result.apart, result.effect
        if not apart.difference <= max(0.1 * effect.difference, 1e-4):
            raise CheckpointError(
                f"the merged model differs from the adapter on its base by up to {apart.difference:.3g} nats (mean KL "
                f"{apart.kl:.3g}), and all that the adapter does is {effect.difference:.3g} (KL {effect.kl:.3g}): "
                f"{wanted} is too coarse for it; say --dtype float32"
            )
    return result
