"""See a model learn: from random weights to right answers in under three minutes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import make_data
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import posttrain
from posttrain.tools import plot

FOLDER = Path("runs/demo")
RECIPE = Path(__file__).parent / "recipe.yaml"
console = Console(highlight=False)


def answers(model, tokenizer, questions: list[str], max_new_tokens: int = 10) -> list[str]:
    """Return the model's greedy reply to each question."""
    tokenizer.padding_side = "left"
    found = []
    for begin in range(0, len(questions), 100):
        chats = [[{"role": "user", "content": question}] for question in questions[begin : begin + 100]]
        prompt = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        prompt = prompt.to(next(model.parameters()).device)
        replies = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[
            :, prompt["input_ids"].shape[1] :
        ]
        found += tokenizer.batch_decode(replies, skip_special_tokens=True)
    return found


def comparison(questions: list[str], before: list[str], after: list[str], right: list[str]) -> Table:
    """Return some answers before and after, and the share of all that are exactly right."""
    table = Table("a question it has not seen", "before", "after", "right answer", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = list(zip(questions, before, after, right, strict=True))
    for question, old, new, wanted in rows[:9]:
        color = "green" if new == wanted else "red"
        table.add_row(question, Text(printable(old), "dim"), Text(printable(new), color), wanted)
    table.add_section()
    table.add_row("[bold]exactly right")
    for label, found in groups(rows):
        shares = [sum(row[i] == row[3] for row in found) / len(found) for i in (1, 2)]
        table.add_row(label, f"{shares[0]:.1%}", f"{shares[1]:.1%}", f"of {len(found)}")
    return table


def groups(rows: list[tuple[str, ...]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yield the rows of each skill under its question, then all of them."""
    for skill in make_data.SKILLS:
        begin, end = skill.split("{}")
        yield f"{begin}...{end.rstrip('.?')}", [row for row in rows if row[0].startswith(begin)]
    yield "[bold]all[/]", rows


def printable(reply: str) -> str:
    """Return a reply as one line; random weights say anything."""
    return "".join(letter if letter.isprintable() else "·" for letter in reply.replace("\n", "↵"))


def main(overrides: list[str]) -> None:
    """Make the data, train, and compare before and after."""
    import transformers

    if not (FOLDER / "data" / "model").exists():
        make_data.make(FOLDER / "data")
    tests = [json.loads(line)["messages"] for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    questions, right = [chat[0]["content"] for chat in tests], [chat[1]["content"] for chat in tests]
    before: list[str] = []

    @posttrain.after("trainer.setup")
    def look(trainer, run):
        before.extend(answers(run.model.module, run.tokenizer, questions))
        console.print("[bold]before training[/], from random weights:")
        for question, reply in list(zip(questions, before, strict=True))[:3]:
            console.print(f"  {question}  [dim]->[/]  ", Text(printable(reply), "red"), sep="")

    trainer = posttrain.load(RECIPE, ["resume=never", *overrides])  # a command line would be `posttrain train RECIPE`
    began = time.perf_counter()
    run = trainer.train(callbacks=[look])
    seconds = time.perf_counter() - began
    if run.status != "finished":
        sys.exit(f"stopped after {run.step} of {run.max_steps} steps: {run.stop}")

    transformers.utils.logging.disable_progress_bar()
    exported = run.output_dir / "huggingface"  # plain transformers from here on
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    console.print("[bold]after training[/], through plain transformers:")
    console.print(comparison(questions, before, answers(model, tokenizer, questions), right))
    plot.curves([run.output_dir], None, run.output_dir / "curves.png")
    places = Table.grid(padding=(0, 2))
    places.add_row("trained in", f"{seconds:.0f} s")
    places.add_row("curves", str(run.output_dir / "curves.png"))
    places.add_row("model", str(exported))
    places.add_row("TensorBoard", f"tensorboard --logdir {run.output_dir / 'tensorboard'}")
    places.add_row("recipe", os.path.relpath(RECIPE))
    console.print(places)


if __name__ == "__main__":
    main(sys.argv[1:])
