"""What is said to a vLLM server: token ids in, token ids and their log-probabilities out, and weights by its own
weight-transfer interface.

Sources: vLLM 0.32, entrypoints/scale_out/token_in_token_out/protocol.py and entrypoints/rl/online/api_router.py.
"""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from posttrain.blocks.rollouts.replies import Reply
from posttrain.errors import TrainingError

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
    """--weight-transfer-config '{"backend": "posttrain"}'"""
)
"""How a server is started that can be used."""
WHOLE = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}  # fmt: skip
"""The whole distribution, whatever the model's generation_config.json says: that is what the trainer computes."""


ATTEMPTS = 3
"""For a connection that breaks; vLLM also closes one after an error."""
ONCE = ("/start_weight_update", "/update_weights", "/finish_weight_update")
"""What may have been done although the answer was lost."""


class Server:
    """One vLLM server."""

    def __init__(self, url: str, api_key: str | None, timeout: float, concurrency: int) -> None:
        self.concurrency = concurrency
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        weakref.finalize(self, self.http.close)

    def post(self, path: str, body: Any = None, **query: str) -> Any:
        """Return the answer to a request.

        Raises:
            TrainingError: there is none, or it is an error.
        """
        for left in range(1 if path in ONCE else ATTEMPTS, 0, -1):
            try:
                answer = self.http.post(path, json=body, params=query)
                break
            except httpx.HTTPError as error:
                if left == 1 or not isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
                    what = f"{path}: {type(error).__name__} {error}"
                    raise TrainingError(
                        f"vLLM at {self.url} does not answer ({what}); start it with\n  {START}"
                    ) from None
        if answer.status_code in (404, 405):
            raise TrainingError(f"vLLM at {self.url} has no {path}; start it with\n  {START}")
        if answer.status_code != 200:
            hint = f"; start it with\n  {START}" if "weight_transfer_config" in answer.text else ""
            text = f"{answer.status_code}: {answer.text[:500]}"
            raise TrainingError(f"vLLM at {self.url} answers {path} with {text}{hint}")
        try:
            return answer.json()
        except ValueError:
            raise TrainingError(f"vLLM at {self.url} answers {path} with no JSON: {answer.text[:200]!r}") from None

    # -- weights ----------------------------------------------------------------------

    def begin(self) -> None:
        """Set up the transfer of weights, before the first one."""
        self.post("/init_weight_transfer_engine", {"init_info": {}})

    def update(self, folder: Path, digests: dict[str, str], version: str) -> None:
        """Let the server load the weights in a folder, and forget what it has computed with others."""
        self.post("/pause", mode="wait")
        try:
            self.post("/start_weight_update")
            self.post("/update_weights", {"update_info": {"folder": str(folder), "digests": digests}})
            self.post("/finish_weight_update", {"weight_version": version})
        except TrainingError:
            with suppress(TrainingError):  # the first one says more
                self.post("/resume")
            raise
        self.post("/resume")

    def checksums(self) -> dict[str, str]:
        """Return what the server's own parameters hash to, by their names there."""
        found: dict[str, str] = self.post("/weight_checker", {"action": "checksum"})["checksums"]
        return found

    # -- replies ----------------------------------------------------------------------

    def answers(
        self, asked: list[tuple[list[int], dict[str, Any]]], version: str, beat: Callable[[], None]
    ) -> list[list[Reply]]:
        """Return replies to some prompts, asked side by side.

        Args:
            asked: token ids, and `vllm.SamplingParams` as plain data.
            version: of the weights that are to say them.
            beat: called after each answer.

        Raises:
            TrainingError: other weights have said some of it, or an answer is not what it should be.
        """

        def one(each: tuple[list[int], dict[str, Any]]) -> list[Reply]:
            prompt, sampling = each
            body = {"token_ids": prompt, "sampling_params": {**WHOLE, "logprobs": 0, **sampling}}
            choices = sorted(self.post("/inference/v1/generate", body)["choices"], key=lambda choice: choice["index"])
            beat()
            return [self.reply(choice, version) for choice in choices]

        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(one, asked))

    def reply(self, choice: dict[str, Any], version: str) -> Reply:
        """Return a choice as a reply."""
        ids = choice["token_ids"]
        said = (choice.get("logprobs") or {}).get("content") or []
        if [one["token_id"] for one in said] != ids:
            raise TrainingError(f"vLLM at {self.url} gave log-probabilities of other tokens than those it sampled")
        versions = {str(span["version"]) for span in choice.get("weight_versions") or []}
        log_probs = [float(one["logprob"]) for one in said]
        return reply(self.url, ids, log_probs, versions, version, choice["finish_reason"])


def reply(
    url: str, ids: list[int], log_probs: list[float], versions: set[str], version: str, reason: str | None
) -> Reply:
    """Return a reply that an engine gave.

    Raises:
        TrainingError: other weights have said some of it, or it did not end by itself or at its most tokens.
    """
    if versions != {version}:
        said = ", ".join(sorted(versions)) or "unknown"
        raise TrainingError(
            f"{url} has sampled with the weights {said} and not with {version}: something else changes its weights. "
            "An engine serves one run"
        )
    if reason not in ("stop", "length"):
        raise TrainingError(f"{url} ended a reply because of {reason!r}")
    return Reply(ids, log_probs, reason == "stop")
