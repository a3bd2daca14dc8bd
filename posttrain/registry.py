"""Names for blocks: `type: adamw` in a recipe <-> a class in Python.

A block is a frozen attrs class whose fields are the keys of the recipe. `@block` makes it one,
registers it under a name, and refuses it at once if its methods do not fit the kind's Protocol.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, TypeVar, cast, dataclass_transform

import attrs

from posttrain import interfaces
from posttrain.errors import RegistryError

T = TypeVar("T")

KINDS: dict[str, type | None] = {
    "trainer": None,  # a subclass of Trainer
    "model": interfaces.ModelBlock,
    "tokenizer": interfaces.TokenizerBlock,
    "data": interfaces.DataBlock,
    "optimizer": interfaces.OptimizerBlock,
    "scheduler": interfaces.SchedulerBlock,
    "strategy": interfaces.StrategyBlock,
    "sequence": interfaces.SequenceBlock,
    "checkpoint": interfaces.CheckpointBlock,
    "logger": interfaces.LoggerBlock,
    "callback": interfaces.CallbackBlock,
    "sampler": interfaces.SamplerBlock,
    "reward": interfaces.RewardBlock,
    "environment": interfaces.EnvironmentBlock,
    "synth": interfaces.SynthBlock,
    "step": interfaces.StepBlock,
}
"""Kind of block -> what it must provide. `kind` adds to them."""

_HOMES = {
    "synth": tuple(
        f"posttrain.synth.clients.{name}"
        for name in ("openai", "anthropic", "gemini", "bedrock", "vllm", "cortex", "transformers")
    ),
    "step": ("posttrain.synth.steps",),
    "callback": ("posttrain.synth.pipelines.refresh", "posttrain.synth.steps.answers"),
    "reward": ("posttrain.synth.rewards",),
    "environment": ("posttrain.synth.environments",),
}
"""Kind -> modules that hold blocks of it, besides `posttrain.blocks` and `posttrain.trainers`. They are imported when
somebody asks for a block of that kind: those of synth import httpx, which a recipe of a trainer must not wait for."""

_blocks: dict[tuple[str, str], type] = {}
_names: dict[type, str] = {}


def kind(name: str) -> Callable[[type[T]], type[T]]:
    """Add a kind of block: a Protocol that says what blocks of it must provide.

    A field of that type then takes any block of the kind, from Python and from a recipe (`sampler: {type: mine}`).
    A plugin that adds one names its module in the entry-point group `posttrain.kind`.

    Raises:
        RegistryError: there is another kind of that name.

    >>> @kind("doctest-sampler")
    ... class SamplerBlock(Protocol):
    ...     def sample(self, prompt): ...
    >>> @block("doctest-sampler", "echo")
    ... class Echo:
    ...     def sample(self, prompt):
    ...         return prompt
    >>> lookup("doctest-sampler", "echo")().sample("hello")
    'hello'
    """

    def register(protocol: type[T]) -> type[T]:
        known = KINDS.get(name)
        if name in KINDS and (known is None or _home(known) != _home(protocol)):
            raise RegistryError(f"there is a block kind {name!r} already; {where(protocol)} needs another name")
        KINDS[name] = protocol
        return protocol

    return register


def kind_of(interface: Any) -> str | None:
    """Return the kind of block that a Protocol describes, or None if it describes none."""
    return next((name for name, known in KINDS.items() if known is interface), None) if interface else None


def checked_kind(name: str) -> str:
    """Return the name of a kind; a plugin that adds it is imported only now.

    Raises:
        RegistryError: there is no such kind.
    """
    for plugin in entry_points(group="posttrain.kind") if name not in KINDS else ():
        plugin.load()
    if name not in KINDS:
        raise RegistryError(f"there is no block kind {name!r}{suggest(name, KINDS)} (kinds: {', '.join(KINDS)})")
    return name


def key(
    default: Any = attrs.NOTHING,
    *,
    factory: Callable[[], Any] | None = None,
    also: tuple[str, ...] = (),
    check: Any = None,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A field with more to say than its default: other names a recipe may use, and a check.

    `also` holds the names that users of other libraries know (`train_iters` for `max_steps`);
    `check` is an attrs validator, such as `attrs.validators.gt(0)`; `convert` is what makes `"runs/a"` a
    Path when a block is made from Python.
    """
    made = attrs.Factory(factory) if factory is not None else default
    return attrs.field(default=made, validator=check, converter=convert, metadata={"also": also})


def default(block: type[T], *, required: bool = False, optional: bool = False, also: tuple[str, ...] = ()) -> T:
    """A field holding a block; a recipe that gives no `type` for it means this class.

    Without a value, the field holds such a block with its defaults; a `required` one must be given, an
    `optional` one is None. `also` holds other names that a recipe may use.
    """
    made = attrs.NOTHING if required else None if optional else attrs.Factory(block)
    return cast(T, attrs.field(default=made, metadata={"block": block, "also": also}))


