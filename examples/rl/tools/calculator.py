"""A calculator that a model may use, what an answer is worth, and products of two-digit numbers to ask for."""

import ast
import json
import operator
import random
import sys
from pathlib import Path

from posttrain import reward
from posttrain.synth import tool

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@tool
def calculator(expression: str) -> str:
    """Compute an expression of numbers with + - * / and parentheses.

    Args:
        expression: what to compute, such as "12 * (3 + 4)".
    """
    return f"{value(ast.parse(expression, mode='eval').body):g}"


def value(node: ast.expr) -> float:
    """Return what a part of an expression is worth."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("only numbers, + - * / and parentheses")


@reward("product")
def product(prompt: str, reply: str, row: dict) -> bool:
    """Whether the last turn is the product, and nothing else."""
    return reply.strip().rstrip(".") == row["answer"]


SHOWN = 2
"""Questions that are answered in front of each prompt."""
SYSTEM = "You answer with a number. You can use a calculator: write a call, and the result is told to you."


def call(a: int, b: int) -> str:
    """Return how the calculator is called."""
    arguments = {"expression": f"{a} * {b}"}
    return f"<tool_call>\n{json.dumps({'name': 'calculator', 'arguments': arguments})}\n</tool_call>"


def conversation(a: int, b: int, shown: list[tuple[int, int]]) -> list[dict]:
    """Return a question behind others that are answered with the calculator."""
    messages = [{"role": "system", "content": SYSTEM}]
    for x, y in shown:
        messages += [
            {"role": "user", "content": f"What is {x} times {y}?"}, {"role": "assistant", "content": call(x, y)},
            {"role": "tool", "content": f"{x * y}"}, {"role": "assistant", "content": f"{x * y}"},
        ]  # fmt: skip
    return [*messages, {"role": "user", "content": f"What is {a} times {b}?"}]


def make(folder: Path, test: int = 60, seed: int = 7) -> None:
    """Write `train.jsonl` and `test.jsonl`: rows with `messages` and `answer`; what is held out is never asked."""
    random_ = random.Random(seed)
    pairs = [(a, b) for a in range(12, 100) for b in range(a, 100)]
    random_.shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("test", pairs[SHOWN : test + SHOWN]), ("train", pairs[test + SHOWN :])):
        rows = [{"messages": conversation(a, b, pairs[:SHOWN]), "answer": str(a * b)} for a, b in some]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-tools/data"))
