"""`posttrain check --twin`: what a run relies on, tried out on its twin (see twin.py), with a figure for each.

Each check is a function from the twin to a figure; it fails by raising `Failed`, which says what to look at.
"""

import json
import math
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

import posttrain
from posttrain import hooks
from posttrain.blocks.checkpoints.checkpoint import HuggingFace
from posttrain.blocks.models.adapters import attach, origin
from posttrain.blocks.models.exports import open_model
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.rollouts.gap import GAP
from posttrain.errors import PosttrainError, RecipeError
from posttrain.tools.twin.masks import masks, overflow
from posttrain.tools.twin.twin import CLOSE, LONGEST, Failed, NoRows, Skipped, Step, Twin, quietly
from posttrain.trainers.dpo import DPOTrainer
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.words import counted

if TYPE_CHECKING:
    from rich.table import Table


@attrs.frozen
class Result:
    """What a check found."""

    name: str
    passed: bool | None
    """None if it does not apply."""
    figure: str
    """What was measured, or why it failed or does not apply."""


# -- checks ---------------------------------------------------------------------------


def hooked(twin: Twin) -> str:
    """Every method that a callback wraps is there."""
    with hooks.bound(twin.real, twin.real.callbacks):
        return f"every method that is wrapped exists; {counted(len(twin.real.callbacks), 'callback')}"


def packing(twin: Twin) -> str:
    """Documents that share a row do not see each other: loss and gradient are those of each alone."""
    if not twin.rows or not twin.data.packing:
        raise Skipped("data.packing is false, or not known of this data block")
    together = sum(row.length for row in twin.sample(4)) + 4
    if together > 4 * LONGEST:
        raise Skipped(f"the shortest rows are too long for a quick look ({counted(together, 'token')})")
    rows = twin.sampled(4, max_length=together).build(twin.tokenizer, 1, 0, 1, twin.real.seed).train.rows(1)
    if rows != 1:
        raise Skipped(f"four documents make {counted(rows or 0, 'row')}")
    packed = twin.one_step("packed", rows=1, packing=True, max_length=together)
    hint = "does the model or loss() look across documents, or count rows in place of batch['weight']?"
    same = _same(twin, packed, f"packed differs from alone: {hint}")
    return f"four documents in a row count as each alone: {same}"


def cuts(twin: Twin) -> str:
    """A step is the same in one micro-batch, two or four."""
    hint = "loss() must return a mean over what batch['weight'] counts, by which micro-batches are added up"
    two, four = twin.one_step("2x2", rows=2, parts=2), twin.one_step("1x4", rows=1, parts=4)
    found = _same(twin, two, f"2x2: {hint}"), _same(twin, four, f"1x4: {hint}")
    return f"a step in micro-batches 4x1 = 2x2 ({found[0]}) = 1x4 ({found[1]})"


def ranks(twin: Twin) -> str:
    """A step is the same on two ranks."""
    from safetensors.torch import load_file

    _ = twin.whole  # first: the processes use the model and the sample that it writes
    done = _child(twin, "ranks")
    if done.returncode:
        raise Failed(f"two processes failed: {_last_line(done.stderr)}")
    made = load_file(twin.folder / "two.safetensors")
    hint = "does loss() use anything but its own batch, or a method depend on the rank?"
    two = Step(float(made["loss"]), made["gradient"], {})
    return "a step on two ranks is the same: " + _same(twin, two, f"two ranks: {hint}")


def resume(twin: Twin) -> str:
    """After kill -9, a run goes on as if nothing had happened, to the last bit."""
    import torch

    whole = twin.resumable("whole").train()
    done = _child(twin, "killed")
    if done.returncode != -9:
        raise Failed(f"the run that was to be killed ended by itself: {_last_line(done.stderr)}")
    cut = twin.resumable("cut").train()
    hint = "does a block or callback keep a state of its own? run.memory is kept in checkpoints"
    if not 0 < cut.first_step < 6:
        raise Failed(f"it began at step {cut.first_step}, not at a checkpoint")
    if whole.last["loss"] != cut.last["loss"]:
        raise Failed(f"the last loss is {whole.last['loss']!r} in one go and {cut.last['loss']!r} resumed: {hint}")
    pairs = zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise Failed(f"weights differ: {hint}")
    return f"killed in step 5, went on from {cut.first_step}: loss and weights equal, bit by bit"


