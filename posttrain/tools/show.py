"""What people look at on a terminal: tokens in colour, ledgers as tables."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from posttrain.blocks.data.rows.sight import Box
from posttrain.blocks.loggers.ledger import said
from posttrain.words import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from posttrain.blocks.data.data import Preview
    from posttrain.blocks.data.encoding.encoders import Token

SUPERVISED = ("black on green3", "black on green1")
"""In turn, so that one sees where a token ends."""
MASKED = ("dim", "dim underline")
ROLE_WIDTH = 10


def tokens(previews: "Iterable[Preview]", console: "Console") -> None:
    """Print documents token by token: supervised ones stand out, roles at the left, a rule between documents."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    coloured = console.is_terminal and not console.no_color
    line = "─" if coloured else "-"
    console.print(_legend(coloured))
    counts, told = [], None
    for preview in previews:
        if (read := said(preview.columns)) not in (None, told):
            told = read
            console.print(Text(f"{preview.source.rpartition(':')[0] or preview.source}: {told}"))
        supervised = sum(trained for _, trained, _ in preview.tokens)
        size = sum(token.tokens if isinstance(token, Box) else 1 for token, _, _ in preview.tokens)
        counts.append((size, supervised))
        name = f"{preview.source} {preview.side}".rstrip()
        title = Text(f"{name}  {counted(size, 'token')}, {supervised:,} supervised")
        console.print(Rule(title, align="left", characters=line))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", width=ROLE_WIDTH, style="cyan", overflow="fold")
        grid.add_column(overflow="fold")
        for role, text in _stretches(preview.tokens, coloured):
            grid.add_row(Text(role or "..."), text)
        console.print(grid)
    total, trained = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    console.print(Rule(characters=line))
    share = f" ({trained / total:.1%})" if total else ""
    sums = f"{counted(len(counts), 'document')}, {counted(total, 'token')}, {trained:,} supervised{share}"
    console.print(Text(sums))


def _legend(coloured: bool) -> "Text":
    from rich.text import Text

    if not coloured:
        return Text("[supervised text] is in brackets, the rest is masked; at the left stands whose text it is")
    legend = Text()
    legend.append(" supervised ", SUPERVISED[0]).append(" supervised ", SUPERVISED[1]).append("  ")
    legend.append("masked ", MASKED[0]).append("masked", MASKED[1])
    return legend.append("   the shade changes with each token; ↵ ends a line")


def _stretches(tokens: "list[Token]", coloured: bool) -> "Iterator[tuple[str, Text]]":
    """Yield (role, text) for each stretch of one role."""
    from rich.text import Text

    shades = itertools.cycle((0, 1))
    for role, stretch in itertools.groupby(tokens, key=lambda token: token[2]):
        text = Text()
        if coloured:
            for (token, trained, _), shade in zip(stretch, shades, strict=False):
                text.append(_visible(token).replace("\n", "↵\n"), (SUPERVISED if trained else MASKED)[shade])
        else:
            for trained, run in itertools.groupby(stretch, key=lambda token: token[1]):
                joined = _visible("".join(token for token, _, _ in run))
                text.append(f"[{joined}]" if trained else joined)
        if breaks := len(text.plain) - len(text.plain.rstrip("\n")):
            text.right_crop(breaks)  # they would leave lines empty
        yield role, text


def _visible(text: str) -> str:
    """Show what would move the cursor or vanish."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
