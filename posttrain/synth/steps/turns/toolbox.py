"""All tools that a step offers, and the client that calls them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import attrs

from posttrain.errors import SynthError
from posttrain.registry import suggest
from posttrain.synth.clients.functions import Call, Functions
from posttrain.synth.pipelines.rows import Chat, Reply
from posttrain.synth.steps.turns.mcp import McpServer
from posttrain.synth.steps.turns.tools import PythonTool, found, given

ENDPOINT = "/tools"
TOOLS = "tools"
"""What steps call the client that answers calls."""


@attrs.frozen(slots=False)
class Toolbox:
    """Tools of functions and of servers."""

    functions: list[Any]
    servers: dict[str, McpServer]

    def __bool__(self) -> bool:
        return bool(self.functions or self.servers)

    @cached_property
    def python(self) -> dict[str, PythonTool]:
        """Those that are functions, by name."""
        return {made.name: made for made in (PythonTool(found(given)) for given in self.functions)}

    @cached_property
    def served(self) -> dict[str, list[dict[str, Any]]]:
        """Those of servers, which are started to ask for them."""
        made = {}
        for name, server in self.servers.items():
            with server.running() as connection:
                made[name] = connection.tools()
        return made

    @cached_property
    def specs(self) -> list[dict[str, Any]]:
        """What requests say of all tools.

        Raises:
            SynthError: two of them have the same name.
        """
        made = [tool.spec for tool in self.python.values()]
        made += [spec for specs in self.served.values() for spec in specs]
        names = [spec["function"]["name"] for spec in made]
        if twice := [name for n, name in enumerate(names) if name in names[:n]]:
            raise SynthError(f"two tools are called {twice[0]!r}: name the others of its server by `only`")
        return made

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the functions; servers are not started for this."""
        for each in self.functions:
            try:
                PythonTool(found(each)).spec  # noqa: B018
            except SynthError as error:
                yield str(error)

    def chat(self, name: str, arguments: Any, about: Any) -> Chat:
        """Return the request for a call."""
        return Chat([], name, {"arguments": arguments}, ENDPOINT, TOOLS, about)

    @property
    def client(self) -> Functions:
        """Who answers calls."""
        servers = {name: [server.command, sorted(server.env)] for name, server in self.servers.items()}
        identity = json.dumps([[tool.identity for tool in self.python.values()], servers])
        return Functions(opened=self.opened, identity=identity)

    @contextmanager
    def opened(self) -> Iterator[Call]:
        """Start the servers, and give a function that calls a tool."""
        with ExitStack() as stack:
            running = {name: stack.enter_context(server.running()) for name, server in self.servers.items()}
            homes = {s["function"]["name"]: running[name] for name, specs in self.served.items() for s in specs}

            def call(name: str, arguments: Any) -> tuple[str, bool]:
                known = [*self.python, *homes]
                if name not in known:
                    return (
                        f"Error: there is no tool {name!r}{suggest(name, known)} (there are: {', '.join(known)})",
                        True,
                    )
                if (values := given(arguments)) is None:
                    return "Error: the arguments are not a JSON object", True
                return self.python[name].call(values) if name in self.python else homes[name].call(name, values)

            yield call


def answer_of(reply: Reply) -> tuple[str, bool]:
    """Return (what a tool said, whether it failed)."""
    body = reply.body or {}
    return (str(body.get("content")), bool(body.get("failed"))) if body else (f"Error: {reply.trouble}", True)
