"""Converse: conversations of several turns, with tools that are called, and with a model that plays the user.

As in ToolBench (arXiv:2307.16789) and APIGen-MT (arXiv:2504.03601): calls are executed, so that what is trained on is
what tools really say; and as in UltraChat (arXiv:2305.14233): one model plays the user, another one answers.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import attrs
from attrs.validators import ge, gt

from posttrain.blocks.data.rows.schemas import CHATS
from posttrain.interfaces import SynthBlock
from posttrain.registry import block, key
from posttrain.synth.ledger.replies import calls_of
from posttrain.synth.pipelines.images import beside, shown
from posttrain.synth.pipelines.rows import Chat, Drop, Message, Reply, Row, transcript
from posttrain.synth.pipelines.step import Asking, Prompting
from posttrain.synth.pipelines.templates import filled, problem
from posttrain.synth.steps.turns.mcp import McpServer
from posttrain.synth.steps.turns.toolbox import TOOLS, Toolbox, answer_of

PLAY = """\
You play the user in a conversation with an assistant. {role}

[Conversation]
{conversation}
[End of the conversation]

Write the next message of the user, and nothing else: no quotation marks, no comment. If the user has got what they
want, reply with {stop} alone."""
SILENT = {"tool", "system", "developer"}
"""Roles that a user does not hear."""


@attrs.frozen(kw_only=True, slots=False)
class User:
    """A model that plays the user."""

    role: str = "Ask what a curious person would ask next."
    """Who the user is and what they want; a template: `You are {persona}. You want to know {goal}.`"""
    model: str | None = None
    """Which one plays; the one that answers unless given."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of its requests: `{temperature: 1.0, max_tokens: 128}`."""
    stop: str = "[END]"
    """What the user says when the conversation is over; it is no part of it."""


@attrs.define
class Course:
    """How far one conversation has come."""

    messages: list[Message]
    calls: list[dict[str, Any]] = attrs.field(factory=list)
    """Of the last message, those that have no answer yet."""
    next: str = "assistant"
    """Who is to speak: assistant, tool, user, or nobody."""
    turns: int = 1
    """Of the user."""
    in_turn: int = 0
    """Messages with calls since the user spoke."""
    called: int = 0
    failed: int = 0
    """Calls that failed."""
    about: dict[str, Any] = attrs.field(factory=dict)
    trouble: str = ""
    """Why the conversation is of no use."""
    detail: str = ""

    def end(self, trouble: str = "", detail: str = "") -> None:
        """Take note that nobody is to speak any more."""
        self.next, self.trouble, self.detail = "", trouble, detail


