"""Environments of the package `verifiers`: their tasks as rows, and how an episode of one is played.

There are two kinds of them. Those of `verifiers.v1` are a taskset and agents, which are programs; classic ones, which
verifiers had until 0.3, are a class with a dataset and a rubric. Both ask a model over HTTP.

Sources: verifiers 0.4.0, v1/env.py, v1/taskset.py, v1/serve/server.py; verifiers 0.3.1, legacy/envs/environment.py.
"""

import asyncio
import atexit
import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from posttrain.blocks.data.cache import asked_once
from posttrain.errors import DataError, TrainingError

PREFIX = "verifiers:"
INSTALL = "the package verifiers is not installed: pip install 'posttrain[verifiers]'"
KEY = "POSTTRAIN_POLICY_KEY"
"""Name of an environment variable that need not be set: the policy wants no key."""
MODEL = "policy"
ONE = threading.Lock()
"""Held by the thread that loads or starts what all share: episodes are played from many."""
log = logging.getLogger("posttrain")


class Environment(Protocol):
    """An environment of either kind."""

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the tasks of a split, `train` or `eval`, as rows."""

    async def play(self, row: dict[str, Any], base_url: str) -> float:
        """Play an episode of a task, with the model at an address, and return its reward."""


def installed() -> bool:
    """Return whether the package is there, without importing it."""
    return find_spec("verifiers") is not None


# -- rows -----------------------------------------------------------------------------


def asked(name: str) -> tuple[str, dict[str, Any]]:
    """Return the environment of a source and its arguments.

    >>> asked("verifiers:wordle?num_train=100&taskset.words=short")
    ('wordle', {'num_train': 100, 'taskset': {'words': 'short'}})
    """
    id_, _, query = name.removeprefix(PREFIX).partition("?")
    found: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        *outer, last = key.split(".")
        place = found
        for one in outer:
            place = place.setdefault(one, {})
        try:
            place[last] = json.loads(text)
        except ValueError:
            place[last] = text
    return id_, found


def rows_of(name: str, split: str, revision: str | None, max_rows: int | None, cache_: Path) -> Path:
    """Return the JSON lines file with the tasks of an environment; they are asked for if they were not before.

    Args:
        name: `verifiers:` and the environment's id, perhaps with arguments: `verifiers:wordle?num_train=100`.
        split: `train` or `eval`.
        revision: any text; another one asks again.
        max_rows: how many; all by default.
        cache_: folder; of processes that ask at once, one does.

    Raises:
        DataError: there is no such environment, or no such split.
    """
    id_, args = asked(name)
    if not installed():
        raise DataError(f"{name}: {INSTALL}")

    def rows() -> Iterator[dict[str, Any]]:
        yield from islice(loaded(id_, args).rows(split), max_rows)

    said = [version("verifiers"), id_, json.dumps(args, sort_keys=True), split, revision, max_rows]
    return asked_once("verifiers", said, rows(), name, cache_)


# -- environments ---------------------------------------------------------------------


def loaded(id_: str, args: dict[str, Any]) -> Environment:
    """Return an environment; the same one for the same arguments.

    Raises:
        DataError: there is none of that name, or it cannot be loaded.
    """
    with ONE:
        return _loaded(id_, json.dumps(args, sort_keys=True))


@cache
def _loaded(id_: str, args: str) -> Environment:
    if not installed():
        raise DataError(f"verifiers {id_}: {INSTALL}")
    from verifiers.v1.utils.loaders import taskset_class

    try:
        taskset_class(id_)
        kind: type[Tasks | Classic] = Tasks
    except ModuleNotFoundError as error:
        raise DataError(f"there is no environment {id_!r} of verifiers here: {error}") from None
    except (TypeError, AttributeError):  # it exports no taskset
        if find_spec("verifiers.legacy") is None:
            what = f"{id_!r} is no environment of verifiers {version('verifiers')}"
            raise DataError(f"{what}: it exports no Taskset; classic ones need verifiers 0.3.1") from None
        kind = Classic
    try:
        with own_signals():
            return kind(id_, json.loads(args))
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # of its author's code
        raise DataError(f"the environment {id_!r} cannot be loaded: {type(error).__name__}: {error}") from error


class Tasks:
    """An environment of `verifiers.v1`: a taskset, and the agents that play it."""

    def __init__(self, id_: str, args: dict[str, Any]) -> None:
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config

        taskset = {**args.get("taskset", {}), "id": id_}
        self.id, self.env = id_, load_environment(resolve_env_config({**args, "taskset": taskset}))
        self.serving: AsyncExitStack | None = None
        self.opening = asyncio.Lock()

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield its tasks."""
        if split != "train":
            raise DataError(f"the environment {self.id!r} has no split {split!r}; hold rows out with data.eval_split")
        for task in self.env.taskset:
            prompt, system = task.data.prompt, task.data.system_prompt
            said = [prompt] if isinstance(prompt, str) else [one.model_dump(exclude_none=True) for one in prompt or []]
            messages = [{"role": "user", "content": one} if isinstance(one, str) else one for one in said]
            first = [{"role": "system", "content": system}] if system else []
            shown = [*first, *(messages or [{"role": "user", "content": "(the environment begins)"}])]
            yield {"prompt": shown, "task": task.data.model_dump(mode="json", exclude_none=True)}

    async def play(self, row: dict[str, Any], base_url: str) -> float:
        """Play an episode; its reward is that of the agents that are trained, added up."""
        import verifiers.v1 as vf

        async with self.opening:
            if self.serving is None:
                self.serving = AsyncExitStack()
                await self.serving.enter_async_context(self.env.serving())
                _SERVING.append(self)
        kind = type(self.env.taskset).task_type()
        task = kind(kind.data_type().model_validate(row["task"]), self.env.taskset.config.task)
        client = vf.EvalClientConfig(base_url=base_url, api_key_var=KEY)
        episode = await self.env.run_episode(task, vf.ModelContext(model=MODEL, client=client))
        if not episode.ok:
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            raise TrainingError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode failed")
        return float(sum(trace.reward for trace in episode.traces if trace.agent is None or trace.agent.trainable))

    async def close(self) -> None:
        """Stop what it serves to its agents."""
        if self.serving is not None:
            await self.serving.aclose()


