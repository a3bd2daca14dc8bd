"""Right answers: rows to answer, and the callback that counts right replies while a model learns."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attrs.validators import gt

from posttrain.blocks.data.rows.schemas import CHATS, REPLIES, Refused, conversation
from posttrain.blocks.data.sources import Source
from posttrain.blocks.rollouts.prompts import asked as asked_of
from posttrain.errors import DataError, RecipeError
from posttrain.hooks import after, before
from posttrain.registry import block, key
from posttrain.synth.steps.verify import Verify

if TYPE_CHECKING:
    from posttrain.run import Run
    from posttrain.synth.clients.client import Synth
    from posttrain.synth.pipelines.report import Report

ID = "row"
"""Column that numbers the rows, so that two models can be compared on the same ones."""


@block("callback", "right-answers")
class RightAnswers:
    """Have the model answer held-out rows at every evaluation, and log the share of right replies as `eval_right`.

    `keep-best` (`mode: max`) and `early-stop` can watch it if they stand behind it in `callbacks`.
    """

    source: Source
    """Chats that end with the right reply."""
    check_by: str = "exact"
    """`exact`, `number`, `math`, `code`, `json_schema`, or a verifier of your own (see the step `verify`)."""
    wanted: str | None = None
    """Another column that holds the right answer, the tests or the schema."""
    rows: int = key(100, check=gt(0))
    """Only the first so many."""
    max_new_tokens: int = key(256, check=gt(0))
    """Of each reply, which is the likeliest one."""
    batch_size: int = key(32, check=gt(0))
    """Prompts that are answered together."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what the check cannot be."""
        for _, message in Verify(function=self.check_by, wanted=self.wanted).check():
            yield "check_by", message

    @before("trainer.fit")
    def begin(self, trainer: Any) -> None:
        """See whether the model can answer.

        Raises:
            RecipeError: it is spread over devices.
        """
        if trainer.strategy.shards_parameters:
            raise RecipeError(
                "callbacks: right-answers: the whole model must be on a device to answer, and this strategy shards it: "
                "use ddp, or `posttrain eval` afterwards"
            )

    @after("trainer.evaluate")
    def look(self, trainer: Any, found: dict[str, float]) -> None:
        """Answer on rank zero, and tell the others."""
        run = trainer.run
        with run.unmeasured("answering"):
            value = run.fabric.broadcast(self.share(run) if run.fabric.is_global_zero else 0.0)
        found["eval_right"] = value
        run.metrics.note(run.step, {"eval_right": value})

    def share(self, run: "Run") -> float:
        """Return the mean score of the model's replies; they stay in `answers` of the run's folder.

        Raises:
            RecipeError: no reply could be checked.
        """
        from posttrain.synth.clients.transformers import TransformersSynth
        from posttrain.synth.ledger.live import silent
        from posttrain.synth.pipelines.refresh import fingerprint

        network: Any = run.model.module.hf
        client = TransformersSynth(
            loaded=(network, run.tokenizer), weights=f"step-{run.step}-{fingerprint(network)}",
            work_dir=run.output_dir / "answers", batch_size=self.batch_size,  # type: ignore[call-arg]  # of the base
        )  # fmt: skip
        checks = Verify(function=self.check_by, wanted=self.wanted)
        rows = list(asked(self.source, self.rows, None, self.wanted))
        report = answer(
            rows, client, checks, self.max_new_tokens, f"step-{run.step}", retry_failed=True, progress=silent
        )
        scores = [float(row["score"]) for row in report.rows()]
        if not scores:
            raise RecipeError(f"callbacks: right-answers: no reply was checked: {report.stages[-1].dropped}")
        return sum(scores) / len(scores)


def answer(
    rows: list[dict[str, Any]], client: "Synth", checks: Verify, max_new_tokens: int, task: str, **options: Any
) -> "Report":
    """Have a client answer rows with the likeliest replies, check them, and return the report.

    Args:
        rows: of `asked`.
        client: whose model answers.
        checks: what a right reply is.
        max_new_tokens: of each reply.
        task: name of the work in the client's ledger.
        options: of `Pipeline.run`.
    """
    from posttrain.synth.pipelines.pipeline import Pipeline
    from posttrain.synth.steps.generate import Generate

    asks = Generate(body={"temperature": 0, "max_tokens": max_new_tokens})  # type: ignore[call-arg]  # of the base
    return Pipeline([asks, checks]).run(rows, client, task, **options)


def asked(source: Source, rows: int | None, system: str | None, wanted: str | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source: number, conversation to answer (`prompt`), right answer, and their other columns.

    Raises:
        RecipeError: a row has no answer to compare with, or there are no rows.
    """
    number = -1
    for number, row in enumerate(row for row, _ in source.read(source.open())):
        if number == rows:
            break
        try:
            prompt, answer = question(row.values)
        except (Refused, DataError) as error:
            raise RecipeError(f"{row.place}: {error}") from error
        if answer is None and wanted is None:
            raise RecipeError(
                f"{row.place}: no reply at the end to compare with: say by --wanted in which column it is"
            )
        if system is not None:
            prompt = [{"role": "system", "content": system}, *prompt]
        taken = {*CHATS, *REPLIES, *(name for replies in REPLIES.values() for name in replies), ID, "score", "model"}
        kept = {name: value for name, value in row.values.items() if name not in taken or name == wanted}
        yield {"answer": answer, **kept, ID: number, "prompt": prompt}
    if number < 0:
        raise RecipeError(f"{source.label} holds no rows")


def question(row: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Return the messages to answer, and the right answer: the reply at the end, or the column `answer`, or None.

    Raises:
        Refused: the row asks nothing.
        DataError: it fits no schema.
    """
    try:
        *before, last = conversation(row)["messages"]
    except Refused:  # a prompt without a reply, as for reinforcement learning
        return asked_of(row)["messages"], row.get("answer")
    return (before, last["content"]) if last["role"] == "assistant" else ([*before, last], row.get("answer"))
