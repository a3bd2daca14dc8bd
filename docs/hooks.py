"""What the site is made of besides its pages: parts of the README, source code, examples, and a page per kind of block.

mkdocs calls the functions named `on_...`. A page includes a section of a file with
`<!-- include FILE "## Heading" -->`, a piece of source with `<!-- source FILE NAME -->` (`hooks` behind it writes
beside a line what a callback can wrap), the list of all files with `<!-- files -->`, and what another library calls
things with `<!-- elsewhere LIBRARY -->`.
"""

import ast
import re
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
from mkdocs.structure.files import File, Files

from posttrain.recipes import elsewhere, explain
from posttrain.registry import KINDS, lookup, names
from posttrain.trainer import Trainer
from posttrain.trainers.sft import SFTTrainer

ROOT = Path(__file__).parent.parent
MARGIN = 94
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
HOMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "gallery.md",
}
"""Files of the repository -> pages that hold them."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written elsewhere, and the pictures beside them."""
    for readme in sorted(ROOT.glob("examples/*/README.md")):
        HOMES[str(readme.relative_to(ROOT))] = f"examples/{readme.parent.name}.md"
    HOMES.update({name: name for name in ("benchmarks/data_prep.md", "benchmarks/results.md")})
    for source, page in HOMES.items():
        if not (ROOT / "docs" / page).exists():
            files.append(File.generated(config, page, content=f"<!-- include {source} -->"))
    for kind in KINDS:
        files.append(File.generated(config, f"recipes/{kind}.md", content=reference(kind)))
    for picture in [*ROOT.glob("examples/*/*.png"), *ROOT.glob("benchmarks/*.png")]:
        name = str(picture.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put in what a page includes, and let its links lead to pages."""
    here = page.file.src_uri
    if not page.file.generated_by:  # what it links to is beside it in the repository, and may be a page elsewhere
        markdown = LINK.sub(lambda m: link(m, Path("docs") / Path(here).parent, here), markdown)
    markdown = re.sub(r"<!-- elsewhere (\S+) -->", lambda m: elsewhere.table(m[1]), markdown)
    markdown = re.sub(r'<!-- include (\S+)(?: "(.+?)")? -->', lambda m: section(m[1], m[2], here), markdown)
    markdown = markdown.replace("<!-- files -->", every_file())
    return re.sub(r"<!-- source (\S+) (\S+)( hooks)? -->", lambda m: source(m[1], m[2], bool(m[3])), markdown)


def every_file() -> str:
    """Return every folder with its files, each with the first sentence that it says of itself."""
    parts = []
    for folder in sorted({file.parent for file in (ROOT / "posttrain").rglob("*.py")}):
        parts.append(f"### {folder.relative_to(ROOT)}/\n\n{about(folder / '__init__.py')}\n")
        files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
        parts.append("\n".join(["| file | |", "|---|---|", *(f"| `{f.name}` | {first_sentence(f)} |" for f in files)]))
    return "\n\n".join(parts)


def about(file: Path) -> str:
    """Return what a module says of itself."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def first_sentence(file: Path) -> str:
    """Return the beginning of that."""
    return about(file).partition("\n\n")[0].replace("\n", " ").replace("|", "&#124;")


def section(name: str, heading: str | None, here: str) -> str:
    """Return a file, or one section of it, with its links as they are from the page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if heading:
        level = heading.split()[0]
        found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.M | re.S)
        assert found, f"{name} has no section {heading!r}"
        text = found[0]
    return LINK.sub(lambda m: link(m, Path(name).parent, here), text)


def link(found: "re.Match[str]", folder: Path, here: str) -> str:
    """Return a link of a file of the repository as it is from a page; files that are no pages are only named."""
    mark, text, target, rest = found[1], found[2], found[3], found[4] or ""
    if "://" in target:
        return found[0]
    path = (ROOT / folder / target).resolve().relative_to(ROOT)
    if path.parts[:2] == ("docs", "recipes"):  # made here
        return found[0]
    assert (ROOT / path).exists(), f"{folder}: {path} does not exist"
    home = HOMES.get(str(path)) or (str(path.relative_to("docs")) if path.parts[0] == "docs" else None)
    home = home or (str(path) if path.suffix == ".png" else None)
    if home is None:
        return text if text.strip("`") == str(path) else f"{text} (`{path}`)"
    up = PurePosixPath(*[".."] * (len(PurePosixPath(here).parts) - 1))
    return f"{mark}[{text}]({up / home}{rest})"


def source(name: str, wanted: str, hooks: bool) -> str:
    """Return the source of `Class.method`, as it is but for its docstring."""
    text = (ROOT / name).read_text(encoding="utf-8")
    body: list[Any] = ast.parse(text).body
    for part in wanted.split("."):
        (node,) = [n for n in body if getattr(n, "name", None) == part]
        body = node.body
    doc = node.body[0]
    kept = [*range(node.lineno - 1, doc.lineno - 1), *range(doc.end_lineno or 0, node.end_lineno)]  # without docstring
    lines = textwrap.dedent("\n".join(text.splitlines()[i] for i in kept)).splitlines()
    if hooks:
        lines = [f"{line:<{MARGIN}}# {', '.join(found)}" if (found := wrapped(line)) else line for line in lines]
    return f'```python title="{name}"\n' + "\n".join(lines) + "\n```"


def wrapped(line: str) -> list[str]:
    """Return what a callback can wrap of the calls in a line."""
    fields = {field.name for field in attrs.fields(Trainer) if field.init}
    found = []
    for owner, method in re.findall(r"(?<![.\w])((?:self\.)?[a-z]+)\.([a-z_]+)\(", line):
        owner = owner.removeprefix("self.")
        if owner == "self" and callable(getattr(Trainer, method, None)):
            found.append(f"trainer.{method}")
        elif owner in fields:
            found.append(f"{owner}.{method}")
    return found if not line.lstrip().startswith("def ") else []


def reference(kind: str) -> str:
    """Return the page of a kind of block: what each takes, read from the classes."""
    about = explain.paragraphs(KINDS[kind] or Trainer)
    parts = [f"# {kind}", *about]
    if kind == "trainer":
        parts.append("Keys that every trainer takes are listed with `sft`; the others show what is their own.")
    common = {field.name for field in explain.init_fields(SFTTrainer)}
    for name in sorted(names(kind), key=lambda name: name != "sft"):
        cls = lookup(kind, name)
        parts += [f"## {name}", "\n\n".join(explain.paragraphs(cls)), f"`{cls.__module__}.{cls.__qualname__}`"]
        own = kind == "trainer" and name != "sft"
        parts.append(keys(cls, common - {"model", "data"} if own else set()))
        for value in explain.values_of(cls):
            parts += [f"### {value.__name__} of {name}", "\n\n".join(explain.paragraphs(value)), keys(value, set())]
    return "\n\n".join(parts)


def keys(cls: type, hidden: set[str]) -> str:
    """Return the table of a class's keys."""
    rows = [(name, type_, default, text) for name, type_, default, text in explain.keys(cls) if name not in hidden]
    if not rows:
        return "No keys."
    cells = [
        f"| `{name}` | {type_} | {default} | {text.replace('|', '&#124;')} |" for name, type_, default, text in rows
    ]
    return "\n".join(["| key | takes | default | |", "|---|---|---|---|", *(c.replace("\n", " ") for c in cells)])
