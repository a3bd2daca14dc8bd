"""What an agent asks -> samples: a conversation that it goes on with is one, and whatever else it asks begins another.

A request goes on with a conversation if its messages begin with all of it, what the policy said included, and if the
chat template writes those messages as the tokens that are there already. So an agent that shortens its history, or that
asks the policy in several roles, gives several samples of one rollout: all of them are trained, each as it was drawn.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.messages import Refused, text_of
from posttrain.blocks.data.rows.offsets import tokenize
from posttrain.blocks.data.rows.schemas import conversation
from posttrain.blocks.rollouts.agents.endpoint import Refusal
from posttrain.blocks.rollouts.in_process import ends_of
from posttrain.blocks.rollouts.replies import Failure, Group, Reply
from posttrain.blocks.rollouts.turns.calls import convention
from posttrain.blocks.rollouts.turns.conversations import shown_in
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.run import Run

Messages = list[dict[str, Any]]


class Language:
    """How the policy of a run reads and writes conversations."""

    def __init__(self, run: "Run", template_args: dict[str, Any]) -> None:
        self.tokenizer: Any = run.tokenizer
        self.renderer = ChatRenderer(self.tokenizer, template_args=template_args)
        self.convention, self.ends = convention(self.renderer), set(ends_of(run))

    def asked(self, asked: dict[str, Any]) -> str:
        """Return the text of a conversation that the policy is to go on with.

        Raises:
            Refusal: the template refuses it, or leaves its tools out.
        """
        try:
            return self.renderer.asked_with_tools(asked)
        except Refused as refused:
            raise Refusal(str(refused)) from None

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text that the template wrote."""
        (found,) = tokenize(self.tokenizer, [text])
        return list(found.ids)

    def text(self, ids: list[int]) -> str:
        """Return what tokens stand for, special ones included."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@attrs.define(eq=False)
class Conversation:
    """One sample: a prompt, and what policy and agent said by turns."""

    prompt: list[int]
    asked: dict[str, Any]
    """The request that it began with: its messages, and perhaps tools."""
    heard: Messages = attrs.field(factory=list)
    """All messages so far as the agent knows them, those of the policy included."""
    written: Messages = attrs.field(factory=list)
    """Those in front of the last turn, as the template writes them as the tokens that are there."""
    ids: list[int] = attrs.field(factory=list)
    said: list[bool] = attrs.field(factory=list)
    log_probs: list[float] = attrs.field(factory=list)
    ended: bool = True
    spellings: Messages = attrs.field(factory=list)
    """How the last turn of the policy may be written."""

    @property
    def context(self) -> list[int]:
        """What the policy goes on from."""
        return [*self.prompt, *self.ids]

    def continued(self, asked: dict[str, Any], language: Language) -> tuple[Messages, list[int]] | None:
        """Return how the messages of a request are written that goes on with this, and the tokens that it adds; None if
        it does not."""
        messages, known = asked["messages"], len(self.heard)
        if len(messages) <= known or asked.get("tools") != self.asked.get("tools"):
            return None
        if [content_of(one) for one in self.heard] != [content_of(one) for one in messages[:known]]:
            return None
        far = language.text(self.context)
        for spelled in self.spellings:
            written = [*self.written, spelled, *messages[known:]]
            try:
                rendered = language.renderer.asked({**asked, "messages": written})
            except Refused:
                continue
            if rendered.startswith(far):
                return written, language.ids(rendered[len(far) :])
        return None

    def hear(self, told: list[int], reply: Reply) -> None:
        """Take in what was said to the policy, and what it said."""
        self.ids += [*told, *reply.ids]
        self.said += [False] * len(told) + [True] * len(reply.ids)
        self.log_probs += [0.0] * len(told) + reply.log_probs
        self.ended = reply.ended


def content_of(message: dict[str, Any]) -> Any:
    """Return what a message says, whatever else clients write into it: its role, its text, the tools that it calls."""
    calls = [
        (call["function"].get("name"), call["function"].get("arguments")) for call in message.get("tool_calls") or ()
    ]
    return message["role"], text_of(message.get("content")), calls


class Request:
    """What an agent asks: a thread of the endpoint waits with it until there is an answer."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.answer: Future[dict[str, Any]] = Future()
        self.place: Conversation
        """The conversation that it goes on with."""
        self.told = list[int]()
        """Tokens that it adds."""
        self.key: tuple[int, ...] = ()

    @property
    def context(self) -> list[int]:
        """What the policy is to go on from."""
        return [*self.place.context, *self.told]


