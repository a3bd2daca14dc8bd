"""Near-duplicate search: recall on planted near-duplicates, what is found wrongly, and documents per second.

`python benchmarks/dedup.py [--documents 20000] [--words 100]`: one core. A tenth of the documents are copies of
earlier ones in which each word is another one with a probability of 2 %.
"""

import argparse
import os
import random
import time

os.environ["OMP_NUM_THREADS"] = "1"

from posttrain.synth import Dedup, Drop


def planted(documents: int, words: int, noise: float, seed: int) -> list[dict]:
    """Return rows with a column `response`, and `of`: the number of the document that it is a noisy copy of."""
    chance = random.Random(seed)
    known = [f"{chance.getrandbits(24):x}" for _ in range(20_000)]
    originals = [chance.choices(known, k=words) for _ in range(documents - documents // 10)]
    rows = [{"response": " ".join(document), "of": None} for document in originals]
    for _ in range(documents // 10):
        number = chance.randrange(len(originals))
        copy = [chance.choice(known) if chance.random() < noise else word for word in originals[number]]
        rows.append({"response": " ".join(copy), "of": number})
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    print("| noise | method | documents/s (CPU) | recall | wrongly dropped |\n|---|---|---|---|---|")
    for noise, step in ((0.02, Dedup()), (0.04, Dedup()), (0.02, Dedup(threshold=0.8)), (0.0, Dedup(method="exact"))):
        rows = planted(given.documents, given.words, noise, seed=0)
        seconds = []
        for _ in range(given.repeat):
            began = time.process_time()
            dropped = [made.row for made in step.table(rows) if isinstance(made, Drop)]
            seconds.append(time.process_time() - began)
        copies = sum(row["of"] is not None for row in rows)
        found = sum(row["of"] is not None for row in dropped)
        name = step.method if step.method == "exact" else f"{step.method}, threshold {step.threshold:g}"
        rate = len(rows) / sorted(seconds)[len(seconds) // 2]
        print(f"| {noise:.0%} | {name} | {rate:,.0f} | {found / copies:.1%} | {len(dropped) - found} |")


if __name__ == "__main__":
    main()
