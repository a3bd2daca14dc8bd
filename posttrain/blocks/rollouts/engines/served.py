"""Replies from vLLM servers that hold the weights of the run, and prove it after every transfer.

Whether a transfer is due is seen from the weights themselves. After it, the engine's log-probabilities of a probe are
compared with the trainer's own: what speaks must be what is trained.
"""

import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from posttrain.blocks.layout import Example, collate_groups
from posttrain.blocks.rollouts.engines.weights import Watch, write
from posttrain.blocks.rollouts.in_process import asking, ends_of
from posttrain.blocks.rollouts.replies import Reply
from posttrain.errors import TrainingError
from posttrain.runtime.launch import gather_objects

if TYPE_CHECKING:
    from posttrain.blocks.rollouts.engines.vllm import VllmSampler, VllmServerSampler
    from posttrain.run import Run

PROBED = 16
"""Tokens of the reply that is compared after a transfer."""


class Engine(Protocol):
    """A vLLM: a server, or one in this process."""

    @property
    def url(self) -> str:
        """What messages call it."""

    def begin(self) -> None:
        """Set up the transfer of weights, before the first one."""

    def update(self, folder: Path, digests: dict[str, str], version: str) -> None:
        """Let it load the weights in a folder, and forget what it has computed with others."""

    def checksums(self) -> dict[str, str]:
        """Return what its own parameters hash to, by their names there."""

    def answers(
        self, asked: list[tuple[list[int], dict[str, Any]]], version: str, beat: Callable[[], None]
    ) -> list[list[Reply]]:
        """Return replies to some prompts, each with its sampling parameters, said by weights of this version."""