def first_loss(twin: Twin) -> str:
    """The policy begins as its reference: margins of 0, and a DPO loss of ln 2; and as what samples."""
    trainer = twin.real
    if isinstance(trainer, GRPOTrainer):
        return _on_policy(twin.whole.metrics, trainer.updates, CLOSE[twin.precision])
    if not isinstance(trainer, DPOTrainer) or not trainer.objective.needs_reference or trainer.reference is not None:
        raise Skipped("only where the reference is the model itself")
    step = twin.whole
    margin = step.metrics["rewards/margin"]
    if abs(margin) > CLOSE[twin.precision]:
        raise Failed(f"the margin of the first step is {margin:g}: policy and reference compute different things")
    if trainer.objective.weights == {"sigmoid": 1.0} and type(trainer).loss is DPOTrainer.loss:
        if not math.isclose(step.loss, math.log(2), rel_tol=CLOSE[twin.precision]):
            raise Failed(f"the first loss is {step.loss:.6f}, not ln 2 = 0.693147")
        return f"margin {margin:g}, loss {step.loss:.6f}"
    return f"margin {margin:g}"


def _on_policy(metrics: dict[str, float], updates: int, close: float) -> str:
    """Return how far sampler, trainer and reference are apart in the first step."""
    moved, gap, kl = (metrics.get(name, 0.0) for name in ("policy/moved", GAP, "kl"))
    if gap > 1e-4:
        raise Failed(f"sampler and trainer give a token log-probabilities that differ by {gap:.3g} on average")
    if updates == 1 and max(moved, abs(kl)) > close:
        raise Failed(f"before the first update, ratios are {moved:.3g} from 1 and the divergence is {kl:.3g}")
    return f"sampler and trainer within {gap:.0e} nats; ratios {moved:g} from 1, divergence {abs(kl):g}"


def export(twin: Twin) -> str:
    """What is exported loads in transformers and computes the same."""
    import torch
    import transformers

    model = twin.real.model
    if not any(isinstance(block, HuggingFace) for block in twin.real.checkpoint):
        raise Skipped("the recipe exports nothing")
    if not isinstance(model, HFModel) or (model.lora and model.random_init):
        raise Skipped("what is exported does not stand alone")
    folder = twin.folder / "exported"
    run = twin.make("export", data=twin.sampled(4), micro_batch_size=4, gradient_accumulation_steps=1,
                    checkpoint=[HuggingFace(output_dir=folder)], precision="32-true").train()  # fmt: skip
    kind = json.loads((folder / "config.json").read_text())["model_type"] if not model.lora else None
    if kind is not None and kind not in transformers.CONFIG_MAPPING:
        raise Skipped(f"{kind} is no model of transformers")
    ids = torch.arange(3, 35)[None] % run.model.module.vocabulary  # type: ignore[operator]
    with torch.no_grad():
        ours = run.model.module.hf.eval()(input_ids=ids, use_cache=False).logits.float()  # type: ignore[union-attr]
        if model.quantize:  # its adapters belong to a base that was rounded
            loaded = attach(HFModel(name_or_path=origin(str(folder))[0]).load(), folder)
        elif model.qat:
            loaded = open_model(str(folder), "cpu").hf
        else:
            loaded = model.auto_class(run.model.module.base.config).from_pretrained(folder)  # type: ignore[union-attr]
        theirs = loaded.eval()(input_ids=ids, use_cache=False).logits.float()
    difference = float((ours - theirs).abs().max())
    if difference > 1e-4:
        raise Failed(
            f"logits differ by {difference:.3g} from those of the model that was trained: does the model block change "
            "the network in a way that its configuration and weights do not tell?"
        )
    return f"loads in transformers; its logits differ by {difference:.1g} at most"


