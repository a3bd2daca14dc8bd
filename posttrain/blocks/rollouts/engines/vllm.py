"""Samplers that are vLLM engines: servers beside the trainer, or one in its process.

Temperatures below 0.01 are refused, since vLLM would raise them to that without a word.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs.converters import optional as or_none
from attrs.validators import ge, gt, min_len

from posttrain.errors import RecipeError
from posttrain.interfaces import Sampler
from posttrain.registry import block, key
from posttrain.values import Secret

if TYPE_CHECKING:
    from posttrain.run import Run


@block("sampler", "vllm-server")
class VllmServerSampler:
    """vLLM servers say the replies, with the weights of the run: they are sent whenever they have changed, and after
    every transfer a server proves that it uses them.

    Weights go through files in a folder that trainer and servers share. A reply is drawn from the whole distribution;
    its tokens come back as ids, with their log-probabilities.
    """

    base_url: str | list[str] = key(check=min_len(1))
    """Servers that serve this run alone, such as `http://localhost:8000`, started as docs/rl.md says. Several share the
    prompts."""
    max_new_tokens: int = key(256, check=gt(0), also=("max_completion_length",))
    """The most tokens that a reply may have; one that reaches it is cut off, and counted."""
    temperature: float = key(1.0, check=ge(0.01))
    """What logits are divided by, in sampling as in the loss."""
    stop: list[str] = attrs.field(factory=list)
    """A reply also ends with the token that completes one of these texts."""
    folder: Path | None = key(None, convert=or_none(Path))
    """Where weights are put for the servers to read, by the same path there. Defaults to `weights` inside the run's
    folder; /dev/shm is fast."""
    tolerance: float = key(0.05, check=gt(0))
    """Mean difference in nats between the log-probabilities of trainer and server, of a probe after each transfer,
    above which the run ends. 1e-4 fits where both compute in float32."""
    api_key: Secret | None = None
    """Of servers started with one."""
    concurrency: int = key(64, check=gt(0))
    """Prompts that are in flight at most, of each rank."""
    timeout: float = key(600.0, check=gt(0))
    """Seconds that a request, or a transfer, may take."""

    @property
    def urls(self) -> list[str]:
        """Where the servers are."""
        return [self.base_url] if isinstance(self.base_url, str) else self.base_url

    def build(self, run: "Run") -> Sampler:
        """Return the sampler.

        Raises:
            RecipeError: what is trained cannot be sent to an engine.
        """
        from posttrain.blocks.rollouts.engines.served import Served
        from posttrain.blocks.rollouts.engines.wire import Server

        refuse_parts(run)
        key = self.api_key.reveal() if self.api_key else None
        return Served(run, self, [Server(url, key, self.timeout, self.concurrency) for url in self.urls])


@block("sampler", "vllm")
class VllmSampler:
    """vLLM in this process says the replies: for one process, whose device it shares with the trainer. Weights are sent
    and proven as with a server.
    """

    model_params: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of `vllm.LLM` besides the model: `{gpu_memory_utilization: 0.3, max_model_len: 4096}`."""
    max_new_tokens: int = key(256, check=gt(0), also=("max_completion_length",))
    """The most tokens that a reply may have; one that reaches it is cut off, and counted."""
    temperature: float = key(1.0, check=ge(0.01))
    """What logits are divided by, in sampling as in the loss."""
    stop: list[str] = attrs.field(factory=list)
    """A reply also ends with the token that completes one of these texts."""
    folder: Path | None = key(None, convert=or_none(Path))
    """Where weights are put for the engine to read. Defaults to `weights` inside the run's folder; /dev/shm is fast."""
    tolerance: float = key(0.05, check=gt(0))
    """Mean difference in nats between the log-probabilities of trainer and engine, of a probe after each transfer,
    above which the run ends. 1e-4 fits where both compute in float32."""

    def build(self, run: "Run") -> Sampler:
        """Return the sampler.

        Raises:
            RecipeError: there are several processes, vLLM does not start, or what is trained cannot be sent to it.
        """
        from posttrain.blocks.models.adapters import origin
        from posttrain.blocks.rollouts.engines.local import Local
        from posttrain.blocks.rollouts.engines.served import Served

        refuse_parts(run)
        if run.fabric.world_size > 1:
            raise RecipeError("sampler: vllm is for one process; with several, let them share servers (vllm-server)")
        model = origin(run.recipe["model"]["name_or_path"])[0]
        return Served(run, self, [Local(model, self.model_params)])


def refuse_parts(run: "Run") -> None:
    """Refuse weights that cannot be sent whole.

    Raises:
        RecipeError: they are of such a kind.
    """
    module: Any = run.model.module
    if hasattr(module.hf, "peft_config") and run.strategy.shards_parameters:
        raise RecipeError("sampler: adapters cannot be merged for vLLM while parameters are in shards; use ddp")
    if module.quantized is not None:
        raise RecipeError(
            "sampler: vLLM gets whole weights, and would not round them as training does; leave model.quantize and "
            "model.qat out"
        )
