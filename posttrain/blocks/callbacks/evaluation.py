"""Callbacks that act on what an evaluation found, or evaluate by sampling."""

import json
from typing import Any, Literal

from attrs.validators import gt

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