class Rollout:
    """One episode of an agent, and all that it asks."""

    def __init__(self, language: Language, group: Group, key: tuple[int, ...], max_turns: int, max_tokens: int) -> None:
        self.language, self.group, self.key = language, group, key
        self.max_turns, self.max_tokens = max_turns, max_tokens
        self.conversations = list[Conversation]()
        self.turns, self.cut_off = 0, False
        self.seen = Counter[tuple[int, ...]]()
        self.reward: float | Failure = 0.0

    def placed(self, requests: list[Request]) -> Iterator[Request]:
        """Yield the requests that the policy is to answer; others are refused at once.

        Args:
            requests: of this rollout, made side by side: two of them go on with two conversations.
        """
        free = list(self.conversations)
        for request in sorted(requests, key=lambda one: json.dumps(one.body, sort_keys=True)):
            try:
                self.place(request, free)
            except Refusal as refusal:
                request.answer.set_exception(refusal)
            else:
                yield request

    def place(self, request: Request, free: list[Conversation]) -> None:
        """Find the conversation that a request goes on with, or begin one.

        Raises:
            Refusal: it cannot be written, or there is no room for it.
        """
        if self.turns >= self.max_turns:
            self.cut_off = True
            raise Refusal(f"this rollout has asked {self.max_turns} times (max_turns)", "max_turns")
        asked = asked_in(request.body)
        for known in sorted(free, key=lambda one: -len(one.heard)):
            if (found := known.continued(asked, self.language)) is not None:
                request.place, (written, request.told) = known, found
                break
        else:
            prompt, written = self.language.ids(self.language.asked(asked)), asked["messages"]
            request.place = Conversation(prompt, asked)
        if (size := len(request.context)) > self.max_tokens:
            self.cut_off = True
            message = f"the conversation has {size} tokens, and may have {self.max_tokens} (max_tokens)"
            raise Refusal(message, "context_length_exceeded")
        if request.place in free:
            free.remove(request.place)
        else:
            self.conversations.append(request.place)
        request.place.heard, request.place.written = list(asked["messages"]), list(written)
        context = tuple(request.context)
        request.key = (*self.key, zlib.crc32(np.array(context).tobytes()), self.seen[context])
        self.seen[context] += 1
        self.turns += 1

    def hear(self, request: Request, reply: Reply) -> None:
        """Take in what the policy says to a request, and tell the agent."""
        place, language = request.place, self.language
        asked = len(request.context)
        place.hear(request.told, reply)
        self.conversations.remove(place)
        self.conversations.append(place)  # the one that was heard last
        shown = shown_in(language.tokenizer, reply.ids, language.ends)
        turn = language.convention.read(language.tokenizer.decode(reply.ids, skip_special_tokens=True), shown)
        place.spellings = language.convention.spellings(turn, shown, len(place.heard))
        message: dict[str, Any] = place.spellings[-1] if turn.calls else {"role": "assistant", "content": turn.text}
        place.heard.append(message)
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        request.answer.set_result({
            "id": f"chatcmpl-{'-'.join(map(str, request.key))}",
            "message": {**message, "tool_calls": calls} if calls else message,
            "finish_reason": "length" if not reply.ended else "tool_calls" if calls else "stop",
            "usage": {
                "prompt_tokens": asked, "completion_tokens": len(reply.ids), "total_tokens": asked + len(reply.ids),
            },
        })  # fmt: skip

    def reply(self) -> Reply:
        """Return the whole episode, as it is trained."""
        if not self.conversations:
            reward = self.reward if isinstance(self.reward, Failure) else Failure("it did not ask the policy anything")
            return Reply([], [], False, reward=reward)
        ended = not self.cut_off and all(one.ended for one in self.conversations)
        parts = [
            Reply(one.ids, one.log_probs, ended, one.said, None if one.prompt == self.group.prompt else one.prompt)
            for one in self.conversations
        ]
        messages = [
            message
            for one in self.conversations
            for message in one.heard[len(one.asked["messages"]) if one.prompt == self.group.prompt else 0 :]
        ]
        return attrs.evolve(parts[-1], earlier=tuple(parts[:-1]), messages=messages, reward=self.reward)


def asked_in(body: dict[str, Any]) -> dict[str, Any]:
    """Return the conversation of a request, as chat templates expect it.

    Raises:
        Refusal: it is none, or holds images.
    """
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    try:
        asked = conversation({"messages": body["messages"], **({"tools": tools} if tools else {})})
    except (Refused, DataError) as error:
        raise Refusal(str(error)) from None
    if any(map(images_of, asked["messages"])):
        raise Refusal("there are images in the conversation, which agents cannot show the policy yet")
    return asked
