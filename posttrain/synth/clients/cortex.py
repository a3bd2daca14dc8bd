"""Snowflake Cortex: its OpenAI-compatible path, the older `inference:complete`, or SQL with idempotent requests.

Sources: snowflake-rest-api-specs (cortex-inference.yaml, sqlapi.yaml), docs.snowflake.com (cortex-rest-api, sql-api).
"""

import json
import os
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import attrs
import httpx
from attrs.validators import gt, optional

from posttrain.errors import SynthError
from posttrain.registry import block, key
from posttrain.synth.clients.auth import KeyAuth, KeyPairAuth
from posttrain.synth.clients.served import ServedSynth
from posttrain.synth.clients.structured import How
from posttrain.synth.ledger.keys import Request, as_secret
from posttrain.synth.ledger.replies import choices, parsed
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.online import send_all
from posttrain.synth.sending.service import OpenAIDialect, Service
from posttrain.values import Secret

PATHS = {"openai": "/api/v2/cortex/v1", "complete": "/api/v2/cortex/inference:complete", "sql": "/api/v2/statements"}
OPTIONS = ("temperature", "top_p", "max_tokens", "guardrails", "response_format")
SQL = "SELECT SNOWFLAKE.CORTEX.COMPLETE(?, PARSE_JSON(?), PARSE_JSON(?))"


@block("synth", "cortex")
class CortexSynth(ServedSynth):
    """Data from Snowflake Cortex, one request at a time and many in flight.

    With `token` (a programmatic access token) or `private_key_file` (a key pair: `cryptography` makes the tokens,
    and makes them again in long runs).
    """

    account: str | None = None
    """Account identifier, `<organization>-<account>`; SNOWFLAKE_ACCOUNT unless given."""
    user: str | None = None
    """For a key pair; SNOWFLAKE_USER unless given."""
    token: Secret | None = key(None, convert=as_secret)
    """A programmatic access token; SNOWFLAKE_TOKEN unless given."""
    private_key_file: Path | None = key(None, convert=lambda given: None if given is None else Path(given))
    """An RSA key (PEM, PKCS 8) to sign tokens with instead."""
    private_key_passphrase: Secret | None = key(None, convert=as_secret)
    """Of that file, if it has one."""
    connection_params: dict[str, Any] = attrs.field(factory=dict, repr=False)
    """The same under the names of Snowflake's connector: account, user, role, warehouse, database, schema."""
    api: Literal["openai", "complete", "sql"] = "openai"
    """Path to use. `sql` runs in a warehouse, and Snowflake itself sees to it that no request is paid twice."""
    base_url: str | None = None
    """`https://<account>.snowflakecomputing.com` unless given."""
    concurrency: int = key(32, check=gt(0))
    """Requests in flight at most."""
    rpm: float | None = key(None, check=optional(gt(0)))
    """Requests per minute at most; quotas are per account and model."""
    tpm: float | None = key(None, check=optional(gt(0)))
    """Tokens per minute at most, by estimates."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be honoured."""
        known = {"account", "user", "role", "warehouse", "database", "schema"}
        for name in sorted(self.connection_params.keys() - known):
            yield (
                "connection_params",
                f"{name} is not supported (known: {', '.join(sorted(known))}); give token or private_key_file",
            )
        if self.token is not None and self.private_key_file is not None:
            yield "token", "give token or private_key_file, not both"

    @property
    def host(self) -> str:
        """Base URL of the account."""
        if self.base_url:
            return self.base_url.rstrip("/")
        return f"https://{self._named('account')}.snowflakecomputing.com"

    @property
    def namespace(self) -> str:
        """The account and the path: their replies differ."""
        return f"{self.host} {self.api}"

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a request; `options` may hold what the SQL function calls so."""
        rest = {k: v for k, v in given.items() if k != "options"} | dict(given.get("options") or {})
        unknown = sorted(rest.keys() - set(OPTIONS)) if self.api == "sql" else []
        if unknown:
            raise SynthError(f"COMPLETE has no option {unknown[0]!r} (options: {', '.join(OPTIONS)})")
        return super().body(model, messages, rest)

    @property
    def _forms(self) -> How:
        return "json_schema" if self.api == "openai" else "json"

    def send(self, session: Session) -> None:
        """Send what a session has to send."""
        for name, message in self.check():
            raise SynthError(f"{name}: {message}")
        send_all(self.service(), session)

    def service(self) -> Service:
        """Return where requests go."""
        url = self.host + (PATHS["openai"] if self.api == "openai" else "")
        return self._one_by_one(
            [url], auth=self.auth, dialect=self.dialect, concurrency=self.concurrency, rpm=self.rpm, tpm=self.tpm
        )

    @cached_property
    def auth(self) -> httpx.Auth:
        """A token, or tokens made from a key pair."""
        if self.private_key_file is not None:
            return KeyPairAuth(
                self._named("account"),
                self._named("user"),
                self.private_key_file,
                self.private_key_passphrase,
                self.scrubber,
            )
        return KeyAuth(self.token or Secret("SNOWFLAKE_TOKEN"), self.scrubber)

    @property
    def dialect(self) -> Any:
        """How requests look on the chosen path."""
        if self.api == "openai":
            return OpenAIDialect()
        if self.api == "complete":
            return CompleteDialect()
        names = ("role", "warehouse", "database", "schema")
        return SQLDialect({n: self.connection_params[n] for n in names if n in self.connection_params}, self.timeout)

    def _named(self, name: str) -> str:
        own = {"account": self.account, "user": self.user}[name]
        found = own or self.connection_params.get(name) or os.environ.get(f"SNOWFLAKE_{name.upper()}")
        if not found:
            raise SynthError(f"CortexSynth needs {name}=..., or SNOWFLAKE_{name.upper()} in the environment")
        return str(found)


class CompleteDialect:
    """`inference:complete`: it streams unless told not to, and says why it ended at the top of the body."""

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        body = json.loads(request.body) | {"stream": False}
        return "POST", base.copy_with(path=PATHS["complete"]), json.dumps(body, ensure_ascii=False).encode()

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return None: an answer is the answer."""
        return None

    def reply(self, response: httpx.Response) -> Any:
        """Return the body as a chat completion, also if it was streamed after all."""
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return streamed(response.text)
        data = parsed(response.content)
        if (found := choices(data, "message")) is None:
            return data
        reason = data.get("finish_reason")
        return {**data, "choices": [_choice(i, c["message"], reason) for i, c in enumerate(found)]}


