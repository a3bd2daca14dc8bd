"""Rows of Snowflake, by its SQL API: a statement is run once, and its rows are kept in a file of the cache.

So all ranks of a run train on the same rows, a run goes on with them, and a warehouse is paid once. Who asks is said by
the environment, with the names of Snowflake's own tools: SNOWFLAKE_ACCOUNT, SNOWFLAKE_TOKEN (a programmatic access
token), and if wanted SNOWFLAKE_WAREHOUSE, _ROLE, _DATABASE and _SCHEMA.

Source: docs.snowflake.com, developer-guide/sql-api (reference, handling-responses).
"""

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.blocks.data.cache import asked_once
from posttrain.errors import DataError
from posttrain.values import Secret

if TYPE_CHECKING:
    import httpx

PREFIX = "snowflake:"
TABLE = re.compile(r'(?:(?:\w|\$)+|"[^"]+")(?:\.(?:(?:\w|\$)+|"[^"]+")){0,2}')
"""`chats`, `public.chats`, `my_db.public."Chats of May"`."""
SETTINGS = ("warehouse", "role", "database", "schema")
RETRIES, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 30.0
log = logging.getLogger("posttrain")


def rows_of(name: str, revision: str | None, token: Secret | None, cache: Path) -> Path:
    """Return the JSON lines file with the rows of a table or query; they are fetched if they were not before.

    Args:
        name: `snowflake:` and a table, or a statement.
        revision: any text; another one fetches again.
        token: who asks, instead of SNOWFLAKE_TOKEN.
        cache: folder; of processes that ask at once, one fetches.

    Raises:
        DataError: Snowflake cannot be asked, or refuses.
    """
    asked = name.removeprefix(PREFIX).strip()
    statement = f"SELECT * FROM {asked}" if TABLE.fullmatch(asked) else asked.rstrip(";")
    given = {name: os.environ.get(f"SNOWFLAKE_{name.upper()}") for name in ("account", *SETTINGS)}
    settings = {name: value for name, value in given.items() if value}
    account = settings.pop("account", "")

    def rows() -> Iterator[dict[str, Any]]:
        if not account:
            raise DataError("SNOWFLAKE_ACCOUNT is not set: `<organization>-<account>`, as in your address there")
        yield from Statement(account, token or Secret("SNOWFLAKE_TOKEN")).run(statement, settings)

    return asked_once("snowflake", [account, statement, settings, revision], rows(), name, cache)


class Statement:
    """Asks one account. `SNOWFLAKE_HOST` is another address than the usual one, as Snowflake's own tools have it."""

    def __init__(self, account: str, token: Secret) -> None:
        host = os.environ.get("SNOWFLAKE_HOST") or f"{account.replace('_', '-').lower()}.snowflakecomputing.com"
        self.address = host if host.startswith("http") else f"https://{host}"
        self.token = token

    def run(self, statement: str, settings: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Run a statement and yield its rows.

        Raises:
            DataError: it is refused, or the server cannot be reached.
        """
        import httpx

        headers = {
            "Authorization": f"Bearer {self.token.reveal().strip()}", "Accept": "application/json",
            "X-Snowflake-Authorization-Token-Type": "PROGRAMMATIC_ACCESS_TOKEN",
        }  # fmt: skip
        with httpx.Client(base_url=self.address, headers=headers, timeout=httpx.Timeout(300, connect=20)) as client:
            body = {"statement": statement, "timeout": 0, "parameters": {"MULTI_STATEMENT_COUNT": "1"}, **settings}
            # sent again after a broken connection, it is run once: the id and `retry` say that it is the same
            once = {"requestId": str(uuid.uuid4())}
            found = self._answer(client, "POST", "/api/v2/statements", json=body, params=once)
            while "resultSetMetaData" not in found:  # it runs for longer than 45 seconds
                time.sleep(1)
                found = self._answer(client, "GET", found["statementStatusUrl"])
            meta = found["resultSetMetaData"]
            columns = [(name_of(column["name"]), column) for column in meta["rowType"]]
            for part in range(max(1, len(meta.get("partitionInfo", [])))):
                if part:
                    path = f"/api/v2/statements/{found['statementHandle']}"
                    found |= self._answer(client, "GET", path, params={"partition": part})
                for values in found["data"]:
                    yield {name: value_of(value, column) for value, (name, column) in zip(values, columns, strict=True)}

    def _answer(self, client: "httpx.Client", method: str, path: str, **more: Any) -> dict[str, Any]:
        """Send a request until there is an answer that counts."""
        import httpx

        for attempt in range(RETRIES):
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            try:
                response = client.request(method, path, **more)
            except httpx.HTTPError as error:
                problem = f"{self.address} cannot be reached: {error or type(error).__name__}"
            else:
                said = parsed(response)
                if response.status_code in (200, 202) and said:
                    return said
                problem = f"Snowflake answers {response.status_code}: {said.get('message') or response.reason_phrase}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    break
                given = response.headers.get("Retry-After", "")
                wait = max(wait, float(given)) if given.isdigit() else wait
            if "params" in more and method == "POST":
                more["params"] = {**more["params"], "retry": "true"}
            if attempt + 1 < RETRIES:
                time.sleep(wait)
        raise DataError(problem)


def parsed(response: "httpx.Response") -> dict[str, Any]:
    """Return what an answer says; nothing if it is not Snowflake's."""
    try:
        said = response.json()
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def name_of(column: str) -> str:
    """Return a column's name; in capitals, as Snowflake stores what was not quoted, it becomes a small one."""
    return column.lower() if column == column.upper() else column


def value_of(value: Any, column: dict[str, Any]) -> Any:
    """Return what a text of the wire means. Dates, times and bytes stay the texts that they are."""
    kind = column["type"].upper()
    if value is None or not isinstance(value, str):
        return value
    if kind == "FIXED":
        return float(value) if column.get("scale") else int(value)
    if kind in ("REAL", "DECFLOAT"):
        return float(value)
    if kind == "BOOLEAN":
        return value.lower() in ("true", "1")
    return json.loads(value) if kind in ("VARIANT", "OBJECT", "ARRAY") else value
