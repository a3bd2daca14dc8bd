"""What decides what a row becomes, as text to be hashed: the tokenizer, and code that a user may have written."""

import hashlib
import inspect
import marshal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tokenizer_text(tokenizer: Any) -> str:
    """Return everything that a tokenizer is made of."""
    return str(tokenizer.backend_tokenizer.to_str()) + repr(sorted(tokenizer.special_tokens_map.items()))


def code_of(method: Callable[..., Any]) -> str:
    """Return what identifies code that a user may have written: the files of its classes, or else their bytecode.

    Whole files, because a method calls what stands beside it. Ours do not count: `store.FORMAT` stands for them.
    """
    owner = type(method.__self__) if inspect.ismethod(method) else method
    classes = inspect.getmro(owner) if inspect.isclass(owner) else (owner,)
    theirs = (item for item in classes if item.__module__.partition(".")[0] not in ("builtins", "posttrain"))
    return "\n".join(map(_code, theirs))


def _code(item: Any) -> str:
    try:
        return Path(inspect.getfile(item)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # typed at a prompt or into a notebook
        functions = vars(item).items() if inspect.isclass(item) else [(item.__qualname__, item)]
        code = [(name, marshal.dumps(f.__code__)) for name, f in functions if inspect.isfunction(f)]
        return hashlib.sha256(repr(sorted(code)).encode()).hexdigest()


def hash_of(*parts: str) -> str:
    """Return one hash of several texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