class Served:
    """Samples from engines; a rank asks for its own prompts, and rank zero sends the weights."""

    def __init__(self, run: "Run", block: "VllmSampler | VllmServerSampler", engines: Sequence[Engine]) -> None:
        self.run, self.block, self.engines, self.ends = run, block, engines, ends_of(run)
        self.folder = (block.folder or run.output_dir / "weights").absolute()
        self.watch, self.version, self.sent, self.held = Watch(run), "", 0, False
        self.name = run.fabric.broadcast(uuid.uuid4().hex[:8])
        if block.folder is None and run.fabric.is_global_zero:
            for left in self.folder.glob(f"{'[0-9a-f]' * 8}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)

    def sample(
        self, prompts: list[list[int]], keys: list[tuple[int, ...]], n: int, temperature: float | None = None
    ) -> list[list[Reply]]:
        """Return n replies to each prompt (see `Sampler`); what is sampled beside one may change its rounding."""
        temperature = self.block.temperature if temperature is None else temperature
        if not self.held:
            self.renew(prompts[0] if prompts else [0])
        seeds = (np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2) for key in keys)
        asked = [
            (prompt, self.sampling(n, temperature, int(seed))) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        count, beat = len(self.engines), self.run.watchdog.beat

        def answers(i: int) -> list[list[Reply]]:
            return self.engines[i].answers(asked[i::count], self.version, beat)

        if count == 1:  # one in this process stays in this thread
            found = [answers(0)]
        else:
            with ThreadPoolExecutor(count) as threads:
                found = list(threads.map(answers, range(count)))
        said = [found[i % count][i // count] for i in range(len(asked))]
        return [one * n if len(one) < n else one for one in said]

    def sampling(self, n: int, temperature: float, seed: int) -> dict[str, Any]:
        """Return how a prompt is to be answered; of the likeliest tokens there is one reply."""
        found = {
            "n": n if temperature else 1, "temperature": temperature, "max_tokens": self.block.max_new_tokens,
            "ignore_eos": True, "stop_token_ids": self.ends, "seed": seed,
        }  # fmt: skip
        stop = {"stop": self.block.stop, "skip_special_tokens": False} if self.block.stop else {"detokenize": False}
        return found | stop

    # -- weights ----------------------------------------------------------------------

    def hold(self, probe: list[int]) -> None:
        """Send the weights as they are, and no others until `release` (see `AheadSampler`)."""
        self.renew(probe)
        self.held = True

    def release(self) -> None:
        """Let weights be sent again."""
        self.held = False

    def renew(self, probe: list[int]) -> None:
        """Send the weights if they have changed."""
        if self.watch.changed():
            self.transfer(probe)

    def transfer(self, probe: list[int]) -> None:
        """Bring the servers the weights, and let them prove that they use them. All ranks call it.

        Raises:
            TrainingError: a server cannot be reached, or does not hold them.
        """
        self.sent += 1
        self.version = f"{self.name}-{self.sent}"
        place = self.folder / self.version
        try:
            digests = write(self.run, place)
            self.together(self.update(place, digests) if self.run.fabric.is_global_zero else None)
            for engine in self.engines:
                gap, why = self.probe(engine, probe)
                problem = None
                if not gap <= self.block.tolerance:
                    why = why or self.difference(engine, place, digests)
                    problem = (
                        f"{engine.url} was sent the weights of step {self.run.step}, and its log-probabilities of a "
                        f"probe differ from the trainer's by {gap:.3g} on average (sampler.tolerance is "
                        f"{self.block.tolerance:g}): {why}"
                    )
                self.together(problem)
                if self.run.metrics.batch is None:  # in an evaluation, metrics are means over its rows
                    self.run.log(**{"sampler/probe": gap})
        finally:
            if self.run.fabric.is_global_zero:
                shutil.rmtree(place, ignore_errors=True)

    def update(self, place: Path, digests: dict[str, str]) -> str | None:
        """Let every server load the weights; return what went wrong."""
        try:
            for engine in self.engines:
                if self.sent == 1:
                    engine.begin()
                engine.update(place, digests, self.version)
                self.run.watchdog.beat()
        except TrainingError as error:
            return str(error)
        return None

    def together(self, problem: str | None) -> None:
        """Let all ranks end where one has a problem."""
        if found := next((one for one in gather_objects(self.run.fabric, problem) if one), None):
            raise TrainingError(found)

    def probe(self, engine: Engine, prompt: list[int]) -> tuple[float, str]:
        """Return how far server and trainer are apart on a reply to a prompt, and the reason if it is known."""
        temperature = self.block.temperature
        sampling = {**self.sampling(1, temperature, 0), "max_tokens": min(PROBED, self.block.max_new_tokens)}
        ((reply,),) = engine.answers([(prompt, sampling)], self.version, self.run.watchdog.beat)
        said = np.array(reply.log_probs)
        gap = float(np.abs(said - self.log_probs(prompt, reply.ids, temperature)).mean())
        if temperature == 1.0:
            return gap, ""
        before = float(np.abs(said - self.log_probs(prompt, reply.ids, 1.0)).mean())
        told = "it gives those before the temperature; start it with --logprobs-mode processed_logprobs"
        return gap, told if before <= self.block.tolerance else ""

    def log_probs(self, prompt: list[int], ids: list[int], temperature: float) -> np.ndarray:
        """Return what the trainer itself says of a reply, [tokens]; all ranks ask together."""
        whole = np.array([*prompt, *ids], dtype=np.int64)
        document = whole, np.arange(len(whole)) >= len(prompt)
        batch = self.run.to_device(collate_groups([[Example((document,))]], packing=False))
        with asking(self.run):
            found: Tensor = self.run.model(batch, "log_probs", temperature=temperature)
        return found.float().cpu().numpy()

    def difference(self, engine: Engine, place: Path, digests: dict[str, str]) -> str:
        """Return what may be wrong with a server: which of its tensors change when it loads the weights again."""
        if not self.run.fabric.is_global_zero:
            return "rank zero knows more"
        try:
            held = engine.checksums()
            engine.update(place, digests, self.version)
            again = engine.checksums()
        except TrainingError as error:
            return f"which tensor differs cannot be told: {error}"
        changed = sorted(name for name in held | again if held.get(name) != again.get(name))
        if changed:
            return f"it held other numbers in {changed[0]} ({len(changed)} such tensors in all)"
        return (
            f"all {len(held)} tensors are as they were sent, so that it computes something else with them: look at its "
            "dtype, quantization and configuration"
        )
