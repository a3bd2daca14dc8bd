"""The whole circle on a laptop: a model answers, its answers are checked and paired, and it learns from the pairs."""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

# ruff: noqa: E402 - the demo beside this example has the data
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "demo")]

import demo
import make_data
from own_server import served
from rich.console import Console
from rich.table import Table

import posttrain
from posttrain import cli

FOLDER = Path("runs/circle")
SFT = FOLDER / "sft" / "huggingface"
PORT = 8793
console = Console(highlight=False)


def questions(count: int, seed: int) -> None:
    """Write the demo's data, and questions with answers of which none is among the test's."""
    make_data.make(FOLDER / "data")
    held_out = {question for question, _ in test()}
    drawn = {
        make_data.question_of(chat): chat["messages"][1]["content"] for chat in make_data.chats(count, 1000 + seed)
    }
    rows = [{"prompt": q, "answer": a} for q, a in drawn.items() if q not in held_out and not q.startswith("What")]
    (FOLDER / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test() -> list[tuple[str, str]]:
    """Return the questions that are not trained on, with their answers."""
    lines = (FOLDER / "data" / "test.jsonl").read_text().splitlines()
    return [tuple(message["content"] for message in json.loads(line)["messages"]) for line in lines]


def first_model(seed: int) -> None:
    """Train the demo's model for a tenth of its time, so that it is right about half the time."""
    posttrain.load(HERE.parent / "demo" / "recipe.yaml", [
        f"model.name_or_path={FOLDER}/data/model", f"data.sources.0={FOLDER}/data/train.jsonl", "data.eval_sources=[]",
        "eval_every=null", "max_steps=80", f"output_dir={SFT.parent}", "resume=never", f"seed={seed}",
    ]).train()  # fmt: skip
    file = SFT / "generation_config.json"  # the server samples only if the model's own settings say so
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True}))


def server() -> contextlib.AbstractContextManager[None]:
    """Serve the first model by `transformers serve` until the pairs are made."""
    command = ["transformers", "serve", str(SFT), "--port", str(PORT), "--device", "cpu", "--continuous-batching"]
    command += ["--cb-max-memory-percent", "0.1"]  # by default its cache takes most of the memory that is free
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return served(
        [*command, "--log-level", "error"], f"http://127.0.0.1:{PORT}/health", FOLDER / "server.log", PATH=path,
        HF_HUB_OFFLINE="1",
    )  # fmt: skip


def accuracy(folder: Path) -> float:
    """Return the share of the test's questions that an exported model answers exactly right, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    asked, right = zip(*test(), strict=True)
    found = demo.answers(model, tokenizer, list(asked))
    return sum(a == b for a, b in zip(found, right, strict=True)) / len(right)


def main(arguments: list[str]) -> dict[str, float]:
    """Go round once, and return the accuracy after each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=42, help="of weights, questions and order (42)")
    parser.add_argument("--questions", type=int, default=1500, help="to draw; those of the test are left out (1500)")
    parser.add_argument("--online", action="store_true", help="also train on-policy (online.yaml)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of dpo.yaml, such as loss_type=sft beta=null"
    )
    given = parser.parse_args(arguments)
    os.environ.setdefault("CIRCLE_KEY", "not-needed")
    began = time.perf_counter()
    questions(given.questions, given.seed)
    first_model(given.seed)
    with server():
        run = ["synth", "run", str(HERE / "synth.yaml"), f"client.work_dir={FOLDER}/synth/{given.seed}"]
        if code := cli.main([*run, f"client.base_url=http://127.0.0.1:{PORT}/v1"]):
            sys.exit(code)
    found = {"after SFT": accuracy(SFT)}
    for name, recipe in (("after DPO", "dpo.yaml"), ("on-policy", "online.yaml"))[: 1 + given.online]:
        run_ = posttrain.load(HERE / recipe, ["resume=never", f"seed={given.seed}", *given.overrides]).train()
        found[name] = accuracy(run_.output_dir / "huggingface")
    table = Table("model", "exactly right")
    for name, share in found.items():
        table.add_row(name, f"{share:.1%}")
    console.print(table)
    console.print(f"{len(test())} questions that were in no step; {time.perf_counter() - began:.0f} s")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
