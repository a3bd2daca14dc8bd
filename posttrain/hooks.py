"""Callbacks around methods of blocks and of the trainer.

A callback marks its methods with the target they belong to:

    @block("callback", "clamp")
    class Clamp:
        limit: float = 10.0

        @after("trainer.loss")
        def check(self, trainer, loss):
            return loss.clamp(max=self.limit)

A plain function can be marked too, and handed to `trainer.train(callbacks=[function])`.

Wrapping happens once per run, on the *instance*: `bound()` replaces `trainer.loss` by a wrapper
around whatever `trainer.loss` is by then. An override in a subclass is therefore wrapped like the
original, a `super().loss(batch)` inside it is a plain call, so that hooks fire exactly once, and
nothing is left behind when the run is over.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias, TypeVar

from posttrain.errors import HookError
from posttrain.registry import suggest

F = TypeVar("F", bound=Callable[..., Any])
Hooks: TypeAlias = dict[str, list[Callable[..., Any]]]
"""What to call "before" and "after" one method, in the order of the callbacks."""


def before(target: str) -> Callable[[F], F]:
    """Call the method first, with `(owner, *args, **kwargs)`. It returns new arguments as a tuple, or None. Keyword
    arguments that the tuple does not reach stay as they are.

    `target` is `trainer.<method>` or `<field>.<method>`, such as `trainer.loss` or `model.build`;
    a field that holds a list (`checkpoint.save`) means each of its blocks.
    """
    return functools.partial(_mark, when="before", target=target)


def after(target: str) -> Callable[[F], F]:
    """Call the method afterwards, with `(owner, result)`. It returns a new result, or None to keep it."""
    return functools.partial(_mark, when="after", target=target)


@contextmanager
def bound(trainer: Any, callbacks: Iterable[Any]) -> Iterator[None]:
    """Wrap the targeted methods for the time of one run.

    Raises:
        HookError: a target does not exist, or a callback has no marked method at all.
    """
    wanted: dict[tuple[int, str], tuple[Any, Hooks]] = {}
    for callback in callbacks:
        marked = list(_marked(callback))
        if not marked:
            raise HookError(f"{callback!r} has no method marked with @before(...) or @after(...)")
        for hook, when, target in marked:
            for owner, method in _resolve(trainer, target):
                _, hooks = wanted.setdefault((id(owner), method), (owner, {"before": [], "after": []}))
                hooks[when].append(hook)
    with ExitStack() as stack:
        for (_, method), (owner, hooks) in wanted.items():
            stack.enter_context(_wrapped(owner, method, hooks))
        yield


def targets(trainer: Any) -> list[str]:
    """Every method that a callback can wrap, as `trainer.loss`, `optimizer.build`, ..."""
    found = [f"trainer.{name}" for name in _methods(trainer)]
    for field in vars(trainer):
        value = getattr(trainer, field)
        for owner in value if isinstance(value, list) else [value]:
            if hasattr(type(owner), "__attrs_attrs__") and field != "run":
                found += [f"{field}.{name}" for name in _methods(owner)]
    return sorted(set(found))


def _mark(function: F, *, when: str, target: str) -> F:
    function.__dict__.setdefault("_hooks", []).append((when, target))
    return function


def _marked(callback: Any) -> Iterator[tuple[Callable[..., Any], str, str]]:
    if hasattr(callback, "_hooks"):  # a function
        for when, target in callback._hooks:
            yield callback, when, target
        return
    for name in dir(type(callback)):
        for when, target in getattr(getattr(type(callback), name), "_hooks", ()):
            yield getattr(callback, name), when, target


def _resolve(trainer: Any, target: str) -> list[tuple[Any, str]]:
    field, _, method = target.rpartition(".")
    found = trainer if field == "trainer" else getattr(trainer, field, None)
    owners = found if isinstance(found, list) else [found]
    if found is None or not all(callable(getattr(owner, method, None)) for owner in owners):
        known = targets(trainer)
        raise HookError(f"there is no method {target!r} to wrap{suggest(target, known)} (known: {', '.join(known)})")
    return [(owner, method) for owner in owners]


@contextmanager
def _wrapped(owner: Any, name: str, hooks: Hooks) -> Iterator[None]:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        for hook in hooks["before"]:
            if (replaced := hook(owner, *args, **kwargs)) is not None:
                if not isinstance(replaced, tuple):
                    raise HookError(
                        f"{hook.__qualname__} runs before {name}() and must return its new arguments as a tuple, "
                        f"or None to keep them; it returned {type(replaced).__name__}"
                    )
                given = inspect.signature(inner).bind_partial(*replaced).arguments
                args, kwargs = replaced, {name: value for name, value in kwargs.items() if name not in given}
        result = inner(*args, **kwargs)
        for hook in hooks["after"]:
            if (replaced := hook(owner, result)) is not None:
                result = replaced
        return result

    shadowed = vars(owner).get(name)
    object.__setattr__(owner, name, call)  # blocks are frozen: this is the one place that goes around it
    try:
        yield
    finally:
        if shadowed is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, shadowed)


def _methods(owner: Any) -> list[str]:
    cls = type(owner)
    return [n for n in dir(cls) if not n.startswith("_") and callable(getattr(cls, n))]
