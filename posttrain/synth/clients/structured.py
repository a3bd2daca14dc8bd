"""How a server is asked for a form: as `response_format`, as a tool that it must call, or in words.

Steps always ask as OpenAI's interface does; a client puts that into what its server can.
"""

import json
from typing import Any, Literal

How = Literal["json_schema", "json", "tool", "prompt"]
"""`json_schema`: OpenAI's `response_format`. `json`: Snowflake's. `tool`: a tool to call. `prompt`: words."""


def as_asked(messages: list[dict[str, Any]], body: dict[str, Any], how: How) -> tuple[list[Any], dict[str, Any]]:
    """Return (messages, body) that ask for the form which a body's `response_format` names, in another way."""
    form = body.get("response_format")
    if how == "json_schema" or not isinstance(form, dict) or form.get("type") != "json_schema":
        return messages, body
    wanted = form["json_schema"]
    rest = {name: value for name, value in body.items() if name != "response_format"}
    if how == "json":
        return messages, {**rest, "response_format": {"type": "json", "schema": wanted["schema"]}}
    if how == "tool":
        function = {"name": wanted["name"], "description": "Give the reply.", "parameters": wanted["schema"]}
        choice = {"type": "function", "function": {"name": wanted["name"]}}
        tools = [*rest.get("tools", []), {"type": "function", "function": function}]
        return messages, {**rest, "tools": tools, "tool_choice": choice}
    text = "Reply with one JSON object and nothing else. It must fit this JSON schema:\n" + json.dumps(
        wanted["schema"], ensure_ascii=False
    )
    if messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]], rest
    return [{"role": "system", "content": text}, *messages], rest
