"""MLP speculators in vLLM: a proposer for `method="custom_class"`.

    LLM(
        model, additional_config={"mlp_speculator": "runs/speculator/huggingface"},
        speculative_config={
            "method": "custom_class", "model": "posttrain.serve.vllm_speculator.Proposer", "num_speculative_tokens": 3,
        },
    )

vLLM hands such a proposer no hidden states; one method of its model runner is wrapped to keep them. Tried with vLLM
0.32 on CPUs.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from posttrain.blocks.models.speculator.files import misfit
from posttrain.blocks.models.speculator.network import load_speculator

KEY = "mlp_speculator"


class Proposer:
    """Drafts the next tokens of every request from the hidden state that produced its newest one."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        folder = dict(vllm_config.additional_config).get(KEY)
        if folder is None:
            raise ValueError(f"give the folder of the speculator: additional_config={{{KEY!r}: ...}}")
        self.speculator = load_speculator(Path(folder)).eval()
        self.count = vllm_config.speculative_config.num_speculative_tokens
        heads = self.speculator.config["n_predict"]
        if self.count > heads:
            raise ValueError(f"num_speculative_tokens is {self.count}, the speculator in {folder} has {heads} heads")
        if problem := misfit(self.speculator.config, vllm_config.model_config.hf_text_config):
            raise ValueError(f"the speculator in {folder} is for another base model: {problem}")
        self.states: torch.Tensor | None = None
        self.drafted: list[int] | None = None
        keep_hidden_states()

    def load_model(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """Move to the device and the precision of the target model."""
        parameter = next(target.parameters())
        self.speculator.to(device=parameter.device, dtype=parameter.dtype)

    def propose(self, sampled: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """Return drafts for every request; none for those whose prompt is still being read.

        Args:
            sampled: the newest tokens of each request: what was accepted of its drafts, and one more.
            args: what other proposers look at.
            kwargs: likewise.
        """
        assert self.states is not None
        rows, offset = [], 0
        for index, tokens in enumerate(sampled):
            rows.append(offset + max(len(tokens), 1) - 1)
            offset += 1 + (self.drafted[index] if self.drafted is not None else 0)
        asked = [index for index, tokens in enumerate(sampled) if tokens]
        drafts: list[list[int]] = [[] for _ in sampled]
        if asked:
            newest = torch.tensor([sampled[index][-1] for index in asked], device=self.states.device)
            hidden = self.states[[rows[index] for index in asked]]
            for index, drafted in zip(asked, self.speculator.draft(hidden, newest, self.count).tolist(), strict=True):
                drafts[index] = drafted
        return drafts


def keep_hidden_states() -> None:
    """Let vLLM's model runner leave the hidden states of sampled rows with our proposer, before it asks for drafts."""
    original = GPUModelRunner.propose_draft_token_ids
    if getattr(original, "keeps_hidden_states", False):
        return

    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(self.drafter, Proposer):
            self.drafter.states = sample_hidden_states
            self.drafter.drafted = None if spec_decode_metadata is None else spec_decode_metadata.num_draft_tokens
        return original(
            self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, sample_hidden_states,
            aux_hidden_states, spec_decode_metadata, *args, **kwargs,
        )  # fmt: skip

    propose_draft_token_ids.keeps_hidden_states = True
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
