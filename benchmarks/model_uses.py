"""What a model type can be used for: its twin, a plan, SwiftKV and a speculator, each tried, for models.py.

`twin` are the checks of `posttrain check --twin` that need one process: documents packed as each alone, a step as its
micro-batches, an export as what was trained. A plan is of the twin. A speculator's training is tried packed and alone, too.
"""

import contextlib
import copy
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import AutoConfig

import posttrain
from posttrain.blocks.models.documents.tiny import shrunk, tiny, ways
from posttrain.errors import RecipeError
from posttrain.tools.plan import estimate
from posttrain.tools.twin import proofs
from posttrain.tools.twin.twin import Twin, quietly

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tokens import ASK, CHATML, byte_tokenizer

CHECKS = {
    "sft": (proofs.packing, proofs.cuts, proofs.export),
    "swiftkv": (proofs.packing, proofs.cuts),
    "spec-decode": (proofs.packing,),
}
BLOCKS = {"swiftkv": {"type": "swiftkv"}, "spec-decode": {"type": "mlp-speculator", "inner_dim": 32, "n_predict": 2}}
VOCABULARY = 512
NOTHING = {"layers": False, "width": False, "experts": False}
"""What is made less of a type's default configuration, but for its vocabulary: the twin does the rest."""


@attrs.define
class Uses:
    """What was found: `yes`, or why not."""

    twin: str = ""
    plan: str = ""
    swiftkv: str = ""
    speculator: str = ""

    @classmethod
    def of(cls, kind: str, changes: dict[str, Any]) -> "Uses":
        """Try them all."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            place = Path(folder)
            byte_tokenizer(CHATML + ASK).save_pretrained(place / "tokenizer")
            rows = [{"prompt": "add " * i, "response": "1 2 3 4 5 6 7 8 9 "[: 4 * i]} for i in range(1, 9)]
            (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            config = AutoConfig.for_model(kind, **copy.deepcopy(changes))
            with contextlib.suppress(ValueError):  # some cannot have fewer tokens
                config = shrunk(config, NOTHING, False, VOCABULARY, None)
            config.save_pretrained(place / "default")
            for method in ("sft", "swiftkv"):
                (place / method).mkdir()
            twin, swiftkv, speculator = (proven(place, method) for method in CHECKS)
            return cls(twin, planned(place), swiftkv, speculator)


def refusal(kind: str, default: Any) -> str | None:
    """Return why a network of a type, which computes nothing of tokens alone, is not even built; None if it is."""
    config, empty = default, True  # of which one is built that takes no memory
    with contextlib.suppress(Exception):  # every architecture has rules of its own
        config = shrunk(default, next(ways()), True, 97, 8)
        config, empty = tiny(default, vocabulary=97, window=8), False
    with tempfile.TemporaryDirectory() as folder, torch.device("meta" if empty else "cpu"):
        config.save_pretrained(folder)
        try:
            posttrain.HFModel(name_or_path=folder, random_init=True).make(empty)
        except RecipeError as error:
            return str(error).replace(folder, kind)
    return None


def recipe(place: Path, method: str) -> dict[str, Any]:
    """Return a recipe that trains a type by a method."""
    model = {"name_or_path": str(place / "default"), "random_init": True, **BLOCKS.get(method, {})}
    return {
        "type": method, "model": model,
        "tokenizer": {"name_or_path": str(place / "tokenizer")}, "output_dir": str(place / "run"), "max_steps": 1,
        "data": {"sources": [str(place / "rows.jsonl")], "max_length": 128}, "accelerator": "cpu",
    }  # fmt: skip


def proven(place: Path, method: str) -> str:
    """Say whether checks of a method pass on the twin of a type, or which does not."""
    file = place / f"{method}.yaml"
    file.write_text(json.dumps(recipe(place, method)))
    try:
        with quietly():  # one folder for both, whose model is then tried once
            twin = Twin(file, [], place / method.replace("spec-decode", "sft"))
            found = [proofs.result(check, twin) for check in CHECKS[method]]
    except Exception as error:
        return said(error)
    failed = [f"{result.name}: {result.figure}" for result in found if result.passed is False]
    if failed:
        return "no" if any("SwiftKV knows" in each for each in failed) else short(failed[0])
    return "yes" if found[0].passed else short(f"{found[0].name}: {found[0].figure}")


def planned(place: Path) -> str:
    """Say whether a plan can be made."""
    try:
        made = posttrain.SFTTrainer(
            model=posttrain.HFModel(name_or_path=str(place / "sft" / "model"), random_init=True),
            data=posttrain.SFTData(sources=[posttrain.Source(name_or_path=str(place / "rows.jsonl"))], max_length=128),
            tokenizer=posttrain.HFTokenizer(name_or_path=str(place / "tokenizer")), accelerator="cuda", devices=1,
        )  # fmt: skip
        return "yes" if estimate(made, 1).total else "nothing is counted"
    except Exception as error:
        return said(error)


def said(error: Exception) -> str:
    """Return an error in a few words."""
    return short(str(error) if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}")


def short(text: str) -> str:
    """Return the beginning of a text, in one line."""
    text = re.sub(r"\S*\.yaml:\d+: |model\.name_or_path: |\(/\S*/(?=\w+\.py:)", "", text)
    return " ".join(text.split())[:110].replace("|", "/")


def main() -> None:
    """Try some types, and print."""
    for kind in sys.argv[1:]:
        sys.stdout.write(f"{kind} {Uses.of(kind, {})}\n")


if __name__ == "__main__":
    main()
