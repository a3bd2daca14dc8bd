"""Gemini's generateContent: a chat in OpenAI's shape -> its request, its answer -> a chat completion.

Sources: ai.google.dev/api/generate-content, gemini-api/docs/thought-signatures; google-genai 3.6.1, models.py.
"""

import mimetypes
from typing import Any
from urllib.parse import quote

from posttrain.synth.sending.wires.dialect import Translated
from posttrain.synth.sending.wires.parts import (
    SYSTEM,
    call_of,
    count,
    input_of,
    object_of,
    objects_in,
    parts_of,
    picture,
    stops_of,
)

CONFIG = {
    "temperature": "temperature", "top_p": "topP", "top_k": "topK", "seed": "seed", "n": "candidateCount",
    "presence_penalty": "presencePenalty", "frequency_penalty": "frequencyPenalty", "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs", "thinkingConfig": "thinkingConfig", "mediaResolution": "mediaResolution",
    "responseModalities": "responseModalities",
}  # fmt: skip
"""Keys of a body -> those of generationConfig."""
OWN = ("safetySettings", "cachedContent", "serviceTier", "labels")
"""Keys of Gemini that are passed on as they are."""
TRANSLATED = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
)
REASONS = {"STOP": "stop", "MAX_TOKENS": "length"}
FILTERED = {
    "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION", "MODEL_ARMOR",
}  # fmt: skip
SIGNATURE = "thought_signature"
KNOWN = {*CONFIG, *OWN, *TRANSLATED}