@block("step", "converse")
class Converse(Prompting, Asking):
    """Let a model talk: it may call tools, which are executed, and a model may play the user.

    What comes out is the row with `messages` (the whole conversation), `tools`, `model`, `finish_reason`, `turns` (of
    the user), `calls` and `failed_calls`: SFT trains on it as it is.
    """

    n: int = key(1, check=gt(0))
    """Conversations per row."""
    tools: list[Any] = attrs.field(factory=list)
    """Names of functions under `@tool`; from Python also functions."""
    servers: dict[str, McpServer] = attrs.field(factory=dict)
    """MCP servers whose tools are offered as well: `{files: {command: [python, server.py]}}`."""
    most_calls: int = key(8, check=gt(0))
    """Messages with calls in one turn; a conversation that wants more is dropped."""
    user: User | None = None
    """Who plays the user after the first turn."""
    turns: int = key(1, check=ge(1))
    """Turns of the user at most, the first one included."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts, and tools that are none."""
        yield from super().check()
        if self.turns > 1 and self.user is None:
            yield "turns", "needs `user`: who speaks after the first turn"
        if self.user is not None and self.turns == 1:
            yield "user", "never speaks with turns: 1, since the first turn is the row's"
        if self.user is not None and (wrong := problem(self.user.role, self.syntax)):
            yield "user", f"role {wrong}"
        for wrong in self.toolbox.problems():
            yield "tools", wrong
        if "n" in self.body:
            yield "body", "n pays for several answers of which one is kept: give `n` of the step"

    @cached_property
    def toolbox(self) -> Toolbox:
        """The tools."""
        return Toolbox(self.tools, self.servers)

    @property
    def others(self) -> dict[str, SynthBlock]:
        """Who executes calls."""
        return {TOOLS: self.toolbox.client} if self.toolbox else {}

    @property
    def rounds(self) -> int:
        """Waves after the first: a turn is an answer, calls and answers to them, and the user's next message."""
        return self.turns * (2 + 2 * self.most_calls * bool(self.toolbox))

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [self.model, *([self.user.model] if self.user and self.user.model else [])]

    def chats(self, row: Row) -> list[Chat]:
        """Return what is asked first: once for each conversation."""
        prompt = self.prompt(row)
        return [self.asks(number, prompt) for number in range(self.n)]

    def asks(self, number: int, messages: list[Message]) -> Chat:
        """Return the request for the assistant's next message."""
        body = {"tools": self.toolbox.specs, **self.body} if self.toolbox else self.body
        return Chat(recalled(messages), self.model, body, about=number)

    def then(self, row: Row, replies: list[Reply]) -> list[Chat]:
        """Return what each conversation needs next: an answer, what tools say, or what the user says."""
        wanted: list[Chat] = []
        for number, course in enumerate(self.courses(row, replies)):
            if course.next == "assistant":
                wanted.append(self.asks(number, course.messages))
            elif course.next == "tool":
                functions = [call["function"] for call in course.calls]
                wanted += [self.toolbox.chat(f["name"], f.get("arguments"), number) for f in functions]
            elif course.next == "user":
                wanted.append(self.plays(number, row, course.messages))
        return wanted

    def plays(self, number: int, row: Row, messages: list[Message]) -> Chat:
        """Return the request for the user's next message."""
        assert self.user is not None
        heard = [m for m in messages if m["role"] not in SILENT and m.get("content")]
        known = {"role": filled(self.user.role, row, self.syntax), "conversation": transcript(heard, alone="")}
        text = PLAY.format(**known, stop=self.user.stop)
        said = [{"role": "user", "content": shown(text, heard)}]
        return Chat(said, self.user.model or self.model, self.user.body, about=number)

    # -- what came ----------------------------------------------------------------------

    def courses(self, row: Row, replies: list[Reply]) -> list[Course]:
        """Return how far each conversation has come with the replies so far."""
        made = [Course(self.prompt(row)) for _ in range(self.n)]
        for reply in replies:
            assert reply.chat is not None
            self.heard(made[reply.chat.about], reply)
        return made

    def heard(self, course: Course, reply: Reply) -> None:
        """Take a reply into its conversation."""
        detail = str((reply.error or {}).get("message") or reply.refusal or "")
        if course.next == "tool":
            call, *course.calls = course.calls
            text, failed = answer_of(reply)
            course.failed += failed
            course.messages = [*course.messages, {"role": "tool", "tool_call_id": call.get("id"), "content": text}]
            course.next = course.next if course.calls else "assistant"
        elif course.next == "user":
            self.played(course, reply, detail)
        elif course.next == "assistant":
            self.answered(course, reply, detail)

    def played(self, course: Course, reply: Reply, detail: str) -> None:
        """Take in what the user says."""
        assert self.user is not None
        if reply.text is None:
            return course.end(f"the user: {reply.trouble}", detail)
        said = reply.text.replace(self.user.stop, "").strip()
        if self.user.stop in reply.text or not said:
            return course.end()
        course.messages = [*course.messages, {"role": "user", "content": said}]
        course.next, course.turns, course.in_turn = "assistant", course.turns + 1, 0
        return None

    def answered(self, course: Course, reply: Reply, detail: str) -> None:
        """Take in what the assistant says."""
        message = reply.choice.get("message") or {}
        calls = [call for call in message.get("tool_calls") or [] if calls_of({"tool_calls": [call]})]
        if reply.error or (reply.text is None and not calls):
            return course.end(reply.trouble, detail)
        if not calls and reply.choice.get("finish_reason") == "length":
            return course.end("an answer was cut: length")
        course.about = {"model": (reply.body or {}).get("model"), "finish_reason": reply.choice.get("finish_reason")}
        kept = {name: message[name] for name in ("thinking_blocks", "reasoning_content") if message.get(name)}
        said = {"role": "assistant", "content": reply.text or "", **({"tool_calls": calls} if calls else {}), **kept}
        course.messages = [*course.messages, said]
        if calls and not self.toolbox:
            return course.end("the model calls a tool, and there is none")
        if calls and course.in_turn >= self.most_calls:
            return course.end(f"more than {self.most_calls} messages with calls in a turn")
        course.calls, course.called = calls, course.called + len(calls)
        course.in_turn += bool(calls)
        course.next = "tool" if calls else "user" if self.user and course.turns < self.turns else ""
        return None

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row once for every conversation that came to its end."""
        kept = beside(row, self.prompt(row), *CHATS, "prompt", "tools")
        for course in self.courses(row, replies):
            counts = {"turns": course.turns, "calls": course.called, "failed_calls": course.failed}
            tools = {"tools": self.toolbox.specs} if self.toolbox else {}
            model = {"model": self.model or course.about.get("model")}
            messages = [{k: v for k, v in m.items() if k != "thinking_blocks"} for m in course.messages]
            made = {**kept, "messages": messages, **tools, **course.about, **model, **counts}
            if course.next and not course.trouble:
                course.end("the conversation did not come to its end")
            yield Drop(made, course.trouble, course.detail) if course.trouble else made

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return how long the conversations are, and how many calls failed."""
        counts = [(row["turns"], row["calls"], row["failed_calls"]) for row in rows]
        if not counts:
            return {}
        turns, calls, failed = (sum(column) for column in zip(*counts, strict=True))
        made: dict[str, str | float] = {"turns": turns / len(counts)}
        return made | ({"calls": calls / len(counts), "calls that failed": f"{failed:,} of {calls:,}"} if calls else {})


def recalled(messages: list[Message]) -> list[Message]:
    """Return messages as servers want them back: what was thought since the user spoke last belongs to the calls that
    followed from it, and what was thought earlier does not (api-docs.deepseek.com, guides/thinking_mode)."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    return [{k: v for k, v in m.items() if k != "reasoning_content"} if i < last else m for i, m in enumerate(messages)]
