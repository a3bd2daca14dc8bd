"""Where rows come from: a local file or folder, or a dataset on the Hugging Face hub.

A source says what to read and how its columns are called. What the rows mean is the data block's business.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
from attrs.validators import gt, optional

from posttrain.blocks.data import snowflake, verifiers
from posttrain.blocks.data.cache import file_of
from posttrain.blocks.data.readers import ArrowRows, HubStream, Reader, Row, files_like, is_pattern, local_reader
from posttrain.blocks.data.rows.formats import format_of
from posttrain.errors import DataError
from posttrain.registry import key, suggest
from posttrain.values import Secret, default_cache, expanded


@attrs.frozen
class Known:
    """What a public dataset needs to be read, beyond its name."""

    columns: dict[str, str] = attrs.field(factory=dict)
    splits: dict[str, str] = attrs.field(factory=dict)
    name: str | None = None


KNOWN = {
    "AI-MO/NuminaMath-CoT": Known({"messages": "messages"}),
    "HuggingFaceH4/no_robots": Known({"messages": "messages"}),
    "HuggingFaceH4/ultrafeedback_binarized": Known({}, {"train": "train_prefs", "test": "test_prefs"}),
    "HuggingFaceH4/ultrachat_200k": Known({"messages": "messages"}, {"train": "train_sft", "test": "test_sft"}),
    "HuggingFaceTB/smoltalk": Known({"messages": "messages"}, name="all"),
    "Open-Orca/OpenOrca": Known({"system": "system_prompt", "prompt": "question", "response": "response"}),
    "Open-Orca/SlimOrca": Known({"messages": "conversations"}),
    "allenai/tulu-3-sft-mixture": Known({"messages": "messages"}),
    "databricks/databricks-dolly-15k": Known({"instruction": "instruction", "input": "context", "output": "response"}),
    "gsm8k": Known({"prompt": "question", "response": "answer"}, name="main"),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": Known({"prompt": "problem", "response": "solution"}),
    "lmsys/lmsys-chat-1m": Known({"messages": "conversation"}),
    "meta-math/MetaMathQA": Known({"prompt": "query", "response": "response"}),
    "microsoft/orca-math-word-problems-200k": Known({"prompt": "question", "response": "answer"}),
    "openai/gsm8k": Known({"prompt": "question", "response": "answer"}, name="main"),
    "tatsu-lab/alpaca": Known({"instruction": "instruction", "input": "input", "output": "output"}),
    "teknium/OpenHermes-2.5": Known({"messages": "conversations"}),
}
"""Public datasets -> how their columns and splits are called. What a recipe says goes first."""


@attrs.frozen
class Origin:
    """Where a row comes from."""

    source: "Source"
    at: Any
    """The reader's position in front of it."""


class Told(dict[str, Any]):
    """The values of a row, which also say where they come from."""

    origin: Origin


