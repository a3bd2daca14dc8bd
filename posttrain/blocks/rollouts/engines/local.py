"""vLLM in this process: the engine shares the trainer's device, and takes weights and prompts by calls."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.blocks.rollouts.engines.wire import WHOLE, reply
from posttrain.blocks.rollouts.replies import Reply
from posttrain.errors import RecipeError, TrainingError


class Local:
    """One `vllm.LLM`."""

    url = "the vLLM in this process"

    def __init__(self, model: str, params: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
            from vllm.config import WeightTransferConfig
        except ImportError as error:
            raise RecipeError(f"sampler: vllm cannot be imported ({error}): pip install 'posttrain[vllm]'") from None
        given = {
            "model": model, "logprobs_mode": "processed_logprobs", **params,
            "weight_transfer_config": WeightTransferConfig(backend="posttrain"),
        }  # fmt: skip
        try:
            self.llm: Any = LLM(**given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecipeError(f"sampler: vLLM does not start with {params}: {error}") from error

    def tried(self, what: Callable[..., Any], *given: Any) -> Any:
        """Return what the engine gives.

        Raises:
            TrainingError: it gives an error.
        """
        try:
            return what(*given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise TrainingError(f"{self.url} says of {what.__name__}: {error}") from error

    def begin(self) -> None:
        """Set up the transfer of weights, before the first one."""
        self.tried(self.llm.init_weight_transfer_engine, {"init_info": {}})

    def update(self, folder: Path, digests: dict[str, str], version: str) -> None:
        """Let the engine load the weights in a folder, and forget what it has computed with others."""
        self.tried(self.llm.start_weight_update)
        self.tried(self.llm.update_weights, {"update_info": {"folder": str(folder), "digests": digests}})
        self.tried(self.llm.finish_weight_update, version)
        if not self.llm.reset_prefix_cache():
            raise TrainingError(f"{self.url} does not give up what it has computed with earlier weights")

    def checksums(self) -> dict[str, str]:
        """Return what the engine's own parameters hash to, by their names there."""
        found: dict[str, str] = {}
        for one in self.tried(self.llm.collective_rpc, "compute_weight_checksums"):
            found |= one
        return found

    def answers(
        self, asked: list[tuple[list[int], dict[str, Any]]], version: str, beat: Callable[[], None]
    ) -> list[list[Reply]]:
        """Return replies to some prompts, each with its sampling parameters."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
        params = [SamplingParams(**{**WHOLE, "logprobs": 0, **sampling}) for _, sampling in asked]
        found = self.tried(lambda: self.llm.generate(prompts, params, use_tqdm=False)) if asked else []
        beat()
        return [[self.reply(choice, version) for choice in one.outputs] for one in found]

    def reply(self, choice: Any, version: str) -> Reply:
        """Return a choice as a reply."""
        ids = list(choice.token_ids)
        log_probs = [float(at[token].logprob) for token, at in zip(ids, choice.logprobs, strict=True)]
        versions = {str(span.version) for span in choice.weight_versions or []}
        return reply(self.url, ids, log_probs, versions, version, choice.finish_reason)