@dataclass_transform(kw_only_default=True, field_specifiers=(attrs.field,))
def block(kind: str, name: str, *, also: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Make a class a block: keyword-only attrs fields, and a name for `type:`.

    Args:
        kind: one of `KINDS`, or one that was added by `kind`.
        name: what a recipe calls it.
        also: other names that a recipe may use.

    Raises:
        RegistryError: the kind is unknown, the class does not fit it, or the name is taken.

    >>> @block("optimizer", "doctest-sgd")
    ... class SGD:
    ...     lr: float = 0.1
    ...     def build(self, model):
    ...         return torch.optim.SGD(model.parameters(), self.lr)
    >>> lookup("optimizer", "doctest-sgd")(lr=0.5)
    SGD(lr=0.5)
    """
    checked_kind(kind)

    def register(cls: type[T]) -> type[T]:
        # Not slotted, so that callbacks can wrap methods of one instance (see hooks.py).
        if kind == "trainer":
            cls = attrs.define(cls, kw_only=True, slots=False, eq=False)
        else:
            cls = attrs.frozen(cls, kw_only=True, slots=False)
        if problem := mismatch(cls, KINDS[kind]):
            raise RegistryError(f"{where(cls)} is not a {kind}: {problem}")
        for called in (name, *also):
            known = _blocks.get((kind, called))
            if known is not None and _home(known) != _home(cls):
                taken = f"{kind} {called!r} is already registered by {where(known)}"
                raise RegistryError(f"{taken}; {where(cls)} needs another name")
            _blocks[kind, called] = cls  # the same class again (a notebook cell, a reload) replaces itself
        _names[cls] = name
        return cls

    return register


def members(function: Callable[..., Any], **more: Any) -> dict[str, Any]:
    """Return the members of a class that stands for a function: its keyword arguments are the keys of a recipe.

    Args:
        function: documented, and with types.
        more: methods that call it.

    >>> members(lambda row, *, times=2: times)["times"]
    2
    """
    asked = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = typing.get_type_hints(function)
    return {
        **{p.name: p.default for p in asked if p.default is not inspect.Parameter.empty},
        "__annotations__": {p.name: hints.get(p.name, Any) for p in asked}, "__doc__": function.__doc__,
        "__module__": function.__module__, "__qualname__": function.__qualname__, **more,
    }  # fmt: skip


def lookup(kind: str, name: str) -> type[Any]:
    """Return the class registered under a name, importing a plugin only if it is asked for."""
    _import_shipped(kind)
    if (kind, name) not in _blocks:
        for plugin in entry_points(group=f"posttrain.{kind}", name=name):
            plugin.load()
    try:
        return _blocks[kind, name]
    except KeyError:
        known = names(kind)
        raise RegistryError(f"there is no {kind} {name!r}{suggest(name, known)} (known: {', '.join(known)})") from None


def names(kind: str) -> list[str]:
    """All names of a kind: shipped, registered by user code, or offered by a plugin."""
    _import_shipped(kind)
    plugins = entry_points(group=f"posttrain.{kind}").names
    return sorted({n for k, n in _blocks if k == kind} | plugins)


def name_of(cls: type) -> str | None:
    """Return what a recipe calls a class, or None if it is not a registered block."""
    return _names.get(cls)


def mismatch(cls: type, interface: type | None) -> str | None:
    """Say how a class falls short of an interface, for those who do not run mypy."""
    for name, wanted in vars(interface).items() if interface else ():
        if name.startswith("_") or not inspect.isfunction(wanted):
            continue
        found = getattr(cls, name, None)
        if not callable(found):
            return f"it has no method {name}{inspect.signature(wanted)}"
        arguments = list(inspect.signature(wanted).parameters)
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError as error:
            return f"{name}({', '.join(arguments)}) does not fit {name}{inspect.signature(found)}: {error}"
    return None


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or nothing if no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def where(cls: type) -> str:
    """Say where a class was written: `Name (file:line)`."""
    try:
        return f"{cls.__qualname__} ({inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]})"
    except (OSError, TypeError):  # typed at a prompt
        return f"{cls.__qualname__} ({cls.__module__})"


def _home(cls: type) -> tuple[str, str]:
    """What tells two classes apart: the qualified name, and the file or session it came from."""
    try:
        return cls.__qualname__, str(inspect.getsourcefile(cls))
    except (OSError, TypeError):
        return cls.__qualname__, cls.__module__


def _import_shipped(kind: str) -> None:
    """Register what ships with posttrain. These modules import nothing heavy."""
    for module in ("posttrain.blocks", "posttrain.trainers", *_HOMES.get(kind, ())):
        importlib.import_module(module)
