"""The folders of posttrain and how they depend on each other: imports run one way, and nowhere in a circle."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import posttrain

ROOT = Path(posttrain.__file__).parent
TESTS = Path(__file__).parent.parent
LAYERS = """
errors words yaml12 batch interfaces registry values hooks
runtime
run
blocks.layout blocks.optimizer blocks.joined blocks.scheduler blocks.losses
blocks.optimizers
blocks.parallel blocks.images
blocks.models
blocks.data blocks.tokenizers blocks.checkpoints blocks.loggers
blocks.rollouts
blocks.callbacks
blocks
keys
trainer
trainers
recipes
synth.errors
synth.ledger
synth.sending
synth.clients
synth.pipelines
synth.steps
synth.commands synth
tools
serve
cli
"""
"""From the bottom to the top: what stands on a line imports from lines above it, and from itself."""
FLOOR = {name: floor for floor, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
MODULES = {
    ".".join(("posttrain", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in ROOT.rglob("*.py")
}


def room(module: str) -> str:
    """Return the folder, or the single file, that a module belongs to."""
    parts = module.split(".")[1:]
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in FLOOR), ".".join(parts[:2]))


def imports(node: ast.AST, module: str) -> Iterator[str]:
    """Yield the modules that one imports, at its top or inside functions; what only type checkers read is free."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "posttrain":
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else str(child.module)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        yield from imports(child, module)


GRAPH = {
    module: sorted(set(imports(ast.parse(file.read_text()), module)) - {module, "posttrain"})
    for module, file in MODULES.items()
}
"""Module -> the modules of posttrain that it imports."""


def test_every_file_has_a_floor():
    assert not {module for module in MODULES if module != "posttrain" and room(module) not in FLOOR}


def test_imports_between_folders_run_one_way():
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        if module != "posttrain"
        for other in others
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
        and not (FLOOR[room(other)] == FLOOR[room(module)] and "." not in room(other) + room(module))
    ]  # fmt: skip
    assert not upward, "\n".join(upward)


def test_no_files_import_each_other():
    """Within a folder, too, one can read from the first file to the last."""
    done: set[str] = set()

    def circle(module: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if module in path:
            return (*path[path.index(module) :], module)
        found = () if module in done else next((c for o in GRAPH[module] if (c := circle(o, (*path, module)))), ())
        done.add(module)
        return found

    circles = [" -> ".join(found) for module in GRAPH if (found := circle(module, ()))]
    assert not circles, "\n".join(circles)


def test_no_folder_is_a_heap():
    folders = [ROOT, *ROOT.rglob("*/"), *TESTS.rglob("*/")]
    assert not {str(folder): n for folder in folders if (n := len(list(folder.glob("*.py")))) > 15}


def test_tests_of_one_room_import_from_no_other():
    """So that each file of tests runs by itself."""
    names = {file.stem: file.parent for file in TESTS.rglob("*.py")}
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            taken = [node.module] if isinstance(node, ast.ImportFrom) else []
            taken += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            rooms = {names[name] for name in taken if name in names}
            assert rooms <= {file.parent, TESTS / "support", TESTS}, f"{file} imports {taken}"


def test_every_folder_says_what_lives_there():
    for file in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_no_module_of_posttrain_hides_one_that_others_import():
    """`fabric run posttrain/cli.py` puts the folder first on the path."""
    assert not {path.stem for path in ROOT.iterdir()} & set(sys.stdlib_module_names)


def test_the_picture_shows_every_layer():
    picture = (ROOT.parent / "docs" / "img" / "layers.svg").read_text()
    for name in ("trainer", "keys", "run", "blocks.layout", "blocks.optimizer", "batch", "cli", *FLOOR):
        if "." not in name or name.startswith("blocks."):
            assert name.rpartition(".")[2] in picture, name
