"""Lower layers never import higher ones, so each file can be read on its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import posttrain

ROOT = Path(posttrain.__file__).parent
LAYERS = """
errors yaml12 interfaces registry values hooks failures launch signals watchdog run show folder crash blocks trainer trainers
scalars structure recipe convert synth explain tracing plan twin proofs plot accept doctor serve cli
""".split()  # noqa: SIM905 - reads as a list


def imported(tree: ast.Module) -> Iterator[str]:
    """What of posttrain a module imports when it is itself imported."""
    for node in tree.body:  # the top level: what TYPE_CHECKING or a function imports is free
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "posttrain":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_imports_only_go_down():
    for file in ROOT.rglob("*.py"):
        layer = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer == "__init__":
            continue
        assert layer in LAYERS, f"{file.name} belongs to no layer"
        for name in imported(ast.parse(file.read_text())):
            assert LAYERS.index(name) <= LAYERS.index(layer), f"{layer}: {file.name} imports {name}"


def test_no_module_of_posttrain_hides_one_that_others_import():
    import sys

    assert not {file.stem for file in ROOT.glob("*.py")} & set(sys.stdlib_module_names)
