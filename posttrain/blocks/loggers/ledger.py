"""What became of the rows of each source, as a table."""

from typing import TYPE_CHECKING, Any

from posttrain.words import counted, human

if TYPE_CHECKING:
    from rich.table import Table


def ledger(found: dict[str, Any]) -> "Table":
    """Return what became of the rows of each source, as a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    parts = [("", found), ("held out: ", found.get("eval", {}))]
    entries = [(prefix + source, entry) for prefix, part in parts for source, entry in part.get("sources", {}).items()]
    known = (
        "rows_in", "dropped", "too_long", "tokens_cut", "documents", "pairs", "tokens", "supervised_tokens", "images",
        "image_tokens", "images_shrunk",
    )  # fmt: skip
    summed = [(name, {**entry, "dropped": sum(map(_count, entry["dropped"].values()))}) for name, entry in entries]
    columns = [column for column in known if any(entry.get(column) for _, entry in summed)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("data", *columns):
        table.add_column(title.replace("_", " "), justify="left" if title == "data" else "right", overflow="fold")
    for name, entry in summed:
        table.add_row(Text(name), *(human(entry.get(column, 0)) for column in columns))
    reasons = [f"{source}: {read}" for source, entry in entries if (read := said(entry))]
    reasons += [
        f"{source}: {_count(count):,} dropped: {reason}"
        for source, entry in entries
        for reason, count in entry["dropped"].items()
    ]
    packing = found.get("packing")
    if packing:
        reasons.append(f"{counted(packing['rows'], 'row')} per epoch, filled to {packing['filled']:.1%}")
    table.caption = Text("\n".join(reasons)) if reasons else None
    table.caption_justify = "left"
    return table


def _count(dropped: int | dict[str, Any]) -> int:
    return dropped if isinstance(dropped, int) else int(dropped["count"])


def said(entry: dict[str, Any]) -> str | None:
    """Return what an entry of the ledger says about columns, as a sentence."""
    if "schema" not in entry:
        return None
    unused = f"; not used: {', '.join(entry['unused'])}" if entry["unused"] else ""
    return f"{entry['schema']}: read {', '.join(entry['read'])}{unused}"
