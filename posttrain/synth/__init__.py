"""Data generation that loses nothing and pays once. See `posttrain.synth.ledger` for how.

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.synth.cortex import CortexSynth
    from posttrain.synth.errors import IncompleteTask, TaskStopped
    from posttrain.synth.openai import AzureOpenAISynth, OpenAISynth
    from posttrain.synth.pricing import Price
    from posttrain.synth.vllm import VllmSynth

_HOME_OF = {
    "AzureOpenAISynth": "openai", "CortexSynth": "cortex", "IncompleteTask": "errors", "OpenAISynth": "openai",
    "Price": "pricing", "TaskStopped": "errors", "VllmSynth": "vllm",
}  # fmt: skip

__all__ = ["AzureOpenAISynth", "CortexSynth", "IncompleteTask", "OpenAISynth", "Price", "TaskStopped", "VllmSynth"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'posttrain.synth' has no attribute {name!r}")
    return getattr(importlib.import_module(f"posttrain.synth.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
