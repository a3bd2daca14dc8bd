"""What a speculator is trained on: where all heads have something to guess, and the base model's own words."""

from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch

from posttrain.batch import Batch
from posttrain.blocks.layout import Document, lay
from posttrain.errors import TrainingError

if TYPE_CHECKING:
    from posttrain.run import Run


def with_positions(batch: Batch, heads: int) -> Batch:
    """Return the batch with `chosen`, the supervised tokens from which on `heads` of them follow one another.

    The hidden state that head 0 starts from lies two tokens before, in the same document. The weight is their number.
    """
    chosen = np.flatnonzero((batch.streaks >= heads) & (batch.depths >= 1))
    return batch.but(chosen=torch.from_numpy(chosen), weight=len(chosen) if batch.weight else 0)


def continued(
    run: "Run",
    batch: Batch,
    *,
    prompt_length: int,
    new_tokens: int,
    at_a_time: int,
    temperature: float,
    top_k: int,
    server: str | None,
) -> Batch:
    """Return a batch of prompts from this one with what the base model says to them; only that is supervised.

    Raises:
        TrainingError: no document is as long as a prompt, or the server does not answer.
    """
    prompts = prompts_of(batch, prompt_length)
    if not prompts:
        raise TrainingError(
            f"step {run.step + 1}: no document of this step has gen_prompt_length={prompt_length} tokens; lower it, or "
            "use longer documents"
        )
    said: list[list[int]] = []
    for begin in range(0, len(prompts), at_a_time):
        group = prompts[begin : begin + at_a_time]
        if server is not None:
            said += ask_server(server, group, new_tokens, temperature, top_k, seed=run.step)
        else:
            said += generate(run, group, new_tokens, temperature, top_k)
    documents = [document(prompt, reply) for prompt, reply in zip(prompts, said, strict=True)]
    made = lay([[one] for one in documents], run.tokenizer.pad_token_id or 0)
    return made if batch.weight else made.idle()


def prompts_of(batch: Batch, length: int) -> list[list[int]]:
    """Return as many prompts of a length as fit into each document of a batch."""
    return [ids[at : at + length] for _, ids, _ in batch.documents() for at in range(0, len(ids) + 1 - length, length)]


def document(prompt: list[int], reply: list[int]) -> Document:
    """Return both as one document, the reply supervised."""
    return np.array(prompt + reply), np.arange(len(prompt) + len(reply)) >= len(prompt)


def generate(run: "Run", prompts: list[list[int]], new_tokens: int, temperature: float, top_k: int) -> list[list[int]]:
    """Return what the base model in training says, each reply through its end token."""
    module: Any = run.model.module
    ids = torch.tensor(prompts, device=run.fabric.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    with run.fabric.autocast():
        out = module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            pad_token_id=run.tokenizer.pad_token_id or 0, **sampling,
        )  # fmt: skip
    ends = module.hf.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    replies = out[:, ids.shape[1] :].tolist()
    return [reply[: next((i + 1 for i, token in enumerate(reply) if token in ends), None)] for reply in replies]


def ask_server(
    server: str, prompts: list[list[int]], new_tokens: int, temperature: float, top_k: int, seed: int
) -> list[list[int]]:
    """Return what a vLLM server says, as token ids.

    Raises:
        TrainingError: it does not answer, or not with token ids.
    """
    try:
        with httpx.Client(base_url=server.rstrip("/") + "/", timeout=httpx.Timeout(600, connect=10)) as client:
            models = client.get("models").raise_for_status().json()["data"]
            body = {
                "model": models[0]["id"], "prompt": prompts, "max_tokens": new_tokens, "temperature": temperature,
                "top_k": top_k, "seed": seed, "return_token_ids": True,
            }  # fmt: skip
            choices = client.post("completions", json=body).raise_for_status().json()["choices"]
        replies = {choice["index"]: list(choice["token_ids"]) for choice in choices}
        return [replies[i] for i in range(len(prompts))]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
        raise TrainingError(
            f"the server {server} does not continue prompts as vLLM does ({type(error).__name__}: {error}); gen_server "
            "is the base URL of `vllm serve` with the base model, such as http://localhost:8000/v1"
        ) from error
