"""What data generation raises on purpose. Whatever is raised, everything that was paid for is in the ledger."""

from typing import Any

from posttrain.errors import SynthError


class TaskStopped(SynthError):
    """The whole task cannot go on now: no quota, a refused key, a bound, no server. Run it again later."""


class IncompleteTask(SynthError):
    """The task has run, but some of its requests have no result.

    Attributes:
        responses: one entry per request, in the order they were added; failed ones carry `error`.
    """

    def __init__(self, message: str, responses: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.responses = responses
