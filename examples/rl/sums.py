"""Sums of two-digit numbers, as plain text behind two examples; none that is held out is ever asked, nor mirrored."""

import json
import random
from pathlib import Path

EXAMPLES = "34+12=46\n50+21=71\n"
SHOWN = {frozenset((34, 12)), frozenset((50, 21))}


def make(folder: Path, test: int = 200, seed: int = 7) -> None:
    """Write `train.jsonl` and `test.jsonl`: rows with `prompt` and `answer`."""
    random_ = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100) if frozenset((a, b)) not in SHOWN]
    random_.shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "test.jsonl", [pair[:: random_.choice((1, -1))] for pair in pairs[:test]])
    train = [pair for a, b in pairs[test:] for pair in {(a, b), (b, a)}]
    random_.shuffle(train)
    write(folder / "train.jsonl", train)


def write(file: Path, pairs: list[tuple[int, int]]) -> None:
    """Write one row for each sum."""
    rows = [{"prompt": f"{EXAMPLES}{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
