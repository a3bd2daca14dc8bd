"""Callbacks that change what weights or embeddings are."""

from typing import Any

import attrs
from attrs.validators import and_ as both
from attrs.validators import ge, gt, lt

from posttrain.errors import RecipeError
from posttrain.hooks import after, before
from posttrain.registry import block, key


@block("callback", "ema")
class EMA:
    """Keep an exponential moving average of the weights, and export it beside the model, in `huggingface-ema`."""

    decay: float = key(0.999, check=both(ge(0), lt(1)))
    """How much of the average stays at each step: 0.999 looks back over about a thousand."""

    @after("trainer.setup")
    def keep(self, trainer: Any, run: Any) -> None:
        """Make room, in float32, for what a checkpoint may fill."""
        for shard in run.strategy.shards(run):
            run.tensors[f"ema/{shard.name}"] = shard.like(shard.values.detach().float().clone())

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Begin with the weights as they are, unless the average goes on."""
        if not trainer.run.memory.get("ema"):
            for shard, average in self.pairs(trainer.run):
                average.copy_(shard)
            trainer.run.memory["ema"] = True

    @after("trainer.count")
    def follow(self, trainer: Any, _: None) -> None:
        """Move towards the weights after a step."""
        for shard, average in self.pairs(trainer.run):
            average.lerp_(shard.float(), 1 - self.decay)

    @before("trainer.save")
    def export(self, trainer: Any, at_end: bool) -> None:
        """Export the average when the run is finished; meanwhile the network has its weights."""
        from posttrain.blocks.checkpoints.checkpoint import HuggingFace

        run = trainer.run
        if at_end and run.status == "finished":
            kept = [shard.clone() for shard, _ in self.pairs(run)]
            self.put(run, [average for _, average in self.pairs(run)])
            try:
                HuggingFace(output_dir=run.output_dir / "huggingface-ema").save(run, at_end=True)
            finally:
                self.put(run, kept)

    def pairs(self, run: Any) -> list[tuple[Any, Any]]:
        """Return this rank's part of each trained parameter, and its average: [n] each."""
        return [(s.values.detach(), run.tensors[f"ema/{s.name}"].values) for s in run.strategy.shards(run)]

    def put(self, run: Any, values: list[Any]) -> None:
        """Give the network other weights."""
        for (shard, _), value in zip(self.pairs(run), values, strict=True):
            shard.copy_(value)
        run.strategy.restored(run)


@block("callback", "neftune", also=("neft",))
class NEFTune:
    """Add noise to embeddings while training (Jain et al., arXiv:2310.05914): uniform within alpha / sqrt(L d), for a
    document of L tokens and embeddings of size d. Each document of a packed row counts its own tokens."""

    alpha: float = key(5.0, also=("neftune_noise_alpha",), check=gt(0))
    """How much; the paper tries 5, 10 and 15."""
    _undo: list[Any] = attrs.field(factory=list, init=False, eq=False, repr=False)

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Hook the embeddings.

        Raises:
            RecipeError: the network has none that are known, or ranks share rows.
        """
        network, seen = trainer.run.model.module, dict[str, Any]()
        if not hasattr(network, "running") or trainer.sequence is not None:
            raise RecipeError("callbacks: neftune needs a network of ours, and rows that are whole (no sequence)")
        running = network.running

        def noted(layout: Any) -> Any:
            seen["layout"] = layout
            return running(layout)

        def noise(module: Any, _: Any, output: Any) -> Any:
            return output + self.noise(output, seen["layout"]) if module.training else output

        network.running = noted
        handle = network.base.get_input_embeddings().register_forward_hook(noise)
        self._undo.extend((handle.remove, lambda: vars(network).pop("running")))

    @after("trainer.fit")
    def end(self, trainer: Any, result: Any) -> None:
        """Leave the network as it was."""
        while self._undo:
            self._undo.pop()()

    def noise(self, output: Any, layout: Any) -> Any:
        """Return what is added to embeddings [rows, width, size]."""
        import torch

        queries, size = layout.cu_seqlens.diff(), output.shape[-1]
        keys = queries if layout.cu_seqlens_k is None else layout.cu_seqlens_k.diff()  # with what branches begin with
        lengths = keys.repeat_interleave(queries).to(output.dtype)
        if lengths.numel() != output[..., 0].numel():  # a document in a row of its own
            lengths = output.new_tensor(float(output.shape[-2])).expand(output.shape[:-1])
        bound = self.alpha / (lengths.view(*output.shape[:-1], 1) * size).sqrt()
        return torch.empty_like(output).uniform_(-1, 1) * bound