class Classic:
    """An environment that verifiers had until 0.3: a dataset, a rubric, and how turns are answered."""

    def __init__(self, id_: str, args: dict[str, Any]) -> None:
        import verifiers

        self.id, self.env = id_, verifiers.load_environment(id_, **args)
        if self.env.requires_group_rollouts:
            raise DataError(f"the environment {id_!r} compares the replies of a group, which cannot be used here")

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of its dataset, or of the one for evaluations."""
        yield from map(dict, self.env.get_dataset() if split == "train" else self.env.get_eval_dataset())

    async def play(self, row: dict[str, Any], base_url: str) -> float:
        """Play an episode.

        Raises:
            TrainingError: it failed, or a function of its rubric did, which verifiers counts as 0.
        """
        from verifiers.types import ClientConfig

        client = ClientConfig(api_base_url=base_url, api_key_var=KEY, max_retries=0)
        with troubles() as found:
            output = await self.env.run_rollout(row, client, MODEL, {})
        if error := output.get("error"):
            raise TrainingError(str(error))
        if found:
            raise TrainingError(found[0])
        return float(output["reward"])


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep what SIGINT and SIGTERM do: classic environments take them over, and a run would no longer end cleanly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TROUBLES: ContextVar[list[str] | None] = ContextVar("troubles", default=None)
"""What went wrong in the episode of the task in hand."""


class Heard(logging.Handler):
    """Hears of functions that failed: verifiers only writes them into its log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a failure for its episode."""
        found, text = TROUBLES.get(), record.getMessage()
        if found is not None and text.startswith("Error calling"):
            found.append(text)


HEARD = Heard(logging.ERROR)


@contextmanager
def troubles() -> Iterator[list[str]]:
    """Give a list to which failures are added meanwhile, of this task and those that it starts."""
    logging.getLogger("verifiers").addHandler(HEARD)  # once, however often
    found: list[str] = []
    token = TROUBLES.set(found)
    try:
        yield found
    finally:
        TROUBLES.reset(token)


# -- a loop of their own --------------------------------------------------------------


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the loop in which all episodes are played: what they share is served from one."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            with suppress(SystemExit):  # what verifiers raises where a key is missing ends an episode, not the loop
                loop.run_forever()

    threading.Thread(target=run, name="posttrain-verifiers", daemon=True).start()
    return loop


def played(id_: str, args: dict[str, Any], row: dict[str, Any], base_url: str) -> float:
    """Play an episode to its end, from any thread, and return its reward."""
    env = loaded(id_, args)
    with ONE:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(env.play(row, base_url), loop).result()


@atexit.register
def _close() -> None:
    if not _loop.cache_info().currsize:
        return
    for env in list(_SERVING):
        with suppress(Exception, SystemExit):
            asyncio.run_coroutine_threadsafe(env.close(), _loop()).result(10)


_SERVING: list[Tasks] = []
"""Environments that serve something to their agents, until the process ends."""
