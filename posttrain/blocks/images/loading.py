"""The processor of a model, loaded without torchvision, which only its part for videos needs.

A processor names its parts in an order of its own and hands them on by position. What is for videos and sound is left
out: such parts are None where the processor expects them, and no part of it afterwards.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import ProcessorMixin
from transformers.utils import cached_file, is_torchvision_available

from posttrain.blocks.images.processor import UNSEEN, Processor
from posttrain.errors import RecipeError
from posttrain.registry import suggest

INSTALL = "pip install 'posttrain[vision]'"


def load(name: str, tokenizer: Any, config: Any, hub: dict[str, Any], changes: dict[str, Any]) -> Processor | None:
    """Return the processor that lies beside a model; None if there is none, or Pillow is not installed.

    Args:
        name: folder or hub name.
        tokenizer: of the run.
        config: of the model.
        hub: how it is to be fetched.
        changes: arguments of the processor that a recipe gives.

    Raises:
        RecipeError: it does not take such arguments, or needs a package that is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        return None
    try:
        said = ProcessorMixin.get_processor_dict(name, **hub)[0]
        kind = said.get("processor_class") or _class_said(name, hub)
    except OSError:  # it is no folder, and not on the hub
        return None
    if kind is None:
        return None
    try:
        theirs = class_of(kind).from_pretrained(name, **hub, **changes)
    except (ImportError, OSError, ValueError) as error:
        raise RecipeError(f"the processor of images of {name!r} cannot be loaded: {error}") from error
    _refuse_unknown(theirs, changes)
    return Processor(theirs, tokenizer, config, said)


def _class_said(name: str, hub: dict[str, Any]) -> str | None:
    """Return the class of processor that the file of an image processor names, if there is one."""
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        found = cached_file(name, file, **hub, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if found and (kind := json.loads(Path(found).read_text(encoding="utf-8")).get("processor_class")):
            return str(kind)
    return None


def _refuse_unknown(theirs: Any, changes: dict[str, Any]) -> None:
    """Refuse arguments that would change nothing.

    Raises:
        RecipeError: there are some.
    """
    known = set(getattr(theirs.image_processor.valid_kwargs, "__annotations__", {}))
    known |= set(theirs.image_processor.to_dict())
    for name in changes:
        if name not in known:
            kind = type(theirs.image_processor).__name__
            raise RecipeError(f"tokenizer.processor: {kind} has no key {name!r}{suggest(name, known)}")


class SeesImages(ProcessorMixin):  # type: ignore[misc]
    """Stands behind a class of processor and before `ProcessorMixin`: keeps its parts but for the `UNSEEN`."""

    parts: ClassVar[list[str]]
    """All of them, in the order in which the processor takes them and hands them on."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        given = {**dict(zip(self.parts, parts, strict=False)), **named}
        super().__init__(**{name: part for name, part in given.items() if name not in UNSEEN})

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the parts that are loaded, kept and saved."""
        return [part for part in cls.parts if part not in UNSEEN]

    @classmethod
    def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
        found = iter(super()._get_arguments_from_pretrained(*args, **kwargs))
        return [None if part in UNSEEN else next(found) for part in cls.parts]

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """Take any: transformers expects a processor of images that needs torchvision."""


def class_of(name: str) -> Any:
    """Return a class of processor; without torchvision, one that leaves videos and sound out."""
    if is_torchvision_available():
        return getattr(transformers, name)
    with without_torchvision():
        module = importlib.import_module(f"transformers.{transformers._class_to_module[name]}")
    return for_images(getattr(module, name))


def for_images(theirs: Any) -> Any:
    """Return a class of processor that leaves videos and sound out."""
    said = {"parts": theirs.get_attributes(), "__module__": theirs.__module__}
    return type(theirs.__name__, (theirs, SeesImages), said)


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Let a processor that imports a helper from a module of torchvision's find it in that of Pillow."""
    wanted, there = "transformers.models.pixtral.image_processing_pixtral", "image_processing_pil_pixtral"
    if wanted in sys.modules:
        yield
        return
    sys.modules[wanted] = importlib.import_module(f"transformers.models.pixtral.{there}")
    try:
        yield
    finally:
        del sys.modules[wanted]
