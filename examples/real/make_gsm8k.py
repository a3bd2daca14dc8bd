"""GSM8K (Cobbe et al., arXiv:2110.14168) as chats and as pairs, from the files beside this repository.

They are not part of it. From OpenAI's repository `grade-school-math` they are `train.jsonl`, `test.jsonl` and
`example_model_solutions.jsonl`.
"""

import json
import sys
from pathlib import Path

SHARED = Path("../shared/data")
FOLDER = Path("runs/real/gsm8k")
TURNS = (("user", "question"), ("assistant", "answer"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dpo_gsm8k"))
import make_pairs  # noqa: E402


def make(train: int = 600, test: int = 16, pairs: int = 40) -> None:
    """Write `train.jsonl`, `test.jsonl`, and the first `pairs` of `pairs_train.jsonl` and `pairs_test.jsonl`."""
    if not (SHARED / "gsm8k_train.jsonl").exists():
        sys.exit(f"{SHARED} does not hold GSM8K: {__doc__}")
    make_pairs.make(SHARED / "gsm8k_model_solutions.jsonl", FOLDER)
    for name, count in (("pairs_train", pairs), ("pairs_test", pairs)):
        file = FOLDER / f"{name}.jsonl"
        seen: dict[str, str] = {}
        for line in file.read_text().splitlines():
            seen.setdefault(json.loads(line)["prompt"], line)  # one pair of each question
        file.write_text("\n".join(list(seen.values())[:count]) + "\n")
    for name, count in (("train", train), ("test", test)):
        lines = (SHARED / f"gsm8k_{name}.jsonl").read_text().splitlines()[:count]
        chats = [
            {"messages": [{"role": role, "content": row[column]} for role, column in TURNS]}
            for row in map(json.loads, lines)
        ]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


if __name__ == "__main__":
    make()
