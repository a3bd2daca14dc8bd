"""What in a folder a run has written: only that may be removed or replaced, whatever folder a recipe names.

A checkpoint is known by its name and by what is in it, an export by a list of its files that lies beside them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

LIST = "posttrain-export.json"
"""Names the files of an export; what else lies in the folder is not ours."""
CARD = "README.md"
CHECKPOINT = re.compile(r"step-\d{8,}")
UNFINISHED = re.compile(r"step-\d{8,}\.tmp-.+")
IN_CHECKPOINT = re.compile(r"manifest\.json|rank-\d{5}\.safetensors(\.json|\.part)?")
CONFIGURATIONS = ("config.json", "adapter_config.json")
"""Without one of them a folder is no model: they go first and come last, so that half an export does not load."""
IN_EXPORT = (
    *CONFIGURATIONS, "model*.safetensors", "adapter_model*", "*.index.json", "pytorch_model*", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model",
    "*processor_config.json", LIST,
)  # fmt: skip
"""What an export may write, and an export of posttrain 0.1, which has no list, has written."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is called like a checkpoint, and something of one is in it."""
    return bool(CHECKPOINT.fullmatch(folder.name)) and folder.is_dir() and bool(_of_checkpoint(folder))


def _of_checkpoint(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if IN_CHECKPOINT.fullmatch(path.name)]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or what a crash has left of one; a crash on the way leaves no half-removed `step-N`.

    If somebody else has put something into its folder, only the files of the checkpoint go.
    """
    if UNFINISHED.fullmatch(folder.name):  # nobody but us calls a folder so
        shutil.rmtree(folder)
    elif {path.name for path in folder.iterdir()} - set(_of_checkpoint(folder)):
        _remove(folder, sorted(_of_checkpoint(folder)))  # the manifest first: without it, no run resumes from here
    else:
        shutil.rmtree(folder.rename(folder.with_suffix(f".tmp-old-{os.getpid()}")))


def remove_run(folder: Path, files: Iterable[str]) -> None:
    """Remove what an earlier run has left in its folder, and nothing else.

    Args:
        folder: of the run.
        files: patterns of its own files.
    """
    for path in list(folder.iterdir()):
        if path.is_dir() and (CHECKPOINT.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)):
            remove_checkpoint(path)
    export = folder / "huggingface"
    for place in (*export.glob("step-*"), export):
        _remove(place, exported(place, default=True))
    for name, pattern in (("tensorboard", "events.out.tfevents.*"), ("refresh", "pass-*.jsonl")):
        _remove(folder / name, [path.name for path in (folder / name).glob(pattern)])
    _remove(folder, [path.name for pattern in files for path in folder.glob(pattern)], itself=False)


def exported(folder: Path, default: bool) -> list[str]:
    """Return the files of the export that is in a folder, relative to it; none if there is no export of ours.

    Args:
        folder: where it may be.
        default: whether the folder is that of a run's own, in which there may be an export without a list.
    """
    mark = folder / LIST
    if mark.is_file():
        try:
            return [*map(str, json.loads(mark.read_text(encoding="utf-8"))["files"]), LIST]
        except (ValueError, KeyError, TypeError):
            return []
    return looks_exported(folder) if default else []


def looks_exported(folder: Path) -> list[str]:
    """Return the files in a folder that are named like those of an export."""
    files = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sorted(name for name in files if any(fnmatch(name, pattern) for pattern in IN_EXPORT))


def in_the_way(folder: Path, ours: Iterable[str]) -> str | None:
    """Say what keeps an export from being put into a folder, if something does.

    Args:
        folder: its place.
        ours: the files of an export there that may be replaced.
    """
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file: the model cannot be exported there"
    if others := sorted(set(looks_exported(folder)) - set(ours)):
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        return (
            f"the export would replace files in {folder} that no run of this program has listed as its own ({names}): "
            "give the checkpoint of type huggingface another output_dir, or move them away"
        )
    return None


def put_in_place(aside: Path, folder: Path, old: Iterable[str]) -> None:
    """Give a new export its place, with a list of its files; other files in the folder stay as they are.

    Args:
        aside: the new export, on the same file system.
        folder: its place.
        old: the files of an export of ours in it, which it replaces.

    Raises:
        FileExistsError: a file of its names is there, and is not ours.
    """
    replaced = set(old) | {LIST}
    if (folder / CARD).exists():  # people write such a file themselves
        (aside / CARD).unlink(missing_ok=True)
    new = sorted(str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
    listed = [name for name in new if name != CARD]
    (aside / LIST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    if not folder.exists() or not any(folder.iterdir()):
        aside.rename(folder)  # over an empty folder, too
        return
    if others := [name for name in new if name not in replaced and (folder / name).exists()]:
        raise FileExistsError(f"there is another {', '.join(others)}")
    (folder / LIST).write_text(json.dumps({"files": sorted(replaced.union(listed) - {LIST})}), encoding="utf-8")
    _remove(folder, sorted(replaced - {LIST}, key=lambda name: name not in CONFIGURATIONS), itself=False)
    for name in sorted(new, key=lambda name: name in CONFIGURATIONS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).rename(folder / name)
    (aside / LIST).rename(folder / LIST)
    shutil.rmtree(aside)


def _remove(folder: Path, names: Iterable[str], itself: bool = True) -> None:
    """Remove files, and the folders that are empty then; a name that leads out of the folder is not followed."""
    inside = [folder / name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
    for file in inside:
        file.unlink(missing_ok=True)
    for place in sorted({file.parent for file in inside} | {folder}, key=lambda path: -len(path.parts)):
        if place.is_dir() and (itself or place != folder) and not any(place.iterdir()):
            place.rmdir()
