"""Exceptions that a user can act on. Everything else is a bug in posttrain.

PosttrainError
├── RecipeError      the YAML (or an override) does not describe a run
├── RegistryError    a block could not be registered or found
├── HookError        a callback names a method that is not there, or misuses it
├── DataError        a source, a row or a template cannot be turned into training data
├── CheckpointError  a checkpoint cannot be written, read or continued
├── SynthError       data generation cannot go on
└── TrainingError    the run itself cannot go on

The command line prints their messages without a traceback.
"""


class PosttrainError(Exception):
    """Base class of every error raised on purpose."""


class RecipeError(PosttrainError):
    """The recipe is wrong. The message lists every problem found, each with its line."""


class RegistryError(PosttrainError):
    """A block could not be registered or found."""


class HookError(PosttrainError):
    """A callback points at a method that cannot be wrapped, or returns what cannot be used."""


class DataError(PosttrainError):
    """A source, a row or a chat template cannot be turned into training data."""


class CheckpointError(PosttrainError):
    """A checkpoint cannot be written, read, or continued by this recipe."""


class SynthError(PosttrainError):
    """Data generation cannot go on; what was paid for is kept."""


class TrainingError(PosttrainError):
    """The run cannot go on: no supervised tokens in a step, a non-finite loss, a missing option.

    Attributes:
        step: the optimizer step that is to blame, where it is not the one in hand.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step
