"""What a group's shared prompt costs in a GRPO update: computed once, or once per reply as in a padded batch.

    python benchmarks/grpo_step.py [--prompt 2048] [--reply 500] [--replies 8] [--model FOLDER] [--rounds 3]

One prompt, so many replies of half that length to the full one; forward and backward of posttrain's loss (dapo, without
a reference), and of TRL's `GRPOTrainer` on the same rollouts if it is installed. CPU seconds, one thread, float32; the
candidates take turns, and the table gives medians. Gradients are compared with those of the padded form.
"""

import argparse
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from sft_step import config

LOSS: dict[str, Any] = {"clip_low": None, "clip_high": None}


def network(folder: str | None) -> Any:
    """Return the small Llama of sft_step.py, or a model in a folder, as posttrain computes it."""
    from lightning.fabric import Fabric
    from transformers import LlamaForCausalLM

    from posttrain import HFModel

    with TemporaryDirectory() as scratch:
        if folder is None:
            torch.manual_seed(0)
            LlamaForCausalLM(config("tiny")).save_pretrained(scratch)
        return HFModel(name_or_path=folder or scratch).build(Fabric(accelerator="cpu", devices=1))


def group(vocabulary: int, prompt: int, reply: int, replies: int) -> Any:
    """Return a prompt with replies of random tokens, of random worth."""
    from posttrain.blocks.rollouts.replies import Group, Reply

    random = np.random.default_rng(0)
    lengths = random.integers(reply // 2, reply + 1, replies)
    said = [Reply(random.integers(3, vocabulary, n).tolist(), [0.0] * int(n), True) for n in lengths]
    gains = random.normal(size=replies).tolist()
    ids = random.integers(3, vocabulary, prompt).tolist()
    return Group(0, ids, {}, [], said, rewards=gains, advantages=gains)


def ours(net: Any, batch: Any) -> torch.Tensor:
    """Return the loss of posttrain."""
    from posttrain.blocks.losses import policy  # noqa: F401 - registers the losses
    from posttrain.blocks.losses.surrogate import Replies, Surrogate

    new, _ = net(batch, "policy")
    losses = Surrogate("dapo", LOSS)(
        new, new.detach(), batch["advantages"], Replies(batch["document"], batch["lengths"], 1)
    )
    return losses.sum() / batch.supervised_tokens


def trl_trainer(net: Any, folder: str) -> Any:
    """Return TRL's trainer for the same model; the tokenizer is never asked."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    made = GRPOTrainer(
        model=net.base, reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(output_dir=folder, loss_type="dapo", epsilon_high=0.28, beta=0.0, num_generations=8, bf16=False,
                        per_device_train_batch_size=8, report_to="none", use_cpu=True, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>"),
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1
    return made


def theirs(trainer: Any, one: Any) -> torch.Tensor:
    """Return the loss of TRL."""
    width = max(len(reply.ids) for reply in one.replies)
    ids, mask = torch.zeros(2, len(one.replies), width, dtype=torch.long)
    for i, reply in enumerate(one.replies):
        ids[i, : len(reply.ids)], mask[i, : len(reply.ids)] = torch.tensor(reply.ids), 1
    prompts = torch.tensor([one.prompt] * len(one.replies))
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(one.advantages), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss: torch.Tensor = trainer._compute_loss(trainer.model, inputs)
    return loss


def main() -> None:
    """Measure, and print a table."""
    from importlib.util import find_spec

    from posttrain.blocks.rollouts.groups import batch_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("prompt", 2048), ("reply", 500), ("replies", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--model", metavar="FOLDER", help="a model instead of the small Llama")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    net = network(given.model and str(Path(given.model)))
    one = group(net.vocabulary, given.prompt, given.reply, given.replies)
    batches = {
        name: batch_of([one], None, packing=shared, mask_truncated=False)
        for name, shared in (("padded", False), ("shared prompt", True))
    }
    computed = {
        "padded": batches["padded"].input_ids.numel(),
        "shared prompt": net.layout(batches["shared prompt"]).input_ids.numel(),
    }
    candidates: dict[str, Any] = {name: partial(ours, net, batch) for name, batch in batches.items()}
    if find_spec("trl"):
        candidates["TRL"], computed["TRL"] = partial(theirs, trl_trainer(net, mkdtemp()), one), computed["padded"]
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(given.rounds):
        for name, loss in candidates.items():
            net.zero_grad()
            began = time.process_time()
            loss().backward()
            seconds[name].append(time.process_time() - began)
            gradients[name] = torch.cat([p.grad.flatten() for p in net.parameters()])
    print(f"\n{given.replies} replies of {given.reply // 2} to {given.reply} tokens to a prompt of {given.prompt}")
    print("| | tokens computed | CPU s | padded / it | gradient, relative difference |\n|---|---|---|---|---|")
    base = statistics.median(seconds["padded"])
    for name, found in seconds.items():
        apart = float((gradients[name] - gradients["padded"]).norm() / gradients["padded"].norm())
        middle = statistics.median(found)
        print(f"| {name} | {computed[name]:,} | {middle:.2f} | {base / middle:.2f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
