"""How a chat template writes tool calls, found out by letting it write one; and the calls in what a policy says."""

import json
import re
from contextlib import suppress
from typing import Any

import attrs

from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.rollouts.replies import Call, Turn
from posttrain.errors import TrainingError

NAME, SAID = "posttrain_tool", "posttrain said"
"""What is looked for in what the template writes."""
TOOL = {
    "type": "function",
    "function": {
        "name": NAME, "description": NAME,
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}  # fmt: skip
ASK = [{"role": "user", "content": "x"}]
GAP = re.compile(r"[\s,\[]*")


@attrs.frozen
class Convention:
    """A call is JSON with a name and arguments, between two texts."""

    begin: str
    """In front of the first call; empty where a call is a whole reply."""
    arguments: str
    """Key of the arguments."""

    def read(self, text: str, shown: str) -> Turn:
        """Return a turn of a policy.

        Args:
            text: what it said, without special tokens.
            shown: the same with them.
        """
        calls, place = list[Call](), 0
        while (at := shown.find(self.begin, place)) >= 0:
            place = at + len(self.begin)
            found = self._after(shown, place)
            if isinstance(found, str):
                return Turn(text) if not self.begin else Turn(text, calls, found)
            more, place = found
            calls += more
            if not self.begin:
                break
        return Turn(text, calls)

    def spellings(self, turn: Turn, shown: str, place: int) -> list[dict[str, Any]]:
        """Return a turn as a message: in the words of the policy and, if it calls tools, as templates know calls.

        Args:
            turn: as it was read.
            shown: its text with special tokens.
            place: its number in the conversation, which goes into the names of its calls.
        """
        plain = {"role": "assistant", "content": shown}
        if not turn.calls:
            return [plain]
        calls = [
            {
                "id": f"{place:04d}{i:05d}", "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(turn.calls)
        ]  # fmt: skip
        words = turn.text.partition(self.begin)[0].strip() if self.begin else ""
        return [plain, {"role": "assistant", "content": words, "tool_calls": calls}]

    def _after(self, shown: str, place: int) -> tuple[list[Call], int] | str:
        """Return the calls at a place, and where they end; or what is wrong with the first."""
        calls = list[Call]()
        while True:
            gap = GAP.match(shown, place)
            start = gap.end() if gap else place
            try:
                made, end = json.JSONDecoder().raw_decode(shown, start)
            except ValueError as error:
                return (calls, place) if calls else f"the call is no JSON: {error}"
            call = self._call(made)
            if isinstance(call, str):
                return (calls, place) if calls else call
            calls.append(call)
            place = end

    def _call(self, made: Any) -> Call | str:
        if not isinstance(made, dict) or not isinstance(made.get("name"), str):
            return "the call has no name"
        given = made.get(self.arguments, {})
        return Call(made["name"], given) if isinstance(given, dict) else f"{self.arguments!r} is no object"


HERMES = Convention("<tool_call>", "arguments")
"""What is read where a template knows no tools, and the prompt says in words how to call them."""


def convention(renderer: ChatRenderer) -> Convention:
    """Return how a template writes calls.

    Raises:
        TrainingError: it writes them, but not as JSON with a name.
    """
    calling = {"id": "call00000", "type": "function", "function": {"name": NAME, "arguments": {"x": 7}}}
    said = _rendered(renderer, {"role": "assistant", "content": SAID})
    text = _rendered(renderer, {"role": "assistant", "content": "", "tool_calls": [calling]})
    head = said.partition(SAID)[0]
    written = text.removeprefix(head)
    if not said or NAME not in written or written == text:
        return HERMES
    for start in (found.start() for found in re.finditer(r"\{", written)):
        with suppress(ValueError):
            made, _ = json.JSONDecoder().raw_decode(written, start)
            keys = [key for key, value in made.items() if value == {"x": 7}] if made.get("name") == NAME else []
            if keys:
                return Convention(written[:start].strip().rstrip("[").rstrip(), keys[0])
    raise TrainingError(
        "the chat template writes tool calls in a form that is not read here (no JSON with a name): read them in an "
        "environment of your own, which sees the text of each turn"
    )


def _rendered(renderer: ChatRenderer, message: dict[str, Any]) -> str:
    """Return a conversation that ends with a message; nothing if the template refuses it."""
    try:
        return renderer.asked({"messages": [*ASK, message], "tools": [TOOL]})
    except Refused:
        return ""
