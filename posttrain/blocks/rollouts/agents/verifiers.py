"""Environments of the package `verifiers` as agents."""

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from posttrain.blocks.data import verifiers
from posttrain.blocks.rollouts.agents.agent import Agent
from posttrain.registry import block


@block("environment", "verifiers")
class VerifiersEnvironment(Agent):
    """An environment of the package verifiers, of its v1 or (with verifiers 0.3) a classic one, installed as its author
    says. Its tasks are a source: `data: {sources: ["verifiers:ID"]}`.
    """

    id: str
    """What verifiers calls it: `gsm8k-v1`."""
    args: dict[str, Any] = attrs.field(factory=dict)
    """What is to be said to it. Of v1 its config, as in the section `[env]` of verifiers' own configs: `{agent:
    {harness: {id: "null"}, runtime: {type: subprocess}}, taskset: {...}}`; of a classic one the arguments of
    `load_environment`. Those that change tasks belong to the source, too: `verifiers:ID?num_train=100`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that the package is not there."""
        if not verifiers.installed():
            yield "id", verifiers.INSTALL

    def reset(self, row: dict[str, Any]) -> Callable[[str], Any]:
        """Return what plays an episode; the environment is loaded here, in the thread of training."""
        verifiers.loaded(self.id, self.args)
        return super().reset(row)

    def play(self, row: dict[str, Any], base_url: str) -> float:
        """Play an episode for a row of its source, and return what its rubric says."""
        return verifiers.played(self.id, self.args, row, base_url)
