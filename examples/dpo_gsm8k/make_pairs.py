"""Make preference pairs from GSM8K model solutions: a correct and a wrong solution to the same question.

Each line of the input holds a question and what four models answered, each with `is_correct`. A fifth of the questions
is held out before anything else happens, so that no question is both trained on and evaluated on.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

SOURCE = Path("../shared/data/gsm8k_model_solutions.jsonl")
FOLDER = Path("runs/dpo_gsm8k/data")
MODELS = ("6b_finetuning", "175b_finetuning", "6b_verification", "175b_verification")
"""Those who answered, from the one that is right least often to the one that is right most often."""
HELD_OUT = range(20)
"""Which hundredths of the questions."""


def is_held_out(question: str) -> bool:
    """Whether a question is kept for evaluation: decided by its text alone, whatever else is in the file."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 100 in HELD_OUT


def answers(row: dict, counts: Counter) -> tuple[dict[str, str], dict[str, str]]:
    """Return the correct and the wrong solutions to a question, each text once, with the model that wrote it."""
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for model in MODELS:
        text, correct = row[model]["solution"].strip(), row[model]["is_correct"]
        counts["solutions"] += 1
        counts["solutions left out: another model wrote the same"] += text in found[0] or text in found[1]
        found[not correct].setdefault(text, model)
    return found


def make(source: Path = SOURCE, folder: Path = FOLDER) -> Counter:
    """Write `pairs_train.jsonl`, `pairs_test.jsonl` and `sft_train.jsonl`, and return what was counted.

    Every correct solution is paired with every wrong one to the same question: at most four pairs. The SFT file holds
    the correct solutions to all questions that are not held out.

    Args:
        source: OpenAI's `example_model_solutions.jsonl` of GSM8K.
        folder: made if it is not there.
    """
    counts: Counter = Counter()
    files: dict[str, list[dict]] = {"pairs_train": [], "pairs_test": [], "sft_train": []}
    for row in map(json.loads, source.read_text().splitlines()):
        question, split = row["question"], "test" if is_held_out(row["question"]) else "train"
        correct, wrong = answers(row, counts)
        counts["questions"] += 1
        counts["questions without pairs: no solution is correct"] += not correct
        counts["questions without pairs: no solution is wrong"] += not wrong
        counts[f"questions in pairs_{split}.jsonl"] += bool(correct and wrong)
        files[f"pairs_{split}"] += [
            {"prompt": question, "chosen": ours, "rejected": theirs, "chosen_by": by, "rejected_by": other}
            for ours, by in correct.items()
            for theirs, other in wrong.items()
        ]
        if split == "train":
            files["sft_train"] += [{"prompt": question, "response": text} for text in correct]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts[f"rows in {name}.jsonl"] = len(rows)
    return counts


def read(file: Path) -> list[dict]:
    """Return the rows of a file that `make` wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    for what, count in make(*map(Path, sys.argv[1:])).items():
        print(f"{count:6,}  {what}")