@attrs.frozen(kw_only=True, slots=False)
class Source:
    """Rows to train on.

    >>> Source(name_or_path="data.jsonl", columns={"prompt": "q", "response": "a"}).split is None
    True
    """

    shorthand: ClassVar[str] = "name_or_path"

    name_or_path: str
    """A file (jsonl, json, csv, parquet, or txt and md as one document each; all but parquet also as .gz), a pattern
    such as `notes/**/*.md`, a folder of files, a folder written by `Dataset.save_to_disk`, the name of a dataset on the
    hub, `snowflake:` with a table or a query, or `verifiers:` with the id of an environment, whose tasks are the rows
    (`verifiers:wordle?num_train=100`). From Python also rows themselves: dicts in a list, a `datasets.Dataset`, a
    generator."""
    name: str | None = None
    """Configuration of a hub dataset (`main` of `openai/gsm8k`), or of a folder whose README.md lists `configs:`."""
    split: str | None = None
    """Split of a hub dataset or folder; `train` unless given. The files of a folder belong to splits as on the hub: by
    their names (`train.jsonl`, `data/train_sft-00000-of-00003.parquet`), or as `configs:` in its README.md says."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Of Snowflake and verifiers, any text: a new one asks again."""
    columns: dict[str, str] = attrs.field(factory=dict)
    """Our name of a column -> theirs, where they differ: `{prompt: q, response: a}`, `{messages: chat}`."""
    weight: float = key(1.0, check=gt(0))
    """How often a pass over the data sees each row: 2 is twice, 0.5 is a random half."""
    share: float | None = key(None, check=optional(gt(0)))
    """Part of the examples of a pass that come from here, in proportion to the shares of the other sources; instead of
    `weight`. A pass is over when it would have to see a row twice."""
    max_rows: int | None = key(None, also=("sample_count",), check=optional(gt(0)))
    """Read only so many rows, from the beginning."""
    stream: bool = False
    """Read while training, without a cache: for what is too large to tokenize ahead. Makes every source a stream."""
    token: Secret | None = None
    """Hub token of a private dataset: `${HF_TOKEN}`; for Snowflake instead of `${SNOWFLAKE_TOKEN}`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what can be seen to be wrong without reading anything."""
        if not self.name_or_path:
            yield "name_or_path", "is empty"
        elif self.is_query:
            yield from self._wrong_query()
            return
        elif self._looks_local() and not self.path.exists() and not is_pattern(self.name_or_path):
            yield "name_or_path", self._missing()
        if self.share is not None and self.weight != 1:
            yield "share", "says how much comes from here, and so does `weight`; keep one of them"
        if self.path.is_file() and format_of(self.path) is None:
            yield "name_or_path", f"{self.name_or_path}: unknown format"
        if self.is_local:
            for field, value in (("name", self.name), ("revision", self.revision), ("token", self.token)):
                if value is not None and not (field == "name" and (self.path / "README.md").is_file()):
                    yield field, f"means nothing for a local file or folder ({self.name_or_path})"
        if self.path.is_file() and self.split not in (None, "train"):
            yield "split", f"a single file has no splits, so {self.split!r} cannot be chosen from it"

    def _wrong_query(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with rows that something else is asked for."""
        if self.name_or_path.startswith(snowflake.PREFIX):
            if not self.name_or_path.removeprefix(snowflake.PREFIX).strip():
                yield "name_or_path", "names no table and no query: snowflake:my_db.public.chats, snowflake:SELECT ..."
            for field in ("name", "split"):
                if getattr(self, field) is not None:
                    yield field, "means nothing for Snowflake"
            return
        if not verifiers.asked(self.name_or_path)[0]:
            yield "name_or_path", "names no environment: verifiers:gsm8k-v1"
        elif not verifiers.installed():
            yield "name_or_path", verifiers.INSTALL
        for field in ("name", "token"):
            if getattr(self, field) is not None:
                yield field, "means nothing for an environment of verifiers"
        if self.split not in (None, "train", "eval"):
            yield "split", f"an environment of verifiers has train and eval, and no {self.split!r}"

    @property
    def path(self) -> Path:
        """The name as a path."""
        return expanded(self.name_or_path)

    @property
    def is_query(self) -> bool:
        """Whether Snowflake or an environment is asked for the rows."""
        return self.name_or_path.startswith((snowflake.PREFIX, verifiers.PREFIX))

    @property
    def is_local(self) -> bool:
        """Whether this is a file or folder here; otherwise it is a hub name, or something is asked."""
        return not self.is_query and (self._looks_local() or self.path.exists())

    @property
    def label(self) -> str:
        """The name by which ledgers and messages call this source."""
        parts = [self.name_or_path, *(p for p in (self.name, self.split) if p)]
        return ":".join(parts)

    def open(self) -> Reader:
        """Find the data.

        Raises:
            DataError: it is not there, or cannot be read.
        """
        if self.is_query:
            return local_reader(self._asked(), "train")
        if not self.is_local:
            return self._open_hub()
        if not self.path.exists():
            if is_pattern(self.name_or_path):
                return files_like(self.path.absolute())
            raise DataError(self._missing())
        return local_reader(self.path, self.split or "train", self.name)

    def read(self, reader: Reader, state: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Yield rows with renamed columns, each with the JSON-able state to go on from after it."""
        number, at = (state["rows"], state["at"]) if state else (0, None)
        if number == self.max_rows:
            return
        columns = {**self._known().columns, **self.columns} if not self.is_local else self.columns
        for values, place, after in reader.rows(at):
            if number == 0:
                _check_columns(values, self.columns, place)
            number += 1
            named = Told(_renamed(values, columns))
            named.origin = Origin(self, at)
            yield Row(named, number - 1, place), {"rows": number, "at": after}
            at = after
            if number == self.max_rows:
                return

    def row(self, reader: Reader, at: Any) -> dict[str, Any]:
        """Return the row at a position, as `read` gives it."""
        columns = {**self._known().columns, **self.columns} if not self.is_local else self.columns
        return _renamed(reader.row(at), columns)

    @property
    def folder(self) -> Path:
        """Where relative paths in its rows begin."""
        return (self.path if self.path.is_dir() else self.path.parent) if self.is_local else Path()

    def fingerprint(self, reader: Reader, memory: Path | None = None) -> str:
        """Return a hash of the content and of how it is read; weights do not matter, they change no token."""
        known = self._known()
        said = [self.name, self.split, self.revision, self.max_rows, sorted(self.columns.items())]
        table = [sorted(known.columns.items()), sorted(known.splits.items()), known.name] if not self.is_local else []
        return hashlib.sha256(repr([reader.fingerprint(memory), said, table]).encode()).hexdigest()

    def _asked(self) -> Path:
        """Return the file with the rows that Snowflake or an environment gives."""
        name, cache = self.name_or_path, default_cache()
        if name.startswith(snowflake.PREFIX):
            return snowflake.rows_of(name, self.revision, self.token, cache)
        return verifiers.rows_of(name, self.split or "train", self.revision, self.max_rows, cache)

    def _known(self) -> Known:
        return KNOWN.get(self.name_or_path, Known())

    def _looks_local(self) -> bool:
        named = self.name_or_path.startswith((".", "/", "~")) or format_of(Path(self.name_or_path)) is not None
        return named or is_pattern(self.name_or_path)

    def _missing(self) -> str:
        parent = self.path.parent
        beside = [f.name for f in parent.iterdir()] if parent.is_dir() else []
        hint = suggest(self.path.name, beside) if parent.is_dir() else f"; there is no folder {parent}"
        return f"there is no file or folder {self.name_or_path}{hint}"

    def _open_hub(self) -> Reader:
        from datasets import load_dataset

        known = self._known()
        split = self.split or "train"
        try:
            dataset = load_dataset(
                self.name_or_path,
                self.name or known.name,
                split=known.splits.get(split, split),
                revision=self.revision,
                token=self.token.reveal() if self.token else None,
                streaming=self.stream,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            what = f"{self.name_or_path} is no local file or folder, and the hub dataset cannot be loaded"
            raise DataError(f"{what}: {type(error).__name__}: {error}") from error
        label = f"{self.name_or_path}[{split}]"
        return HubStream(dataset, label) if self.stream else ArrowRows(dataset, label)


def as_sources(found: Any) -> list[Source]:
    """Return sources, some of which may be given by their names alone, as mappings of their keys, or as rows.

    Rows are a list of dicts, a `datasets.Dataset`, or a generator of dicts (see cache.py).

    Raises:
        DataError: one of them is none of these.
    """
    if not isinstance(found, list | tuple) or is_rows(found):
        found = [found]
    return [_as_source(source) for source in found]


def is_rows(found: Any) -> bool:
    """Whether a list is one of rows, and not of sources."""
    return isinstance(found, list | tuple) and bool(found) and all(
        isinstance(row, dict) and "name_or_path" not in row for row in found
    )  # fmt: skip


def _as_source(found: Any) -> Source:
    if isinstance(found, Source):
        return found
    if isinstance(found, str | Path):
        return Source(name_or_path=str(found))
    if isinstance(found, dict) and "name_or_path" in found:
        known = {field.name for field in attrs.fields(Source)}
        if unknown := [name for name in found if name not in known]:
            raise DataError(f"sources: Source has no such key as {unknown[0]!r}{suggest(unknown[0], known)}")
        return Source(**found)
    if isinstance(found, dict):
        splits = type(found).__name__ == "DatasetDict"
        advice = f"choose one of its splits, {', '.join(map(str, found))}" if splits else "rows are a list of such"
        raise DataError(f"sources: {type(found).__name__} is no source; {advice}")
    if not isinstance(found, Iterable):
        advice = "write the name of a file, of a folder, or of a dataset on the hub, or give rows"
        raise DataError(f"sources: {type(found).__name__} is no source; {advice}")
    return Source(name_or_path=str(file_of(found)))


def _check_columns(values: dict[str, Any], columns: dict[str, str], place: str) -> None:
    """Refuse a mapping that the first row does not fit; later rows may lack what is optional."""
    for ours, theirs in columns.items():
        if theirs not in values:
            found = f"{suggest(theirs, values)} (columns: {', '.join(values)})"
            raise DataError(f"{place}: `columns` maps {ours} to {theirs!r}, which is not there{found}")


def _renamed(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row under our names; a mapped column leaves its old name, so that it is not read twice."""
    if not columns:
        return values
    kept = {name: value for name, value in values.items() if name not in columns and name not in columns.values()}
    return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
