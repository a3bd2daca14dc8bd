"""GSM8K (Cobbe et al., arXiv:2110.14168) as chats, from the files beside this repository.

They are not part of it. From OpenAI's repository `grade-school-math` they are `train.jsonl` and `test.jsonl`.
"""

import json
import sys
from pathlib import Path

SHARED = Path("../shared/data")
FOLDER = Path("runs/real/gsm8k")
TURNS = (("user", "question"), ("assistant", "answer"))


def make(train: int = 600, test: int = 16) -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    if not (SHARED / "gsm8k_train.jsonl").exists():
        sys.exit(f"{SHARED} does not hold GSM8K: {__doc__}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        lines = (SHARED / f"gsm8k_{name}.jsonl").read_text().splitlines()[:count]
        chats = [
            {"messages": [{"role": role, "content": row[column]} for role, column in TURNS]}
            for row in map(json.loads, lines)
        ]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


if __name__ == "__main__":
    make()
