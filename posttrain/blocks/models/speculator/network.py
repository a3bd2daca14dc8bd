"""The MLP speculator as a network: what it computes, how it is trained beside its base model, and its files.

As in IBM's fms-extras, whose checkpoints vLLM and arctic-inference read: head i mixes the state before it with the
embedding of the newest token, and predicts the token after next. A state is worth sqrt(0.5) / n of the variance, so
that what is left of the base model's hidden state is half of it after the last head.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.batch import Batch
from posttrain.blocks.losses.cross_entropy import chunk_rows, nll_sum
from posttrain.blocks.models.packed import PackedModel
from posttrain.blocks.models.speculator.files import read_config, tensor_shapes, validate
from posttrain.errors import CheckpointError


class Norm(nn.Module):
    """Root-mean-square norm with weight and bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return self.weight * rms(x) + self.bias


class MLPSpeculator(nn.Module):
    """n heads that draft n tokens, one after the other."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        n, inner = config["n_predict"], config["inner_dim"] or config["emb_dim"]
        self.emb = nn.ModuleList(nn.Embedding(config["vocab_size"], inner) for _ in range(n))
        sizes = [config["emb_dim"]] + [inner] * (n - 1)
        self.proj = nn.ModuleList(nn.Linear(size, inner, bias=False) for size in sizes)
        self.ln = nn.ModuleList(Norm(inner) for _ in range(n))
        self.head = nn.ModuleList(nn.Linear(inner, config["vocab_size"], bias=False) for _ in range(n))
        state_weight = 0.5 ** (0.5 / n)
        self.token_weight = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
        for module in (*self.emb, *self.proj, *self.head):
            nn.init.normal_(module.weight, 0, inner**-0.5)
        if config["tie_weights"]:
            for group, first in ((self.emb, 0), (self.ln, 0), (self.head, 0), (self.proj, 1)):
                for i in range(first + 1, n):
                    group[i] = group[first]

    def start(self, hidden: Tensor) -> Tensor:
        """Return the first state: the base model's hidden state behind its last norm, [..., emb_dim]."""
        return rms(hidden) / math.sqrt(2) if self.config["scale_input"] else hidden

    def state(self, i: int, state: Tensor, tokens: Tensor) -> Tensor:
        """Return the state of head i, [..., inner_dim], after the state before it and the newest tokens [...]."""
        mixed = self.proj[i](state) + self.token_weight * self.emb[i](tokens)
        return F.gelu(self.ln[i](mixed))

    @torch.no_grad()
    def draft(self, hidden: Tensor, token: Tensor, count: int) -> Tensor:
        """Return the likeliest next tokens, [rows, count].

        Args:
            hidden: [rows, emb_dim], the states that produced the newest tokens.
            token: int64 [rows], these tokens.
            count: at most n_predict.
        """
        state, drafted = self.start(hidden), []
        for i in range(count):
            state = self.state(i, state, token)
            token = self.head[i](state).argmax(-1)
            drafted.append(token)
        return torch.stack(drafted, 1)


class Speculating(PackedModel):
    """A frozen base model and its speculator."""

    def __init__(self, hf: Any, speculator: MLPSpeculator) -> None:
        super().__init__(hf)
        self.speculator = speculator

    def train(self, mode: bool = True) -> "Speculating":
        """Leave the base model in evaluation mode."""
        super().train(mode)
        self.hf.eval()
        return self

    def forward(self, batch: Batch, positions: Tensor) -> Tensor:
        """Return what each head says of the data, float32 [2, n_predict].

        Args:
            batch: see layout.py.
            positions: int64 [n], flat positions whose next tokens, n_predict + 1 of them, are in the same document.

        Returns:
            Summed negative log-likelihoods of the tokens that the heads should have drafted, in nats; and how many of
            them were the likeliest, in evaluation (in training it is 0: counting costs as much as the loss).
        """
        speculator, ids = self.speculator, self.layout(batch).input_ids.flatten()
        with torch.no_grad():
            hidden = self.hidden_states(batch).flatten(0, 1).index_select(0, positions)
        state, losses, right = speculator.start(hidden), [], []
        for i in range(speculator.config["n_predict"]):
            state = speculator.state(i, state, ids[positions + 1 + i])
            head, targets = speculator.head[i].weight, ids[positions + 2 + i]
            losses.append(nll_sum(state, head, None, targets))  # type: ignore[arg-type]
            right.append(losses[-1].new_zeros(()) if self.training else hits(state, head, targets))  # type: ignore[arg-type]
        return torch.stack([torch.stack(losses), torch.stack(right)])

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Tensor:
        """Generate with the base model; arguments and result are those of transformers."""
        return self.hf.generate(use_cache=True, **kwargs)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the speculator as servers load it.

        Raises:
            CheckpointError: what was written would not be loaded right.
        """
        prefix = "speculator."
        given = None
        if state_dict is not None:
            given = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
        save_speculator(self.speculator, folder, given)
        if found := validate(folder, self.base.config.get_text_config()):
            raise CheckpointError(f"the export in {folder} would not be loaded right:\n  " + "\n  ".join(found))


def rms(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def hits(state: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return how many targets are the likeliest token, a float32 scalar."""
    pairs = zip(torch.split(state, chunk_rows(head)), torch.split(targets, chunk_rows(head)), strict=True)
    return torch.stack([(F.linear(x, head).argmax(-1) == y).sum() for x, y in pairs]).sum().float()


def save_speculator(speculator: MLPSpeculator, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write configuration and tensors; what is tied is written under every index, since servers expect it there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or speculator.state_dict()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    said = {**speculator.config, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    written = {name: tensors[name].detach().cpu().clone().contiguous() for name in tensor_shapes(speculator.config)}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})


def load_speculator(folder: Path) -> MLPSpeculator:
    """Return an exported speculator, ours or IBM's.

    Raises:
        CheckpointError: files or tensors are missing or do not fit.
    """
    config = read_config(folder)
    if found := validate(folder):
        raise CheckpointError(f"{folder} does not hold a whole speculator:\n  " + "\n  ".join(found))
    speculator = MLPSpeculator(config)
    tensors = load_file(folder / "model.safetensors")
    speculator.load_state_dict({name.removeprefix("speculator."): x for name, x in tensors.items()})
    return speculator
