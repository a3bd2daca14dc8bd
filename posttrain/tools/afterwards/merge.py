"""`posttrain merge`: an adapter and its base made one model, and proof that it is the same one."""

from itertools import islice
from pathlib import Path
from typing import Any

import attrs

from posttrain.errors import CheckpointError, RecipeError


@attrs.frozen
class Merged:
    """What came of a merge."""

    folder: Path
    base: str
    rows: int
    """Texts that were compared."""
    difference: float
    """Largest difference of a log-probability between the adapter on its base and the written model, in nats."""
    effect: float
    """Largest difference between the adapter on its base and the base alone: what the adapter does."""


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
    import shutil

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
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty: name another with -o")
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = _rows(name, tokenizer)
    block = HFModel(name_or_path=base)
    hf = into(block.load(), adapters[:-1]).eval()
    as_trained(hf, adapters[-1])
    alone = [_log_probs(hf, ids) for ids in rows]
    hf = attach(hf, adapters[-1]).eval()
    adapted = [_log_probs(hf, ids) for ids in rows]
    hf = hf.merge_and_unload(safe_merge=True)
    wanted = dtype or block.saved_as() or "float32"
    aside = folder.with_name(f"{folder.name}.tmp")
    hf.to(getattr(torch, wanted)).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    written = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32).eval()
    merged = [_log_probs(written, ids) for ids in rows]
    result = Merged(folder, base, len(rows), _furthest(adapted, merged), _furthest(adapted, alone))
    if not result.difference <= max(0.1 * result.effect, 1e-4):
        shutil.rmtree(aside)
        raise CheckpointError(
            f"the merged model differs from the adapter on its base by up to {result.difference:.3g} nats, and all "
            f"that the adapter does is {result.effect:.3g}: {wanted} is too coarse for it; say --dtype float32"
        )
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)
    return result


def _log_probs(hf: Any, ids: list[int]) -> Any:
    """Return the log-probability of each token of a text but the first, float32 [n - 1]."""
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        return hf(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def _furthest(first: list[Any], second: list[Any]) -> float:
    return max((float((a - b).abs().max()) for a, b in zip(first, second, strict=True)), default=float("nan"))


def _rows(name: str, tokenizer: Any, count: int = 8) -> list[list[int]]:
    """Return tokens to compare models on: the first rows of a run's data (held-out ones if it has a file of such), or
    where there are none, tokens drawn at random."""
    import random

    from posttrain.recipes.load import load

    recipe = Path(name) / "recipe.yaml"
    if not recipe.is_file():
        draw = random.Random(0)
        return [[draw.randrange(len(tokenizer)) for _ in range(64)] for _ in range(count)]
    data: Any = load(recipe).data
    held = attrs.evolve(data, sources=data.eval_sources) if getattr(data, "eval_sources", []) else data
    texts = ["".join(text for text, _, _ in shown.tokens) for shown in islice(held.preview(tokenizer, count), count)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
