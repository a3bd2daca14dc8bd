"""What an answer of a server means: a result, try again, wait, give this one up, or stop the whole task.

The table is that of the providers' documentation; see `verdict`.
"""

import email.utils
import json
import re
import time
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

STOP = {
    "insufficient_quota", "credit_balance_exhausted", "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded", "organization_usage_limit_exceeded", "billing_hard_limit_reached",
    "ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException",
}  # fmt: skip
"""Types and codes of a 403 or 429 that no waiting heals."""
STOPPING = {401, 402}
CONFIGURED = {403, 404}
"""Statuses that are as a rule about the key or the model, but with some providers about one row."""
TOO_LARGE = re.compile(r"request too large|limit[: ]+([\d,]+)\D+requested[: ]+([\d,]+)", re.IGNORECASE)
REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-amzn-requestid")
OF_THE_ACCOUNT = ("credit balance is too low", "API key not valid", "API key expired")
"""What Anthropic and Google say in a 400 that concerns the account and no row."""
HALF = "not_unicode"
HALF_SAID = "the reply holds half of a character (a lone surrogate), which no file can hold"
SURROGATE = re.compile("[\ud800-\udfff]")
TOO_LARGE_CODE = "request_too_large"
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Action(Enum):
    """What to do with a request after an answer."""

    RESULT = "result"
    RETRY = "retry"
    WAIT = "wait"
    PAUSE = "pause"
    """It is the server that is ill: nobody sends for a while, and nothing counts against the request."""
    REFUSED = "refused"
    STOP = "stop"


class Verdict(NamedTuple):
    """An answer, understood."""

    action: Action
    code: str
    message: str
    status: int | None = None
    request_id: str | None = None
    wait: float | None = None
    """Seconds that the server asked for."""


def verdict(status: int, headers: Mapping[str, str], reply: Any, chat: bool = True) -> Verdict:
    """Judge an answer with a whole body.

    Args:
        status: HTTP status.
        headers: of the answer; in a batch line there are none.
        reply: the body as JSON, or None if it is none.
        chat: whether a result must have `choices`.
    """
    request_id = next((headers[name] for name in REQUEST_IDS if headers.get(name)), None)
    code, message, kind = described(reply)
    code = code or headers.get("x-amzn-errortype", "").partition(":")[0]
    if 200 <= status < 300:
        if chat and not whole([c["message"] for c in choices(reply, "message") or []]):
            return Verdict(Action.RETRY, HALF, HALF_SAID, status, request_id)
        if isinstance(reply, dict) and (choices(reply, "message") is not None if chat else "error" not in reply):
            return Verdict(Action.RESULT, "ok", "", status, request_id)
        what = f"the body is no {'chat completion' if chat else 'JSON result'}: {message or shown(reply)}"
        return Verdict(Action.RETRY, "malformed_reply", what, status, request_id)
    said = Verdict(
        Action.RETRY, code or f"http_{status}", message or shown(reply), status, request_id,
        waiting(headers) if waiting(headers) is not None else retry_delay(reply),
    )  # fmt: skip
    should = headers.get("x-should-retry")
    of_account = status == 400 and any(text in said.message for text in OF_THE_ACCOUNT)
    if status in STOPPING or of_account or (status in (403, 429) and {code, kind} & STOP):
        return said._replace(action=Action.STOP)
    if status == 429:
        larger = larger_than_allowed(said.message)
        return (
            said._replace(action=Action.REFUSED, code=TOO_LARGE_CODE) if larger else said._replace(action=Action.WAIT)
        )
    if should in ("true", "false"):
        return said._replace(action=Action.RETRY if should == "true" else Action.REFUSED)
    if status in (408, 409, 424) or status >= 500:
        return said
    return said._replace(action=Action.REFUSED)


def choices(reply: Any, part: str) -> list[dict[str, Any]] | None:
    """Return the choices of a chat completion, objects with another one at `part`; None if it is no such thing."""
    found = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(found, list) or not all(isinstance(c, dict) and isinstance(c.get(part), dict) for c in found):
        return None
    return found


def whole(value: Any) -> bool:
    """Whether all texts inside a value can be written as UTF-8; JSON's escapes also name halves of characters.

    >>> whole({"content": "a"}), whole([chr(0xD83D)])
    (True, False)
    """
    if isinstance(value, str):
        return value.isascii() or not SURROGATE.search(value)
    if isinstance(value, dict):
        return all(whole(name) and whole(item) for name, item in value.items())
    return not isinstance(value, list) or all(map(whole, value))


