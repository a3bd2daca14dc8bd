"""How well a trained speculator drafts: acceptance per head and tokens per pass, on prompts of a file."""

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from posttrain.blocks.models.speculator.model import SpeculatorModel
from posttrain.errors import RecipeError
from posttrain.recipes import load as recipe
from posttrain.tools.afterwards.chat import asked

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.blocks.models.speculator.speculate import Drafts


@attrs.frozen
class Acceptance:
    """What was measured."""

    drafts: "Drafts"
    prompts: int

    @property
    def rates(self) -> list[float]:
        """For each head, how often its token was right, with all before it."""
        return [count / max(1, self.drafts.steps) for count in self.drafts.accepted]

    def table(self) -> "Table":
        """Return it for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("head", justify="right")
        table.add_column("accepted", justify="right")
        table.add_column("", no_wrap=True)
        for head, rate in enumerate(self.rates, start=1):
            table.add_row(str(head), f"{rate:.1%}", "█" * round(30 * rate))
        return table

    @property
    def summary(self) -> str:
        """What it comes to, in a line."""
        steps, tokens = self.drafts.steps, self.drafts.tokens
        return (
            f"{self.drafts.tokens_per_step:.2f} tokens per pass of the base model "
            f"({tokens:,} tokens in {steps:,} passes, {self.prompts} prompts)"
        )

    def draw(self, target: Path) -> None:
        """Draw it into a picture."""
        from posttrain.tools.plot import bars

        labels = [f"head {head}" for head in range(1, len(self.rates) + 1)]
        title = f"Drafts accepted: {self.drafts.tokens_per_step:.2f} tokens per pass"
        bars(labels, self.rates, title, target)


def measure(run: Path, prompts: Path, max_new_tokens: int, count: int | None = None) -> Acceptance:
    """Generate greedily with the speculator of a run.

    Args:
        run: its folder, with recipe.yaml and the export.
        prompts: rows as any source of chats has them; what the user says first is the prompt.
        max_new_tokens: of each reply.
        count: drafts in a pass; as many as there are heads by default.

    Raises:
        RecipeError: the run trained no speculator, or there are fewer heads.
    """
    from posttrain.blocks.models.speculator.network import load_speculator
    from posttrain.blocks.models.speculator.speculate import Drafts, speculate

    trainer = recipe.load(run / "recipe.yaml")
    if not isinstance(trainer.model, SpeculatorModel):
        raise RecipeError(f"{run} trained {type(trainer.model).__name__}, not a speculator")
    speculator = load_speculator(run / "huggingface").eval()
    hf = trainer.model.load().eval()
    tokenizer = trainer.tokenizer.build(trainer.model)
    heads = speculator.config["n_predict"]
    total, prompted = Drafts([0] * (count or heads)), 0
    for messages in asked(prompts):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]  # fmt: skip
        _, drafts = speculate(hf, speculator, ids, max_new_tokens, count)
        total.add(drafts)
        prompted += 1
    return Acceptance(total, prompted)