def streamed(text: str) -> dict[str, Any] | None:
    """Put the events of a stream together; None if one of them is not readable."""
    parts: list[str] = []
    used: dict[str, Any] = {}
    reason = None
    for line in text.splitlines():
        event = line.removeprefix("data:").strip()
        if not line.startswith("data:") or event == "[DONE]":
            continue
        data = parsed(event.encode())
        if (found := choices(data, "delta")) is None:
            return None
        parts += [str(c["delta"].get("content") or "") for c in found]
        used = data.get("usage") or used
        reason = next((c["finish_reason"] for c in found if c.get("finish_reason")), reason)
    return {"choices": [_choice(0, {"content": "".join(parts)}, reason)], "usage": used}


def _choice(index: int, message: dict[str, Any], reason: Any) -> dict[str, Any]:
    kept = {k: v for k, v in message.items() if k != "content_list"}
    return {"index": index, "message": {"role": "assistant", **kept}, "finish_reason": reason}


class SQLDialect:
    """One statement per request. Its `requestId` comes from the request's content: Snowflake runs it once, however
    often it is sent."""

    def __init__(self, context: dict[str, str], timeout: float) -> None:
        self._context, self._timeout = context, timeout

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        body = json.loads(request.body)
        options = {name: body[name] for name in OPTIONS if name in body}
        values = [body["model"], json.dumps(body["messages"]), json.dumps(options)]
        bindings = {str(i): {"type": "TEXT", "value": value} for i, value in enumerate(values, 1)}
        statement = {"statement": SQL, "timeout": int(self._timeout), "bindings": bindings, **self._context}
        query = {"requestId": str(uuid.UUID(bytes=request.key[:16])), "retry": "true"}
        return "POST", base.copy_with(path=PATHS["sql"], params=query), json.dumps(statement).encode()

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return the URL of a statement that still runs."""
        if response.status_code != 202:
            return None
        data = parsed(response.content)
        handle = data.get("statementHandle") if isinstance(data, dict) else None
        return base.copy_with(path=f"{PATHS['sql']}/{handle}") if isinstance(handle, str) else None

    def reply(self, response: httpx.Response) -> Any:
        """Return the one cell of the result as a chat completion."""
        data = parsed(response.content)
        rows = data.get("data") if isinstance(data, dict) else None
        if not isinstance(rows, list):
            return data
        cell = rows[0][0] if rows and isinstance(rows[0], list) and rows[0] else None
        made = parsed(cell.encode("utf-8", "surrogatepass")) if isinstance(cell, str) else None
        if not isinstance(made, dict):
            return None
        said = made.get("choices")
        if not isinstance(said, list) or not all(isinstance(c, dict) for c in said):
            return None
        return {**made, "choices": [_choice(i, {"content": c.get("messages")}, None) for i, c in enumerate(said)]}