def larger_than_allowed(message: str) -> bool:
    """Whether a 429 says that this request alone is more than a minute's worth, so that no waiting helps.

    >>> larger_than_allowed("Rate limit reached. Limit 30000, Used 29000, Requested 1200.")
    False
    >>> larger_than_allowed("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 35016.")
    True
    """
    found = TOO_LARGE.search(message)
    if found is None or found[1] is None:
        return found is not None
    return int(found[2].replace(",", "")) > int(found[1].replace(",", ""))


def text_of(message: Mapping[str, Any]) -> str | None:
    """Return what a message says as text, also if it came in parts; None if that is nothing.

    >>> text_of({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]})
    'yes'
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict) and p.get("type") == "text")
    return content if isinstance(content, str) and content.strip() else None


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """Return what a model thought before it answered, under the names that servers use: `reasoning_content` (DeepSeek,
    vLLM, SGLang), `reasoning` (vLLM, OpenRouter), or parts of type `thinking` (Anthropic, Mistral)."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name].strip():
            return str(message[name])
    content = message.get("content")
    parts = [p.get("thinking") for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    texts = [p if isinstance(p, str) else text_of({"content": p}) for p in parts if p]
    return "".join(text for text in texts if text) or None


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message calls, `{"name", "arguments"}` each; what is no such thing is left out."""
    given = message.get("tool_calls")
    found = [call.get("function") for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    return [function for function in found if isinstance(function, dict)]


def with_thoughts(text: str, reasoning: str | None) -> str:
    """Return an answer with what was thought before it in `<think>`, as the models of today write it themselves."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text}" if reasoning else text


def described(reply: Any) -> tuple[str, str, str]:
    """Return (code, message, type) of an error body, whatever its shape: OpenAI's, vLLM's (code is a number),
    Snowflake's and Amazon's (code and message at the top), Google's (`status`), or anything else."""
    error = reply.get("error", reply) if isinstance(reply, dict) else None
    if isinstance(error, str):
        return "", error, ""
    if not isinstance(error, dict):
        return "", "", ""
    code, kind = error.get("code"), str(error.get("type") or error.get("status") or "")
    name = code if isinstance(code, str) and code else kind
    return name, str(error.get("message") or ""), kind


def shown(reply: Any) -> str:
    """Return the beginning of a body, for a message."""
    return json.dumps(reply)[:200] if reply is not None else "the body is not JSON"


def waiting(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that an answer asks to wait: `retry-after-ms`, or `retry-after` as seconds or as a date.

    >>> waiting({"retry-after": "2.5"}), waiting({"retry-after": "soon"}), waiting({"retry-after-ms": "20"})
    (2.5, None, 0.02)
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d*)?", value):
            return float(value) * unit
    value = headers.get("retry-after", "")
    try:
        when = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):  # no date either: as if it had not been said
        return None
    return max(0.0, when - (time.time() if now is None else now))


def retry_delay(reply: Any) -> float | None:
    """Return the seconds that an error of Google asks to wait, which it says in its details (google.rpc.RetryInfo).

    >>> retry_delay({"error": {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]}})
    7.0
    """
    error = reply.get("error") if isinstance(reply, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    found = [each.get("retryDelay") for each in details if isinstance(each, dict)] if isinstance(details, list) else []
    return next((duration(text) for text in found if isinstance(text, str)), None)


def duration(text: str) -> float | None:
    """Return the seconds of a Go duration, or None.

    >>> duration("6m0s"), duration("12ms"), duration("1h2m3.5s"), duration("never")
    (360.0, 0.012, 3723.5, None)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def limits(headers: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Return (requests, tokens) per minute that an answer's headers allow; what is not positive says nothing."""
    found = []
    for what in ("requests", "tokens"):
        text = headers.get(f"x-ratelimit-limit-{what}") or headers.get(f"anthropic-ratelimit-{what}-limit") or ""
        found.append(float(text) if text.isdecimal() and int(text) > 0 else None)
    return found[0], found[1]


def parsed(content: bytes) -> Any:
    """Return the JSON of a body, or None if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
