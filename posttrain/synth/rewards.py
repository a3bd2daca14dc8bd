"""What data generation knows of answers, as rewards: checks of numbers, mathematics, JSON and code, and judges."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import gt, optional

from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.images.pixels import image_as_text
from posttrain.blocks.rollouts.replies import Failure, Sample
from posttrain.blocks.rollouts.rewards import Function
from posttrain.interfaces import Scorer
from posttrain.registry import block, key, name_of
from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger.live import silent
from posttrain.synth.pipelines.images import beside
from posttrain.synth.pipelines.pipeline import Pipeline
from posttrain.synth.pipelines.report import rows_in
from posttrain.synth.pipelines.step import Asking
from posttrain.synth.steps.judge import Judge
from posttrain.synth.steps.reward import Reward
from posttrain.synth.steps.verify import Verify

if TYPE_CHECKING:
    from posttrain.run import Run


@block("reward", "verify")
class VerifyReward(Function):
    """A check of the reply against a column of the prompt's row, as by the step of the same name in data generation."""

    function: str
    """`number` (the last number is that of the column `answer`, as in GSM8K), `exact`, `math` (the same mathematics),
    `code` (Python that passes the column `tests`, in a sandbox), `json_schema`, or one of your own by
    `@verifier("name")`."""
    wanted: str | None = None
    """Column that holds the right answer (`answer` unless given), the tests (`tests`), or the schema."""
    options: dict[str, Any] = attrs.field(factory=dict)
    """Further arguments of the function: `schema`; of `code` `seconds`, `memory_mb` and `partial`."""
    seconds: float | None = key(60.0, check=optional(gt(0)))
    """How long a check may take before it counts as failed; null for as long as it likes. Code has a limit of its own
    for each test, in `options`."""

    @property
    def step(self) -> Verify:
        """The step that checks."""
        return Verify(function=self.function, wanted=self.wanted, options=self.options)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be."""
        yield from self.step.check()

    def score(self, sample: Sample, **options: Any) -> float:
        """Return 1 for a right answer and 0 for a wrong one, or what the check says."""
        return self.step.score(sample.text, sample.row)


@attrs.frozen(kw_only=True, slots=False)
class Asked(Asking):
    """A step of data generation that scores answers, as a reward.

    What is answered is kept in the ledger of the client: a run that goes on after a crash pays for nothing twice, and
    gets the same rewards.
    """

    weight: float = 1.0
    """What it is multiplied by in the sum of all rewards. 0 for one that is only looked at."""
    name: str = ""
    """What metrics call it; its type unless given."""
    into: str = "score"
    """Column of the score, in what the ledger says."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts, and a client that is missing."""
        yield from getattr(super(), "check", tuple)()
        if not isinstance(self.client, Synth):
            yield "client", "say who is asked: `client: {type: openai, ...}`, as in data generation"
        elif self.client.batched:
            yield "client", "puts requests into batches, which take hours, and each step waits for them: `mode: online`"

    def build(self, run: "Run") -> Scorer:
        """Return what scores the replies of a step together; with several ranks, each has a ledger of its own."""
        assert isinstance(self.client, Synth)
        client = attrs.evolve(self.client, work_dir=self.client.work_dir / f"rewards{run.suffix}")
        task = f"{run.output_dir.name}.{self.name or name_of(type(self))}"

        def scored(samples: list[Sample]) -> list[float | Failure]:
            found: list[float | Failure] = [Failure("its step lost it")] * len(samples)
            if not samples:
                return found
            rows = [{**as_row(sample), "number": i} for i, sample in enumerate(samples)]
            report = Pipeline([self]).run(rows, client, task, progress=silent)
            stage = report.stages[-1]
            for row, _ in rows_in(report.folder / stage.file):
                found[row["number"]] = float(row[self.into])
            if stage.dropped:
                for row, _ in rows_in(report.folder / stage.dropped_file):
                    why = row["dropped"]
                    found[row["number"]] = Failure(f"{why['reason']} ({why['detail']})")
            return found

        return scored


@block("reward", "judge")
class JudgeReward(Asked, Judge):
    """The score that models give a reply by a rubric, as by the step of the same name in data generation. What they say
    is kept in the ledger of the client: nothing is paid twice, also after a crash."""


@block("reward", "model-server")
class ModelServerReward(Asked, Reward):
    """The number that a reward model on a vLLM server (`vllm serve MODEL --runner pooling`) gives the conversation, as
    by the step `reward` of data generation: `client: {type: vllm, base_url: ..., model: ...}`. The conversation is sent
    as messages; the server renders and tokenizes it. What it says is kept in the ledger of the client."""


def as_row(sample: Sample) -> dict[str, Any]:
    """Return a reply with its prompt as a row of data generation."""
    said, messages = sample.reply.messages[:-1], with_pictures(sample)
    return {**beside(sample.row, messages), "prompt": [*messages, *said] if messages else sample.prompt,
            "response": sample.text}  # fmt: skip


def with_pictures(sample: Sample) -> list[dict[str, Any]]:
    """Return the messages of a prompt with images that can be sent: by path or address, or else the image itself."""
    pictures = iter(sample.images)

    def sent(part: dict[str, Any]) -> dict[str, Any]:
        if part.get("type") != "image":
            return part
        picture = next(pictures)
        return {"type": "image", "image": part.get("path") or part.get("url") or image_as_text(picture)}

    return [each | {"content": list(map(sent, each["content"]))} if images_of(each) else each
            for each in sample.messages]  # fmt: skip
