"""Callback blocks that ship with posttrain."""

import json
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs.validators import and_ as both
from attrs.validators import ge, gt, lt

from posttrain.errors import RecipeError
from posttrain.hooks import after, before
from posttrain.registry import block, key


@block("callback", "early-stop")
class EarlyStop:
    """End the run when an evaluated metric has stopped falling."""

    metric: str = "eval_loss"
    """What to watch: `eval_loss`, or `eval_` and the name of anything that the loss logs."""
    patience: int = key(3, check=gt(0))
    """How many evaluations in a row may pass without a new lowest value."""

    @after("trainer.evaluate")
    def look(self, trainer: Any, found: dict[str, float]) -> None:
        """Compare with the lowest value so far."""
        if self.metric not in found:
            raise RecipeError(f"callbacks: early-stop watches {self.metric!r}, but there is only {', '.join(found)}")
        memory, value = trainer.run.memory, found[self.metric]
        lowest = memory.get("early-stop lowest", float("inf"))
        memory["early-stop lowest"] = min(lowest, value)
        memory["early-stop waited"] = 0 if value < lowest else memory.get("early-stop waited", 0) + 1
        if memory["early-stop waited"] >= self.patience:
            trainer.run.stop = f"{self.metric} has not fallen below {lowest:.4f} for {self.patience} evaluations"


@block("callback", "keep-best")
class KeepBest:
    """Export the model whenever an evaluated metric has a new best value, into `huggingface-best`."""

    metric: str = "eval_loss"
    """What to compare: `eval_loss`, or `eval_` and the name of anything that the loss logs."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest value is the best, or the highest."""

    @after("trainer.evaluate")
    def look(self, trainer: Any, found: dict[str, float]) -> None:
        """Export if there is nothing better so far.

        Raises:
            RecipeError: nothing of that name is evaluated.
        """
        from posttrain.blocks.checkpoints.checkpoint import HuggingFace

        if self.metric not in found:
            raise RecipeError(f"callbacks: keep-best compares {self.metric!r}, but there is only {', '.join(found)}")
        run, value = trainer.run, found[self.metric]
        best = run.memory.get("keep-best")
        if best is not None and not (value < best if self.mode == "min" else value > best):
            return
        run.memory["keep-best"] = value
        folder = run.output_dir / "huggingface-best"
        with run.unmeasured("saving"):
            HuggingFace(output_dir=folder).export(run, folder)
        run.fabric.print(f"step {run.step}  best {self.metric} so far, {value:.4f}: exported to {folder}")


@block("callback", "ema")
class EMA:
    """Keep an exponential moving average of the weights, and export it beside the model, in `huggingface-ema`."""

    decay: float = key(0.999, check=both(ge(0), lt(1)))
    """How much of the average stays at each step: 0.999 looks back over about a thousand."""

    @after("trainer.setup")
    def keep(self, trainer: Any, run: Any) -> None:
        """Make room, in float32, for what a checkpoint may fill."""
        for shard in run.strategy.shards(run):
            run.tensors[f"ema/{shard.name}"] = shard.like(shard.values.detach().float().clone())

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Begin with the weights as they are, unless the average goes on."""
        if not trainer.run.memory.get("ema"):
            for shard, average in self.pairs(trainer.run):
                average.copy_(shard)
            trainer.run.memory["ema"] = True

    @after("trainer.count")
    def follow(self, trainer: Any, _: None) -> None:
        """Move towards the weights after a step."""
        for shard, average in self.pairs(trainer.run):
            average.lerp_(shard.float(), 1 - self.decay)

    @before("trainer.save")
    def export(self, trainer: Any, at_end: bool) -> None:
        """Export the average when the run is finished; meanwhile the network has its weights."""
        from posttrain.blocks.checkpoints.checkpoint import HuggingFace

        run = trainer.run
        if at_end and run.status == "finished":
            kept = [shard.clone() for shard, _ in self.pairs(run)]
            self.put(run, [average for _, average in self.pairs(run)])
            try:
                HuggingFace(output_dir=run.output_dir / "huggingface-ema").save(run, at_end=True)
            finally:
                self.put(run, kept)

    def pairs(self, run: Any) -> list[tuple[Any, Any]]:
        """Return this rank's part of each trained parameter, and its average: [n] each."""
        return [(s.values.detach(), run.tensors[f"ema/{s.name}"].values) for s in run.strategy.shards(run)]

    def put(self, run: Any, values: list[Any]) -> None:
        """Give the network other weights."""
        for (shard, _), value in zip(self.pairs(run), values, strict=True):
            shard.copy_(value)
        run.strategy.restored(run)


