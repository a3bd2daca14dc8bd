"""Prefer correct solutions: a small Llama, from random weights, through SFT and DPO, measured on held-out questions."""

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import make_pairs
import score
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import posttrain
from posttrain.tools import plot

HERE = Path(__file__).parent
FOLDER = Path("runs/dpo_gsm8k")
TURNS = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
console = Console(highlight=False)


def make_model(folder: Path, texts: list[str]) -> None:
    """Write a tokenizer that is trained on `texts`, and the shape of a Llama of about 0.6 million parameters."""
    tokens = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learn = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, special_tokens=TURNS, show_progress=False)
    tokens.train_from_iterator(texts, learn)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)  # fmt: skip


def train(recipe: str, overrides: list[str]) -> posttrain.Run:
    """Do what `posttrain train RECIPE` does, again, and stop if it was interrupted."""
    console.print(f"\n[bold]{recipe}[/]")
    run = posttrain.load(HERE / recipe, ["resume=never", *overrides]).train()
    if run.status != "finished":
        sys.exit(f"stopped after {run.step} of {run.max_steps} steps: {run.stop}")
    return run


def table(title: str, columns: dict[str, dict[str, score.Estimate]]) -> Table:
    """Return estimates side by side."""
    made = Table(title, *columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for label in next(iter(columns.values())):
        made.add_row(label, *(str(found[label]) for found in columns.values()))
    return made


def main(arguments: list[str]) -> dict[str, score.Estimate]:
    """Make the pairs, train twice, compare, and return what was measured after DPO."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--solutions", type=Path, default=make_pairs.SOURCE, metavar="FILE", help="%(default)s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="sft.KEY, dpo.KEY, or KEY for both recipes")
    given = parser.parse_args(arguments)
    if not given.solutions.is_file():
        parser.error(f"{given.solutions} is not there; it is example_model_solutions.jsonl of OpenAI's GSM8K")
    began = time.perf_counter()
    for what, count in make_pairs.make(given.solutions, FOLDER / "data").items():
        console.print(f"{count:6,}  {what}")
    practice = make_pairs.read(FOLDER / "data" / "sft_train.jsonl")
    make_model(FOLDER / "model", [text for row in practice for text in row.values()])
    sft = train("sft.yaml", overrides_of("sft", given.overrides)).output_dir / "huggingface"
    run = train("recipe.yaml", [f"model.name_or_path={sft}", *overrides_of("dpo", given.overrides)])

    pairs = make_pairs.read(FOLDER / "data" / "pairs_test.jsonl")
    pairs = score.fitting(sft, pairs, run.recipe["data"]["max_length"])
    before, after = (score.log_probs(exported, pairs) for exported in (sft, run.output_dir / "huggingface"))
    columns = {
        name: score.of_model(pairs, run.recipe["beta"], before, x) for name, x in (("SFT", before), ("DPO", after))
    }
    console.print()
    console.print(table(f"{len(pairs)} held-out pairs, by plain transformers", columns))
    console.print(table("without DPO, the correct one is", {"right": score.of_rules(pairs, before)}))
    metrics = ["loss", "rewards/accuracy", "rewards/margin", "rewards/chosen"]
    plot.curves([run.output_dir], metrics, run.output_dir / "curves.png")
    console.print(f"curves  {run.output_dir / 'curves.png'}\nmodel   {run.output_dir / 'huggingface'}")
    console.print(f"time    {time.perf_counter() - began:.0f} s, of a processor {time.process_time():.0f} s")
    return columns["DPO"]


def overrides_of(step: str, overrides: list[str]) -> list[str]:
    """Return the overrides for `sft` or `dpo`: those with its name in front, and those with neither."""
    found = (override.removeprefix(f"{step}.") for override in overrides)
    return [override for override in found if not override.startswith(("sft.", "dpo."))]


if __name__ == "__main__":
    main(sys.argv[1:])
