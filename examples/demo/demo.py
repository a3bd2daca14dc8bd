"""See a model learn: from random weights to right answers in about two minutes on two cores."""

import json
import sys
import time
from pathlib import Path

import make_data
from rich.console import Console
from rich.table import Table

import posttrain
from posttrain import plot

FOLDER = Path("runs/demo")
RECIPE = Path(__file__).parent / "recipe.yaml"
console = Console()


def answers(model, tokenizer, questions: list[str]) -> list[str]:
    """Return the model's greedy reply to each question."""
    tokenizer.padding_side = "left"
    found = []
    for begin in range(0, len(questions), 100):
        chats = [[{"role": "user", "content": question}] for question in questions[begin : begin + 100]]
        prompt = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        replies = model.generate(**prompt, max_new_tokens=10, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(replies, skip_special_tokens=True)
    return found


def main(overrides: list[str]) -> None:
    """Make the data, train, and compare before and after."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (FOLDER / "data" / "test.jsonl").exists():
        make_data.make(FOLDER / "data")
    tests = [json.loads(line)["messages"] for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    questions, expected = [chat[0]["content"] for chat in tests], [chat[1]["content"] for chat in tests]
    before: list[str] = []

    @posttrain.before("trainer.fit")
    def look(trainer):
        before.extend(answers(trainer.run.model.module, trainer.run.tokenizer, questions))

    trainer = posttrain.load(RECIPE, ["resume=never", *overrides])
    began = time.perf_counter()
    run = trainer.train(callbacks=[look])
    seconds = time.perf_counter() - began

    exported = run.output_dir / "huggingface"  # plain transformers from here on
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    after = answers(model, tokenizer, questions)
    table = Table("a question it has not seen", "before", "after", "right answer")
    for question, old, new, right in list(zip(questions, before, after, expected, strict=True))[:8]:
        table.add_row(question, repr(old[:6]), f"[{'green' if new == right else 'red'}]{new}[/]", right)
    share = [sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected) for found in (before, after)]
    table.add_section()
    table.add_row("[bold]exactly right", f"[bold]{share[0]:.1%}", f"[bold]{share[1]:.1%}", f"of {len(expected)}")
    console.print(table)
    plot.curves([run.output_dir], None, run.output_dir / "curves.png")
    console.print(f"trained in {seconds:.0f} s", highlight=False)
    for what, where in (
        ("the curves", run.output_dir / "curves.png"),
        ("the model, for transformers and vLLM", exported),
        ("TensorBoard", f"tensorboard --logdir {run.output_dir / 'tensorboard'}"),
    ):
        console.print(f"{what}: {where}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
