"""A tiny twin of what a recipe describes: its own configuration made small, with its own tokenizer, template, data
(a sample), trainer and blocks. It trains on a CPU in seconds, so that a run can be tried before a GPU is paid for.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.checkpoints.checkpoint import Resume
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.images.processor import images_of
from posttrain.blocks.layout import Example
from posttrain.blocks.loggers.logger import JSONL
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.parallel.strategy import Auto
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.blocks.scheduler import Constant
from posttrain.blocks.tokenizers.tokenizer import HFTokenizer
from posttrain.errors import DataError
from posttrain.hooks import after
from posttrain.interfaces import DataBlock
from posttrain.recipes import load as recipe
from posttrain.runtime.launch import silence_libraries
from posttrain.tools.twin.stand_ins import UnitDescent, as_text, elsewhere, short_replies
from posttrain.trainer import Trainer

EXACT, ROUGH = "64-true", "32-true"
"""The precision in which steps are compared; and of networks that have float32 written into them."""
CLOSE = {EXACT: 1e-6, ROUGH: 1e-4}
"""Relative difference that counts as none: a real mistake makes 1e-3 and more."""
READ = 256
"""Rows of each source to look at."""
LONGEST = 512
"""Tokens of a document that the twin trains on, at most."""
SHORT = 128
"""Tokens of a document that is quickly tried, at most; longer ones serve where there are no such."""


class NoRows(DataError):
    """Nothing in the sample of the data can be trained on."""


class Failed(Exception):
    """A check that failed: what was found, and what to look at."""


class Skipped(Exception):
    """A check that does not apply, and why."""


@attrs.frozen
class Row:
    """A row of the data, and what it became."""

    values: dict[str, Any]
    encoded: Example | Refused

    @property
    def length(self) -> int:
        """Tokens of its longest document."""
        return 0 if isinstance(self.encoded, Refused) else max(len(ids) for ids, _ in self.encoded.documents)


@attrs.frozen
class Step:
    """What one optimizer step did."""

    loss: float
    gradient: Any
    """Of all trained parameters, flat, in float64."""
    metrics: dict[str, float]


class Twin:
    """A recipe's twin in a folder of its own."""

    def __init__(self, path: Path, overrides: list[str], folder: Path) -> None:
        self.path, self.overrides, self.folder = path, overrides, folder
        self.real, self.precision = recipe.load(path, overrides), EXACT
        self.tokenizer = self.real.tokenizer.build(self.real.model)
        self.rows = list(self._read()) if isinstance(self.real.data, Data) else []

    # -- data -------------------------------------------------------------------------

    def _read(self) -> Iterator[Row]:
        """Yield the first rows of every source."""
        encoder = self.data.encoder(self.tokenizer)
        for source in self.data.sources:
            short = attrs.evolve(source, max_rows=min(source.max_rows or READ, READ))
            values = [row.values for row, _ in short.read(short.open())]
            yield from map(Row, values, encoder.encode(values))

    @property
    def data(self) -> Data:
        """The recipe's data block.

        Raises:
            DataError: it is of another kind, of which no sample can be taken.
        """
        if not isinstance(self.real.data, Data):
            raise DataError(f"{type(self.real.data).__name__} reads no sources, so that no sample of it can be taken")
        return self.real.data

    def sample(self, count: int) -> list[Row]:
        """Return so many rows that can be trained on, of different lengths, the longer half of those that are short."""
        usable = sorted((row for row in self.rows if not isinstance(row.encoded, Refused)), key=lambda row: row.length)
        short = sum(row.length <= SHORT for row in usable) or 2 * count
        usable = usable[min(short, len(usable)) // 2 : short] if short >= 2 * count else usable
        return usable[:: max(1, len(usable) // count)][:count]

    def sampled(self, count: int, **changes: Any) -> DataBlock:
        """Return the data block over a sample of rows, each a row of a file; a block of another kind as it is."""
        if not isinstance(self.real.data, Data):
            return recipe.load(self.path, self.overrides).data
        rows = self.sample(count)
        if not rows:
            raise NoRows("no row can be trained on")
        rows = (rows * count)[:count]
        file = self.folder / f"sample-{count}.jsonl"
        if not file.exists():
            draft = file.with_suffix(f".{os.getpid()}")
            lines = (json.dumps(elsewhere(row.values), default=as_text) + "\n" for row in rows)
            draft.write_text("".join(lines), encoding="utf-8")
            draft.replace(file)
        longest = min(LONGEST, max(row.length for row in rows))
        cut = {} if isinstance(self.data, PromptData) else {"max_length": longest, "overflow": "truncate"}
        changes = {**cut, "invalid": "drop", "cache_dir": self.folder / "cache", **changes}
        sources = [Source(name_or_path=str(file))]
        return attrs.evolve(self.data, sources=sources, eval_sources=[], eval_split=0.0, **changes)

    # -- models -----------------------------------------------------------------------

    def small(self, block: HFModel, name: str) -> HFModel:
        """Return a model block of the same architecture, narrow and with random weights, saved in a folder `name`."""
        import torch

        config = tiny(block.read_config(), layers=type(block).configured is HFModel.configured)
        folder = self.folder / name
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                kind = block.auto_class(config)
                made = kind.from_config(config, dtype=torch.float32, trust_remote_code=block.trust_remote_code)
            draft = folder.with_name(f"{name}.{os.getpid()}")
            made.save_pretrained(draft)
            if (images := images_of(self.tokenizer)) is not None:
                images.save_pretrained(draft)
            draft.rename(folder)
        changes: dict[str, Any] = {
            "name_or_path": str(folder), "config": {}, "dtype": "float32", "attn_implementation": "auto",
            "revision": None, "compile": False, "liger": False, "offload_activations": False, "kwargs": {},
            "lora": attrs.evolve(block.lora, dropout=0.0, start_from=None) if block.lora else None,
            "qat": attrs.evolve(block.qat, group_size=min(block.qat.group_size, 8)) if block.qat else None,
            "fp8": False,
        }  # fmt: skip
        return attrs.evolve(block, **changes)  # type: ignore[misc]

    # -- trainers ---------------------------------------------------------------------

    def make(self, name: str, **changes: Any) -> Trainer:
        """Return the recipe's trainer on the twin, in a folder of its own."""
        real, models = recipe.load(self.path, self.overrides), {}  # again: blocks may have a state
        for field in attrs.fields(type(real)):
            if field.init and isinstance(value := getattr(real, field.name), HFModel):
                models[field.name] = self.small(value, field.name)
        if changes.get("precision", self.precision) == EXACT:  # which torchao cannot round
            models = {field: attrs.evolve(model, qat=None) for field, model in models.items()}  # type: ignore[misc]
        tokenizer = real.tokenizer
        if isinstance(tokenizer, HFTokenizer):
            named = tokenizer.name_or_path or real.model.name_or_path
            tokenizer = attrs.evolve(tokenizer, name_or_path=named)  # type: ignore[misc]
        own = [callback for callback in real.callbacks if not type(callback).__module__.startswith("posttrain.")]
        asked = {
            **models, **short_replies(real), "tokenizer": tokenizer, "callbacks": own, "strategy": Auto(),
            "sequence": None, "checkpoint": [],
            "logger": [JSONL()], "output_dir": self.folder / name, "resume": "auto", "max_steps": 1, "stop_after": None,
            "eval_every": None, "log_every": 1, "overfit_first_batch": False, "accelerator": "cpu", "devices": 1,
            "num_nodes": 1, "precision": self.precision, **changes,
        }  # fmt: skip
        return attrs.evolve(real, **asked)

    def one_step(self, name: str, rows: int, devices: int = 1, parts: int = 1, **data: Any) -> Step:
        """Take one optimizer step on a sample of four rows of documents, cut as asked.

        Args:
            name: folder of the run.
            rows: rows of a micro-batch.
            devices: ranks.
            parts: micro-batches per rank.
            data: changes to the data block.
        """
        import torch

        trainer = self.make(
            name, data=self.sampled(4, **{"packing": False, **data}), micro_batch_size=rows, devices=devices,
            gradient_accumulation_steps=parts, optimizer=UnitDescent(), scheduler=Constant(), max_grad_norm=None,
            resume="never",
        )  # fmt: skip
        before: list[Any] = []

        @after("trainer.setup")
        def remember(owner: Trainer, run: Any) -> None:
            before.extend(p.detach().clone() for p in run.model.parameters() if p.requires_grad)

        try:
            run = trainer.train(callbacks=[remember])
        except RuntimeError as error:
            if self.precision == ROUGH or "dtype" not in str(error):
                raise
            self.precision = ROUGH
            return self.one_step(name, rows, devices, parts, **data)
        now = [p.detach() for p in run.model.parameters() if p.requires_grad]
        gradient = torch.cat([(old - new).double().flatten() for old, new in zip(before, now, strict=True)])
        return Step(run.last["loss"], gradient, dict(run.last))

    @cached_property
    def whole(self) -> Step:
        """A step in one micro-batch, which others are held against."""
        return self.one_step("4x1", rows=4)

    @cached_property
    def draws(self) -> bool:
        """Whether its network draws at random while it trains, as some routers do: then no two steps are alike."""
        import torch

        if not isinstance(self.real.model, HFModel):
            return False
        hf, found = self.small(self.real.model, "model").load().train(), []
        with torch.no_grad(), torch.random.fork_rng():
            ids = torch.randint(hf.config.get_text_config().vocab_size, (8, 64))
            for seed in range(2):
                torch.manual_seed(seed)
                found.append(hf(input_ids=ids, use_cache=False).logits)
        return not torch.equal(*found)

    def resumable(self, name: str) -> Trainer:
        """Return a trainer of six steps that saves every second one, with the recipe's optimizer and schedule."""
        return self.make(
            name, data=self.sampled(12), max_steps=6, micro_batch_size=2, gradient_accumulation_steps=1,
            checkpoint=[Resume(every=2)], precision="32-true",
        )  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what runs say to themselves: there are many of them, and only the table matters."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    log = logging.getLogger("posttrain")
    level = log.level
    log.setLevel(logging.ERROR)
    disable_progress_bar()
    silence_libraries()
    try:
        yield
    finally:
        log.setLevel(level)
        enable_progress_bar()