def memory(twin: Twin) -> str:
    """Memory of a device at full size, estimated."""
    from posttrain.tools.plan import estimate, gib

    real = twin.real
    world = (real.devices if isinstance(real.devices, int) else 1) * real.num_nodes
    try:
        found = estimate(real, world)
    except RecipeError as error:
        raise Skipped(str(error)) from None
    return f"{gib(found.total)} GiB on each of {world}; {found.trained:,} parameters are trained"


CHECKS: list[Callable[[Twin], str]] = [
    hooked, masks, overflow, packing, cuts, ranks, resume, first_loss, export, memory
]  # fmt: skip


# -- running them ---------------------------------------------------------------------


def prove(path: Path, overrides: list[str], checks: list[Callable[[Twin], str]] = CHECKS) -> Iterator[Result]:
    """Yield the result of every check of a recipe, as they are done."""
    with tempfile.TemporaryDirectory(prefix="posttrain-twin-") as folder, quietly():
        twin = Twin(path, overrides, Path(folder))
        for check in checks:
            yield (found := result(check, twin))
            if check is hooked and not found.passed:
                return  # nothing would run


def result(check: Callable[[Twin], str], twin: Twin) -> Result:
    """Run one check."""
    name = check.__name__.replace("_", " ")
    try:
        return Result(name, True, check(twin))
    except Skipped as skipped:
        return Result(name, None, str(skipped))
    except NoRows as error:
        return Result(name, False if check is masks else None, str(error))
    except (Failed, PosttrainError) as failed:
        return Result(name, False, textwrap.shorten(str(failed), 400))
    except Exception as error:  # a user's loss may raise anything
        first_line = (str(error).splitlines() or [""])[0]
        return Result(name, False, f"{type(error).__name__}: {first_line} ({_place(error)})")


def _place(error: Exception) -> str:
    """Return the innermost line of the user's own code that an error passed through, or else the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (str(Path(posttrain.__file__).parent), "site-packages", str(Path(traceback.__file__).parent))
    own = [frame for frame in frames if not any(part in frame.filename for part in installed)]
    found = (own or frames)[-1]
    return f"{found.filename}:{found.lineno}"


def table(results: list[Result]) -> "Table":
    """Return the results for a terminal."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "", "found"):
        made.add_column(name)
    words = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]n/a[/]"}
    for result in results:
        made.add_row(result.name, words[result.passed], result.figure.replace("[", r"\["))
    return made


# -- helpers --------------------------------------------------------------------------


def _same(twin: Twin, other: Step, hint: str) -> str:
    """Return how far a step is from the one in one micro-batch, relative to that.

    Raises:
        Failed: too far.
        Skipped: it would be so if both were cut alike.
    """
    one = twin.whole
    size = float(one.gradient.norm())
    if size == 0:
        raise Failed("the gradient is 0: nothing would be learned")
    gradient = float((one.gradient - other.gradient).norm()) / size
    loss = abs(one.loss - other.loss) / max(abs(one.loss), size, 1e-12)  # on-policy, a loss is 0 whatever is learned
    if max(gradient, loss) > CLOSE[twin.precision]:
        if twin.draws:
            raise Skipped("the network draws at random while it trains (a router?): no two steps of it are alike")
        raise Failed(f"loss {one.loss:.6f} and {other.loss:.6f}, gradients differ by {gradient:.1%}; {hint}")
    return f"gradients within {gradient:.0e}"


def _child(twin: Twin, part: str) -> "subprocess.CompletedProcess[str]":
    module = "posttrain.tools.twin.processes"
    command = [sys.executable, "-m", module, part, str(twin.path), str(twin.folder), *twin.overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _last_line(text: str) -> str:
    """Return the line of a process's messages that says why it failed."""
    lines = [line for line in text.strip().splitlines() if "Error" in line or "was killed" in line]
    return lines[-1].removeprefix("error: ").partition("; the same command")[0] if lines else text.strip()[-300:]