def to_wire(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a chat means."""
    contents: list[dict[str, Any]] = []
    system: list[dict[str, Any]] = []
    called: dict[Any, str] = {}
    for message in body["messages"]:
        if message["role"] in SYSTEM:
            system += [part(given) for given in parts_of(message.get("content"))]
            continue
        called |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls") or []}
        role, found = turn(message, called)
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += found  # all answers to calls are one turn
        else:
            contents.append({"role": role, "parts": found})
    made: dict[str, Any] = {"contents": contents, **{name: body[name] for name in OWN if name in body}}
    if system:
        made["systemInstruction"] = {"parts": system}
    if config := config_of(body):
        made["generationConfig"] = config
    if body.get("tools"):
        made["tools"] = [{"functionDeclarations": [tool(given) for given in body["tools"]]}]
    if "tool_choice" in body:
        made["toolConfig"] = {"functionCallingConfig": choice(body["tool_choice"])}
    return made


def turn(message: dict[str, Any], called: dict[Any, str]) -> tuple[str, list[dict[str, Any]]]:
    """Return (role, parts) of a message; `called` names the tool of each call so far."""
    if message["role"] == "tool":
        identity = message.get("tool_call_id")
        said = "".join(str(p.get("text") or "") for p in parts_of(message.get("content")))
        return "user", [{"functionResponse": {"name": called.get(identity, "tool"), "response": {"result": said}}}]
    found = [part(given) for given in parts_of(message.get("content"))]
    for call in message.get("tool_calls") or []:
        signed = object_of(object_of(call.get("extra_content")).get("google")).get(SIGNATURE)
        function = {"functionCall": {"name": call["function"]["name"], "args": input_of(call)}}
        found.append(function | ({"thoughtSignature": signed} if signed else {}))
    return ("model" if message["role"] == "assistant" else "user"), found


def part(given: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a message: text, or an image by its data or its address."""
    if (found := picture(given)) is None:
        return {"text": given["text"]} if given.get("type") == "text" else given
    kind, data = found
    if kind:
        return {"inlineData": {"mimeType": kind, "data": data}}
    guessed = mimetypes.guess_type(data.partition("?")[0])[0]
    return {"fileData": {"fileUri": data, **({"mimeType": guessed} if guessed else {})}}


def config_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return how a reply is to be sampled."""
    made = {theirs: body[ours] for ours, theirs in CONFIG.items() if body.get(ours) is not None}
    if limit := body.get("max_completion_tokens") or body.get("max_tokens"):
        made["maxOutputTokens"] = limit
    if stops := stops_of(body):
        made["stopSequences"] = stops
    form = object_of(body.get("response_format"))
    if form.get("type") in ("json_schema", "json_object"):
        made["responseMimeType"] = "application/json"
    if form.get("type") == "json_schema":
        made["responseJsonSchema"] = form["json_schema"]["schema"]
    return made


def tool(given: dict[str, Any]) -> dict[str, Any]:
    """Return a tool; one that is in Gemini's form already stays."""
    function = given.get("function")
    if not isinstance(function, dict):
        return given
    made = {"name": function["name"], "description": function.get("description") or function["name"]}
    return made | ({"parametersJsonSchema": function["parameters"]} if function.get("parameters") else {})


def choice(given: Any) -> dict[str, Any]:
    """Return which tool is to be called."""
    if isinstance(given, dict) and "function" in given:
        return {"mode": "ANY", "allowedFunctionNames": [given["function"]["name"]]}
    return given if isinstance(given, dict) else {"mode": {"required": "ANY", "none": "NONE"}.get(given, "AUTO")}


def from_wire(reply: Any, request_id: Any = None) -> Any:
    """Return an answer as a chat completion; anything else, such as an error, as it is."""
    if not isinstance(reply, dict) or not ("candidates" in reply or "promptFeedback" in reply) or "choices" in reply:
        return reply
    found = [chosen(candidate, n) for n, candidate in enumerate(objects_in(reply.get("candidates")))]
    if not found:
        why = object_of(reply.get("promptFeedback")).get("blockReason") or "no candidates"
        message = {"role": "assistant", "content": None, "refusal": f"the prompt was blocked: {why}"}
        found = [{"index": 0, "message": message, "finish_reason": "content_filter"}]
    used = object_of(reply.get("usageMetadata"))
    counts = [count(used.get(f"{name}TokenCount")) for name in ("prompt", "toolUsePrompt", "candidates", "thoughts")]
    return {
        "id": reply.get("responseId"), "object": "chat.completion", "model": reply.get("modelVersion"),
        "choices": found,
        "usage": {
            "prompt_tokens": counts[0] + counts[1], "completion_tokens": counts[2] + counts[3],
            "prompt_tokens_details": {"cached_tokens": count(used.get("cachedContentTokenCount"))},
        },
    }  # fmt: skip


def chosen(candidate: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a candidate as a choice."""
    found = objects_in(object_of(candidate.get("content")).get("parts"))
    text = "".join(str(p["text"]) for p in found if isinstance(p.get("text"), str) and not p.get("thought"))
    thought = "".join(str(p["text"]) for p in found if isinstance(p.get("text"), str) and p.get("thought"))
    calls: list[dict[str, Any]] = []
    for p in (p for p in found if isinstance(p.get("functionCall"), dict)):
        function = p["functionCall"]
        call = call_of(function.get("id") or f"call_{len(calls)}", function.get("name"), function.get("args"))
        signed = {"extra_content": {"google": {SIGNATURE: p["thoughtSignature"]}}} if p.get("thoughtSignature") else {}
        calls.append(call | signed)
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    message |= ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    said = str(candidate.get("finishReason") or "STOP")
    reason = "content_filter" if said in FILTERED else REASONS.get(said, said.lower())
    made = {"index": number, "message": message, "finish_reason": "tool_calls" if calls and said == "STOP" else reason}
    tokens = logprobs(object_of(candidate.get("logprobsResult")))
    return made | ({"logprobs": {"content": tokens}} if tokens else {})


def logprobs(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return log-probabilities as OpenAI gives them."""
    others = [objects_in(each.get("candidates")) for each in objects_in(given.get("topCandidates"))]
    made = []
    for n, each in enumerate(objects_in(given.get("chosenCandidates"))):
        top = [_token(other) for other in others[n]] if n < len(others) else []
        made.append({**_token(each), "top_logprobs": top})
    return made


def _token(given: dict[str, Any]) -> dict[str, Any]:
    return {"token": given.get("token"), "logprob": given.get("logProbability")}


GENERATE = Translated(
    lambda model: f"/models/{quote(model.removeprefix('models/'), safe='')}:generateContent", to_wire, from_wire
)
