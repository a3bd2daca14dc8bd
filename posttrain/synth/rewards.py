"""What data generation knows of right answers, as rewards: numbers, mathematics, JSON, code that passes its tests."""

from collections.abc import Iterator
from typing import Any

import attrs
from attrs.validators import gt, optional

from posttrain.blocks.rollouts.replies import Sample
from posttrain.blocks.rollouts.rewards import Function
from posttrain.registry import block, key
from posttrain.synth.steps.verify import Verify


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
