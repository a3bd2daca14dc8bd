"""Data generation that loses nothing and pays once. See `posttrain.synth.ledger.store` for how.

Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.synth.clients.anthropic import AnthropicSynth
    from posttrain.synth.clients.bedrock import BedrockSynth
    from posttrain.synth.clients.cortex import CortexSynth
    from posttrain.synth.clients.gemini import GeminiSynth
    from posttrain.synth.clients.openai import AzureOpenAISynth, OpenAISynth
    from posttrain.synth.clients.transformers import TransformersSynth
    from posttrain.synth.clients.vllm import VllmSynth
    from posttrain.synth.environments import ToolEnvironment
    from posttrain.synth.errors import IncompleteTask, TaskStopped
    from posttrain.synth.ledger.pricing import Price
    from posttrain.synth.pipelines.pipeline import Pipeline
    from posttrain.synth.pipelines.refresh import Refresh
    from posttrain.synth.pipelines.report import Report
    from posttrain.synth.pipelines.rows import Chat, Drop, Reply
    from posttrain.synth.pipelines.step import Step
    from posttrain.synth.rewards import JudgeReward, ModelServerReward, VerifyReward
    from posttrain.synth.steps.alike.decontaminate import Decontaminate
    from posttrain.synth.steps.alike.dedup import Dedup
    from posttrain.synth.steps.alike.semantic import Semantic
    from posttrain.synth.steps.answers import RightAnswers
    from posttrain.synth.steps.compare import Compare
    from posttrain.synth.steps.complete import Complete
    from posttrain.synth.steps.generate import Generate
    from posttrain.synth.steps.judge import Judge
    from posttrain.synth.steps.pair import Pair
    from posttrain.synth.steps.reward import Reward
    from posttrain.synth.steps.rows import FewShot, Filter, Rename, Split
    from posttrain.synth.steps.sample import Sample
    from posttrain.synth.steps.turns.converse import Converse, User
    from posttrain.synth.steps.turns.mcp import McpServer
    from posttrain.synth.steps.turns.search import Search
    from posttrain.synth.steps.turns.tools import tool
    from posttrain.synth.steps.verify import Verify, verifier

_HOMES = {
    "clients.anthropic": ("AnthropicSynth",),
    "environments": ("ToolEnvironment",),
    "clients.bedrock": ("BedrockSynth",),
    "clients.gemini": ("GeminiSynth",),
    "clients.cortex": ("CortexSynth",),
    "errors": ("IncompleteTask", "TaskStopped"),
    "clients.openai": ("AzureOpenAISynth", "OpenAISynth"),
    "pipelines.pipeline": ("Pipeline",),
    "ledger.pricing": ("Price",),
    "pipelines.refresh": ("Refresh",),
    "pipelines.report": ("Report",),
    "pipelines.rows": ("Chat", "Drop", "Reply"),
    "pipelines.step": ("Step",),
    "rewards": ("JudgeReward", "ModelServerReward", "VerifyReward"),
    "steps.alike.semantic": ("Semantic",),
    "steps.answers": ("RightAnswers",),
    "steps.compare": ("Compare",),
    "steps.alike.decontaminate": ("Decontaminate",),
    "steps.alike.dedup": ("Dedup",),
    "steps.complete": ("Complete",),
    "steps.generate": ("Generate",),
    "steps.judge": ("Judge",),
    "steps.pair": ("Pair",),
    "steps.reward": ("Reward",),
    "steps.rows": ("FewShot", "Filter", "Rename", "Split"),
    "steps.sample": ("Sample",),
    "steps.turns.converse": ("Converse", "User"),
    "steps.turns.mcp": ("McpServer",),
    "steps.turns.search": ("Search",),
    "steps.turns.tools": ("tool",),
    "steps.verify": ("Verify", "verifier"),
    "clients.transformers": ("TransformersSynth",),
    "clients.vllm": ("VllmSynth",),
}
"""Module -> the public names in it."""
_HOME_OF = {name: module for module, found in _HOMES.items() for name in found}

__all__ = [
    "AnthropicSynth", "AzureOpenAISynth", "BedrockSynth", "Chat", "Compare", "Complete", "Converse", "CortexSynth",
    "Decontaminate", "Dedup", "Drop", "FewShot", "Filter", "GeminiSynth", "Generate", "IncompleteTask", "Judge",
    "JudgeReward", "McpServer", "ModelServerReward", "OpenAISynth", "Pair", "Pipeline", "Price", "Refresh", "Rename",
    "Reply", "Report", "Reward", "RightAnswers", "Sample", "Search", "Semantic", "Split", "Step", "TaskStopped",
    "ToolEnvironment", "TransformersSynth", "User", "Verify", "VerifyReward", "VllmSynth", "tool", "verifier",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'posttrain.synth' has no attribute {name!r}")
    return getattr(importlib.import_module(f"posttrain.synth.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
