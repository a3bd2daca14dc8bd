"""Recipes, tokens and ledgers on a terminal, and readable as well where there is none."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

SUPERVISED = ("black on green3", "black on green1")
"""In turn, so that one sees where a token ends."""
MASKED = ("dim", "dim underline")
ROLE_WIDTH = 10


class Document(Protocol):
    """A document as the model will see it."""

    @property
    def source(self) -> str:
        """Where it comes from."""

    @property
    def tokens(self) -> list[tuple[str, bool, str]]:
        """Text, whether it is supervised, and the role it belongs to, for each token."""


def yaml(text: str) -> None:
    """Print YAML, coloured on a terminal."""
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(Syntax(text, "yaml", theme="ansi_dark", background_color="default"))
    else:
        console.out(text, end="", highlight=False)


def documents(found: Iterable[Document], console: Console | None = None) -> None:
    """Print documents token by token: supervised ones stand out, roles at the left, a rule between documents."""
    console = console or Console()
    coloured = console.is_terminal and not console.no_color
    console.print(_legend(coloured))
    counts = []
    for document in found:
        supervised = sum(trained for _, trained, _ in document.tokens)
        counts.append((len(document.tokens), supervised))
        title = Text(f"{document.source}  {len(document.tokens)} tokens, {supervised} supervised")
        console.print(Rule(title, align="left", characters="─" if coloured else "-"))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", width=ROLE_WIDTH, style="cyan", overflow="fold")
        grid.add_column(overflow="fold")
        for role, line in _lines(document.tokens, coloured):
            grid.add_row(Text(role), line)
        console.print(grid)
    total, trained = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    share = f" ({trained / total:.1%})" if total else ""
    console.print(Rule(characters="─" if coloured else "-"))
    console.print(Text(f"{len(counts)} documents, {total} tokens, {trained} supervised{share}"))


def documents_as_json(found: Iterable[Document]) -> None:
    """Print one JSON object per document."""
    console = Console(soft_wrap=True)
    for document in found:
        tokens = [{"text": text, "supervised": trained, "role": role} for text, trained, role in document.tokens]
        console.out(json.dumps({"source": document.source, "tokens": tokens}), highlight=False)


def ledger(data: dict[str, Any], console: Console | None = None) -> None:
    """Print a ledger: mappings of mappings as tables with a line per source, everything else as `name: value`."""
    console = console or Console()
    for name, entry in data.items():
        if not isinstance(entry, dict):
            console.print(Text(f"{_words(name)}: {_cell(entry)}"))
    tables = {name: entry for name, entry in data.items() if isinstance(entry, dict)}
    flat = {name: entry for name, entry in tables.items() if not any(isinstance(v, dict) for v in entry.values())}
    if flat:
        console.print(_table("", flat))
    for name in tables.keys() - flat.keys():
        rows = {row: e if isinstance(e, dict) else {"": e} for row, e in tables[name].items()}
        console.print(_table(_words(name), rows))


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(title=title or None, title_justify="left")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(_words(column), justify="right")
    for name, row in rows.items():
        table.add_row(Text(str(name)), *(Text(_cell(row.get(column, ""))) for column in columns))
    if len(rows) > 1:
        sums = [[row[c] for row in rows.values() if c in row and _is_number(row[c])] for c in columns]
        table.add_section()
        table.add_row("all", *(_cell(sum(numbers)) if numbers else "" for numbers in sums), style="bold")
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(entry)}" for name, entry in value.items())
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _legend(coloured: bool) -> Text:
    if not coloured:
        return Text("[supervised text is in brackets], text outside is masked; at the left, whose text it is")
    legend = Text("tokens: ")
    legend.append(" supervised ", SUPERVISED[0]).append(" supervised ", SUPERVISED[1]).append("  ")
    legend.append("masked ", MASKED[0]).append("masked", MASKED[1])
    return legend.append("   (the shade changes with each token; ⏎ ends a line)")


def _lines(tokens: list[tuple[str, bool, str]], coloured: bool) -> Iterator[tuple[str, Text]]:
    """Yield (role, text) for each stretch of one role."""
    shades = itertools.cycle((0, 1))
    for role, stretch in itertools.groupby(tokens, key=lambda token: token[2]):
        line = Text()
        if coloured:
            for (text, trained, _), shade in zip(stretch, shades, strict=False):
                line.append(_visible(text, True), (SUPERVISED if trained else MASKED)[shade])
        else:
            for trained, run in itertools.groupby(stretch, key=lambda token: token[1]):
                joined = _visible("".join(text for text, _, _ in run), False)
                line.append(f"[{joined}]" if trained else joined)
        line.right_crop(len(line.plain) - len(line.plain.rstrip("\n")))
        yield role, line


def _visible(text: str, mark_newlines: bool) -> str:
    """Show what would move the cursor or vanish."""
    shown = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
    return shown.replace("\n", "⏎\n") if mark_newlines else shown
