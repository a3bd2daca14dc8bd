"""Rows of Snowflake, from a server that speaks its SQL API over a real socket."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokens import byte_tokenizer

from posttrain.blocks.data import snowflake
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

TOKEN = "pat-of-a-user"
COLUMNS = [
    {"name": "QUESTION", "type": "text"}, {"name": "ANSWER", "type": "text"}, {"name": "N", "type": "fixed", "scale": 0},
    {"name": "price", "type": "fixed", "scale": 2}, {"name": "GOOD", "type": "boolean"}, {"name": "MORE", "type": "variant"},
]  # fmt: skip
PARTS = [
    [["why?", "so", "7", "1.50", "true", '{"a": [1]}'], ["ü?", "“ja”", None, None, "false", None]],
    [["how?", "thus", "-2", "0.25", None, '"text"']],
]


class Server:
    """`answers` go first: (status, headers, body), or None to break the connection."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, Any], dict[str, str]]] = []
        self.answers: list[tuple[int, dict[str, str], dict[str, Any]] | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.reply(json.loads(self.rfile.read(length)))

            def do_GET(self) -> None:
                self.reply({})

            def reply(self, body: dict[str, Any]) -> None:
                outer.seen.append((self.command, self.path, body, dict(self.headers)))
                found = outer.answers.pop(0) if outer.answers else outer.result(self.path)
                if found is None:
                    self.connection.close()
                    return
                status, headers, said = found
                content = json.dumps(said).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def result(self, path: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        if "partition=1" in path:  # what follows the first part has no metadata
            return 200, {}, {"data": PARTS[1]}
        meta = {"rowType": COLUMNS, "partitionInfo": [{"rowCount": 2}, {"rowCount": 1}], "numRows": 3}
        return 200, {}, {"resultSetMetaData": meta, "data": PARTS[0], "statementHandle": "h-1", "code": "090001"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    made = Server()
    settings = {"ACCOUNT": "org-me", "TOKEN": TOKEN + "\n", "WAREHOUSE": "small"}
    for name, value in {**settings, "HOST": f"http://127.0.0.1:{made.http.server_port}"}.items():
        monkeypatch.setenv(f"SNOWFLAKE_{name}", value)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(snowflake, "FIRST_WAIT", 0.01)
    yield made
    made.http.shutdown()
    made.http.server_close()


def rows(name: str, **more: Any) -> list[dict[str, Any]]:
    source = Source(name_or_path=name, **more)
    return [dict(row.values) for row, _ in source.read(source.open())]


def test_a_table_is_fetched_once_with_the_values_that_it_has(server: Server) -> None:
    found = rows("snowflake:my_db.public.chats")
    assert found == [
        {"question": "why?", "answer": "so", "n": 7, "price": 1.5, "good": True, "more": {"a": [1]}},
        {"question": "ü?", "answer": "“ja”", "n": None, "price": None, "good": False, "more": None},
        {"question": "how?", "answer": "thus", "n": -2, "price": 0.25, "good": None, "more": "text"},
    ]
    method, _, body, headers = server.seen[0]
    assert (method, body["statement"], body["warehouse"]) == ("POST", "SELECT * FROM my_db.public.chats", "small")
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert len(server.seen) == 2  # and the second part
    assert rows("snowflake:my_db.public.chats") == found
    assert len(server.seen) == 2
    rows("snowflake:my_db.public.chats", revision="of today")
    assert len(server.seen) == 4


def test_rows_are_trained_like_those_of_a_file(server: Server, tmp_path: Path) -> None:
    name = "snowflake:SELECT question, answer FROM chats ORDER BY n;"
    prepared = SFTData(sources=[Source(name_or_path=name)]).prepare(byte_tokenizer(TEMPLATES["chatml"]))
    assert prepared.ledger["sources"][name]["rows_in"] == 3
    assert server.seen[0][2]["statement"] == "SELECT question, answer FROM chats ORDER BY n"


def test_a_long_query_is_waited_for_and_faults_are_tried_again_as_the_same_request(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    running = {"statementStatusUrl": "/api/v2/statements/h-1", "statementHandle": "h-1", "message": "in progress"}
    server.answers = [None, (503, {}, {}), (429, {"Retry-After": "1"}, {}), (202, {}, running), (202, {}, running)]
    assert len(rows("snowflake:SELECT 1")) == 3
    first, *again = [path for method, path, *_ in server.seen if method == "POST"]
    assert again == [f"{first}&retry=true"] * 3


def test_a_refusal_is_a_message_that_names_no_token_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.answers = [(422, {}, {"code": "002003", "message": "Object 'CHATS' does not exist or not authorized."})]
    with pytest.raises(DataError, match=r"snowflake:chats: Snowflake answers 422: Object 'CHATS' does not") as raised:
        rows("snowflake:chats")
    assert TOKEN not in str(raised.value)
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.suffix in (".jsonl", ".tmp")]


@pytest.mark.parametrize(("name", "said"), [("ACCOUNT", "SNOWFLAKE_ACCOUNT is not set"), ("TOKEN", "SNOWFLAKE_TOKEN")])
def test_what_is_not_set_is_said(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.delenv(f"SNOWFLAKE_{name}")
    with pytest.raises(Exception, match=said):
        rows("snowflake:chats")


def test_what_means_nothing_is_said_before_anything_is_asked() -> None:
    assert dict(Source(name_or_path="snowflake:", split="train").check()) == {
        "name_or_path": "names no table and no query: snowflake:my_db.public.chats, snowflake:SELECT ...",
        "split": "means nothing for Snowflake",
    }
