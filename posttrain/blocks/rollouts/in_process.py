"""Replies from the network in training, with a cache of keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from posttrain.batch import Layout
from posttrain.blocks.images.arrange import PICTURE, arrange
from posttrain.blocks.images.processor import images_of
from posttrain.blocks.layout import lay
from posttrain.blocks.rollouts.replies import Reply
from posttrain.errors import TrainingError
from posttrain.runtime.launch import all_reduce

WINDOW = 16
"""Tokens at the end of a reply in which a stop text is looked for."""


@contextmanager
def asking(run: Any) -> Iterator[None]:
    """Let the network compute in evaluation mode, without gradients, in the precision of the run."""
    module = run.model.module
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), run.fabric.autocast():
            yield
    finally:
        module.train(training)


def ends_of(run: Any) -> list[int]:
    """Return the tokens that end a reply: those of the model, that of its tokenizer, and the placeholder of images,
    which nobody can say."""
    said: Any = run.model.module.base.generation_config.eos_token_id
    processor = images_of(run.tokenizer)
    placeholder = None if processor is None else processor.token_id
    ends = {*(said if isinstance(said, list) else [said]), run.tokenizer.eos_token_id, placeholder} - {None}
    return sorted(ends)


class InProcess:
    """Samples from `run.model` as it is at the moment."""

    sees = True

    def __init__(self, run: Any, max_new_tokens: int, temperature: float, stop: list[str], rows: int) -> None:
        self.run, self.max_new_tokens, self.temperature = run, max_new_tokens, temperature
        self.stop, self.rows = stop, rows
        self.module: Any = run.model.module
        self.ends = torch.tensor(ends_of(run), device=run.fabric.device)
        self.together = run.fabric.world_size > 1 and run.strategy.shards_parameters
        """Whether every rank must take part in each pass of the network, and so wait for the longest reply of all."""

    def sample(
        self, prompts: list[list[int]], keys: list[tuple[int, ...]], n: int, temperature: float | None = None,
        images: list[list[dict[str, Any]]] | None = None,
    ) -> list[list[Reply]]:  # fmt: skip
        """Return n replies to each prompt (see `SeeingSampler`)."""
        images = [[] for _ in prompts] if images is None else images
        temperature = self.temperature if temperature is None else temperature
        each, found = max(1, self.rows // n), list[list[Reply]]()
        times = -(-len(prompts) // each)
        if self.together:  # a rank that has fewer prompts takes part in the passes of the others
            times = int(all_reduce(self.run.fabric, torch.tensor(times, device=self.run.fabric.device), "MAX"))
        with asking(self.run):
            for i in range(0, times * each, each):
                if i < len(prompts):
                    some = slice(i, i + each)
                    found += self.continued(prompts[some], keys[some], n, temperature, images[some])
                else:
                    self.continued([[0]], [(0,)], 1, temperature, [[]])
        return found

    def continued(
        self, prompts: list[list[int]], keys: list[tuple[int, ...]], n: int, temperature: float,
        images: list[list[dict[str, Any]]],
    ) -> list[list[Reply]]:  # fmt: skip
        """Let n replies to each of some prompts grow side by side; equal ones are read once."""
        device, rows = self.run.fabric.device, len(prompts) * n
        asked = [
            (tuple(prompt), tuple(one["hash"] for one in some)) for prompt, some in zip(prompts, images, strict=True)
        ]
        firsts: dict[Any, int] = {}
        for i, one in enumerate(asked):
            firsts.setdefault(one, i)
        places = {one: i for i, one in enumerate(firsts)}
        place = torch.tensor([places[one] for one in asked], device=device).repeat_interleave(n)
        prompts, images = [prompts[i] for i in firsts.values()], [images[i] for i in firsts.values()]
        width = max(map(len, prompts))
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        draws = [np.random.default_rng([*one, i]).random(self.max_new_tokens) for one in keys for i in range(n)]
        uniform = torch.tensor(np.array(draws), device=device)  # [rows, tokens]
        cache = DynamicCache(config=self.module.base.config)
        layout, shift = self.seen(prompts, images) if any(images) else (None, None)
        logits = self.module.next_logits(ids.to(device), mask.to(device), cache, images=layout)
        shift = None if shift is None else shift[:, place]
        cache.reorder_cache(place)  # which every cache can
        logits, mask = logits[place], mask.to(device)[place]
        said: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]
        ended, alive = [False] * rows, torch.arange(rows, device=device)
        for t in range(self.max_new_tokens):
            self.run.watchdog.beat()  # long replies are no hang
            tokens, values = drawn(logits, uniform[alive, t], temperature)
            over = (tokens[:, None] == self.ends).any(1).tolist()
            for i, token, value, end in zip(alive.tolist(), tokens.tolist(), values.tolist(), over, strict=True):
                if not ended[i]:
                    said[i][0].append(token), said[i][1].append(value)
                    ended[i] = end or self.stopped(said[i][0])
            keep = self.kept([ended[i] for i in alive.tolist()], device)
            if not len(keep) or t + 1 == self.max_new_tokens:
                break
            if len(keep) < len(alive):
                cache.reorder_cache(keep)
            alive, mask = alive[keep], F.pad(mask[keep], (0, 1), value=1)
            shift = None if shift is None else shift[:, keep]
            logits = self.module.next_logits(tokens[keep, None], mask, cache, shift)
        replies = [Reply(*one, end) for one, end in zip(said, ended, strict=True)]
        return [replies[i : i + n] for i in range(0, rows, n)]

    def seen(self, prompts: list[list[int]], images: list[list[dict[str, Any]]]) -> tuple[Layout, torch.Tensor | None]:
        """Return the layout of prompts with their images, padded at the left, and by how much the positions behind
        each prompt are ahead of the number of its tokens, [axes, prompts, 1], if there are several axes."""
        processor = images_of(self.run.tokenizer)
        if processor is None or self.module.sight is None:
            raise TrainingError(f"the prompts hold images, and {self.module.blind}")
        width, rows, spans = max(map(len, prompts)), [], []
        for prompt, some in zip(prompts, images, strict=True):
            padding = width - len(prompt)
            alike = [np.zeros(padding, dtype=np.int64), np.array(prompt)] if padding else [np.array(prompt)]
            rows.append([(ids, np.zeros(len(ids), dtype=bool)) for ids in alike])  # the padding is a document, too
            spans += [[], some] if padding else [some]
        batch = arrange(lay(rows, 0), spans, processor, lambda span: span[PICTURE])
        shift = None
        if processor.has_axes:
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            begins = torch.arange(width) >= (width - lengths)[:, None]
            ahead = (batch.position_ids[1:] * begins).amax((0, 2)) + 1 - lengths
            shift = torch.stack([torch.zeros_like(ahead), *[ahead] * (len(batch.position_ids) - 1)])[..., None]
        batch = self.run.to_device(batch)
        return batch, None if shift is None else shift.to(self.run.fabric.device)

    def stopped(self, ids: list[int]) -> bool:
        """Whether a reply has just said one of the texts that end it."""
        if not self.stop:
            return False
        text = self.run.tokenizer.decode(ids[-WINDOW:])
        return any(one in text for one in self.stop)

    def kept(self, ended: list[bool], device: torch.device) -> Tensor:
        """Return which of the rows go on; none if all ranks are done. One that is waiting keeps a row that is over."""
        going = [i for i, over in enumerate(ended) if not over]
        if self.together and not going:
            others = all_reduce(self.run.fabric, torch.tensor(0.0, device=device), "MAX")
            going = [0] if float(others) else []
        elif self.together:
            all_reduce(self.run.fabric, torch.tensor(1.0, device=device), "MAX")
        return torch.tensor(going, dtype=torch.int64, device=device)


def drawn(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return a token for each row, and its log-probability: [rows] each.

    Args:
        logits: float32 [rows, vocabulary].
        uniform: float64 [rows], in [0, 1): the place in the cumulated distribution.
        temperature: what logits are divided by; 0 for the likeliest token.
    """
    if not temperature:
        log_probs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        return tokens, log_probs.gather(1, tokens[:, None])[:, 0]
    log_probs = (logits / temperature).log_softmax(-1)
    sums = log_probs.double().exp_().cumsum(-1)
    tokens = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).clamp_(max=sums.shape[1] - 1)
    return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]