@block("callback", "neftune", also=("neft",))
class NEFTune:
    """Add noise to embeddings while training (Jain et al., arXiv:2310.05914): uniform within alpha / sqrt(L d), for a
    document of L tokens and embeddings of size d. Each document of a packed row counts its own tokens."""

    alpha: float = key(5.0, also=("neftune_noise_alpha",), check=gt(0))
    """How much; the paper tries 5, 10 and 15."""
    _undo: list[Any] = attrs.field(factory=list, init=False, eq=False, repr=False)

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Hook the embeddings.

        Raises:
            RecipeError: the network has none that are known, or ranks share rows.
        """
        network, seen = trainer.run.model.module, dict[str, Any]()
        if not hasattr(network, "running") or trainer.sequence is not None:
            raise RecipeError("callbacks: neftune needs a network of ours, and rows that are whole (no sequence)")
        running = network.running

        def noted(layout: Any) -> Any:
            seen["layout"] = layout
            return running(layout)

        def noise(module: Any, _: Any, output: Any) -> Any:
            return output + self.noise(output, seen["layout"]) if module.training else output

        network.running = noted
        handle = network.base.get_input_embeddings().register_forward_hook(noise)
        self._undo.extend((handle.remove, lambda: vars(network).pop("running")))

    @after("trainer.fit")
    def end(self, trainer: Any, result: Any) -> None:
        """Leave the network as it was."""
        while self._undo:
            self._undo.pop()()

    def noise(self, output: Any, layout: Any) -> Any:
        """Return what is added to embeddings [rows, width, size]."""
        import torch

        queries, size = layout.cu_seqlens.diff(), output.shape[-1]
        keys = queries if layout.cu_seqlens_k is None else layout.cu_seqlens_k.diff()  # with what branches begin with
        lengths = keys.repeat_interleave(queries).to(output.dtype)
        if lengths.numel() != output[..., 0].numel():  # a document in a row of its own
            lengths = output.new_tensor(float(output.shape[-2])).expand(output.shape[:-1])
        bound = self.alpha / (lengths.view(*output.shape[:-1], 1) * size).sqrt()
        return torch.empty_like(output).uniform_(-1, 1) * bound


@block("callback", "samples")
class Samples:
    """Print what the model replies to some prompts, before training and at every evaluation.

    `samples.jsonl` in the run's folder keeps it.
    """

    prompts: list[str]
    """The user's turns."""
    max_new_tokens: int = key(64, check=gt(0))
    """How long a reply may become."""

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Reply before the first step; what was said after the checkpoint that a run goes on from is said again."""
        from posttrain.blocks.loggers.console import forget_after

        if trainer.run.fabric.is_global_zero:
            forget_after(trainer.run.output_dir / "samples.jsonl", trainer.run.step - 1)
        self.reply(trainer)

    @after("trainer.evaluate")
    def again(self, trainer: Any, found: dict[str, float]) -> None:
        """Reply with what was learned so far."""
        self.reply(trainer)

    def reply(self, trainer: Any) -> None:
        """Generate greedily, one prompt at a time, and print on rank zero; a sharded model takes all ranks."""
        run = trainer.run
        for prompt in self.prompts:
            chat = [{"role": "user", "content": prompt}]
            asked = run.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(run.fabric.device)
            ids = run.model.module.generate(**asked, max_new_tokens=self.max_new_tokens, do_sample=False)
            said = run.tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            run.fabric.print(f"step {run.step}  {prompt!r} -> {said!r}")
            if run.fabric.is_global_zero:
                with (run.output_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": run.step, "prompt": prompt, "reply": said}) + "\n")


@block("callback", "profiler")
class Profiler:
    """Record where the time of some steps goes, in `profile` of the run's folder.

    `trace-rank-N.json` opens in https://ui.perfetto.dev; `operators.txt` is rank zero's table, the slowest first.
    Recording slows the steps down.
    """

    skip: int = key(5, check=ge(1))
    """Steps to let pass; the first ones warm up kernels and memory. One more warms up the profiler."""
    steps: int = key(3, check=gt(0))
    """Steps to record."""
    ranks: list[int] = attrs.field(factory=lambda: [0])
    """Ranks that record."""
    memory: bool = False
    """Record allocations too."""
    stacks: bool = False
    """Record the lines of Python that called."""
    _running: list[Any] = attrs.field(factory=list, init=False, eq=False, repr=False)

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Begin to count steps.

        Raises:
            RecipeError: the run ends before the recording would.
        """
        from torch.profiler import profile, schedule

        run, last = trainer.run, self.skip + 1 + self.steps
        if run.step + last > run.max_steps:
            raise RecipeError(
                f"callbacks: profiler: the run ends after step {run.max_steps}, but from step {run.step} on it takes "
                f"{last} steps to pass {self.skip}, warm up in one and record {self.steps}"
            )
        if run.fabric.global_rank in self.ranks:
            folder, rank = run.output_dir / "profile", run.fabric.global_rank
            profiler = profile(
                schedule=schedule(wait=self.skip, warmup=1, active=self.steps, repeat=1),
                on_trace_ready=lambda profiler: self.write(profiler, folder, rank),
                profile_memory=self.memory, with_stack=self.stacks,
            )  # fmt: skip
            profiler.start()
            self._running.append(profiler)

    @before("trainer.save")
    def step(self, trainer: Any, at_end: bool) -> None:
        """Take note of a step that is over, before checkpoints are written."""
        if self._running and at_end:
            self._running.pop().stop()
        elif self._running:
            self._running[0].step()

    def write(self, profiler: Any, folder: Path, rank: int) -> None:
        """Write what was recorded."""
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-rank-{rank}.json"))
        if rank == 0:
            average = profiler.key_averages()
            kind = "device" if any(event.self_device_time_total for event in average) else "cpu"
            (folder / "operators.txt").write_text(average.table(sort_by=f"self_{kind}_time_total", row_limit=40))
