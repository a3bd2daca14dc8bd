"""Conversations: tools that are called, a simulated user, samplers and templates; through to rows that are trained on."""

import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from synth_server import chat
from tokens import ASK, CHATML, byte_tokenizer

from posttrain.blocks.data.encoding.encoders import ChatEncoder
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.refused import Refused
from posttrain.blocks.data.rows.schemas import Sample as Read
from posttrain.blocks.data.rows.schemas import conversation
from posttrain.errors import DataError, SynthError
from posttrain.synth import (
    Complete,
    Converse,
    Filter,
    Generate,
    McpServer,
    OpenAISynth,
    Pipeline,
    Rename,
    Report,
    Sample,
    User,
    VllmSynth,
    tool,
)
from posttrain.synth.pipelines.step import Template
from posttrain.synth.steps.turns import mcp as mcp_home
from posttrain.synth.steps.turns.tools import PythonTool

Body = dict[str, Any]
CALLED: Counter[str] = Counter()


def client(server: Any, folder: Path, **more: Any) -> OpenAISynth:
    return OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=folder, **more)


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """Say how the weather will be.

    Args:
        city: where.
        days: how many, from today on.
    """
    CALLED[city] += 1
    if city == "Atlantis":
        raise LookupError("no such place")
    return {"city": city, "sky": "clear", "days": days}


def calling(name: str, arguments: Any, number: int = 0) -> Body:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": text}}


def answering(says: Callable[[Body], str | list[Body]]) -> Callable[[Body], tuple[int, Body]]:
    """A server that says a text, or calls tools."""

    def answer(body: Body) -> tuple[int, Body]:
        said, reply = says(body), chat(body)
        message = {"role": "assistant", "content": said} if isinstance(said, str) else (
            {"role": "assistant", "content": None, "tool_calls": said}
        )  # fmt: skip
        reason = "stop" if isinstance(said, str) else "tool_calls"
        return 200, {**reply, "choices": [{"index": 0, "message": message, "finish_reason": reason}]}

    return answer


def asks_for_weather(body: Body) -> str | list[Body]:
    """Calls the tool for the city that the user names, then says what it gave."""
    last = body["messages"][-1]
    if last["role"] == "user":
        cities = re.findall(r"in (\w+)", last["content"])
        return [calling("weather", {"city": city}, n) for n, city in enumerate(cities)]
    return f"The tool says: {last['content']}"


def step(**more: Any) -> Converse:
    return Converse(**{"model": "m", "template": "Weather in {city}?", "tools": [weather], **more})


# -- tools --------------------------------------------------------------------------------


def test_tools_are_described_called_answered_and_kept_and_called_once(server: Any, tmp_path: Path) -> None:
    CALLED.clear()
    server.answer = answering(asks_for_weather)
    rows = [{"city": "Oslo", "id": 1}, {"city": "Lima and in Quito", "id": 2}]
    for _ in range(2):
        report = Pipeline([step()]).run(rows, client(server, tmp_path), "t")
        assert dict(CALLED) == {"Oslo": 1, "Lima": 1, "Quito": 1}
        assert server.calls["POST /chat/completions"] == 4
    first, second = report.rows()
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [m["tool_call_id"] for m in second["messages"] if m["role"] == "tool"] == ["call-0", "call-1"]
    assert json.loads(second["messages"][3]["content"])["city"] == "Quito"
    assert second["messages"][-1]["content"].startswith('The tool says: {"city": "Quito"')
    assert (first["id"], first["calls"], second["calls"], second["failed_calls"], first["turns"]) == (1, 1, 2, 0, 1)
    assert first["tools"] == server.bodies[0][1]["tools"]
    assert first["tools"][0]["function"] == {
        "name": "weather", "description": "Say how the weather will be.",
        "parameters": {
            "type": "object", "required": ["city"], "additionalProperties": False,
            "properties": {
                "city": {"type": "string", "description": "where."},
                "days": {"type": "integer", "default": 1, "description": "how many, from today on."},
            },
        },
    }  # fmt: skip
    assert report.stages[1].requests == 4  # calls go nowhere
    assert report.stages[1].asked_again == 0
    assert report.stages[1].facts["calls"] == 1.5


def test_what_came_of_tools_is_encoded_with_calls_trained_and_results_not(server: Any, tmp_path: Path) -> None:
    server.answer = answering(asks_for_weather)
    report = Pipeline([step(), Filter(column="failed_calls", most=0)]).run(
        [{"city": "Oslo"}], client(server, tmp_path), "t"
    )
    report.export(tmp_path / "rows.parquet")
    import pyarrow.parquet

    (row,) = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    row = {name: json.loads(value) if name in ("messages", "tools") else value for name, value in row.items()}
    jinja = (
        "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    tokenizer = byte_tokenizer(jinja)
    made = ChatEncoder(ChatRenderer(tokenizer), lambda row: Read([conversation(row)]))
    (encoded,) = made.encode([row])
    assert not isinstance(encoded, Refused), encoded
    ((ids, mask),) = encoded.documents
    trained, whole = tokenizer.decode(ids[mask].tolist()), tokenizer.decode(ids.tolist())
    assert trained.startswith('weather {"city": "Oslo"}<|im_end|>The tool says: ')
    assert "how many, from today on" in whole
    assert '"days": 1}<|im_end|>' in whole
    assert "<|im_start|>tool" not in trained
    plain = ChatEncoder(ChatRenderer(byte_tokenizer(CHATML + ASK)), lambda row: Read([conversation(row)]))
    (refused,) = plain.encode([row])
    assert isinstance(refused, Refused)  # a template without tools would train on half of it


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (calling("weather", {"city": "Atlantis"}), "Error: LookupError: no such place"),
        (calling("weather", {"days": "many"}), "Error: the arguments do not fit: city: "),
        (calling("weather", "{"), "Error: the arguments are not a JSON object"),
        (calling("wether", {}), "Error: there is no tool 'wether'; did you mean 'weather'? (there are: weather)"),
    ],
)
def test_a_call_that_fails_is_told_to_the_model_and_counted(server: Any, tmp_path: Path, call: Body, told: str) -> None:
    server.answer = answering(lambda body: [call] if body["messages"][-1]["role"] == "user" else "I see.")
    (row,) = Pipeline([step()]).run([{"city": "x"}], client(server, tmp_path), "t").rows()
    assert row["messages"][2]["content"].startswith(told)
    assert (row["failed_calls"], row["messages"][-1]["content"]) == (1, "I see.")


def test_a_model_that_never_stops_calling_is_dropped_and_bounded(server: Any, tmp_path: Path) -> None:
    server.answer = answering(lambda body: [calling("weather", {"city": f"c{len(body['messages'])}"})])
    report = Pipeline([step(most_calls=3)]).run([{"city": "x"}], client(server, tmp_path), "t")
    assert report.stages[1].dropped == {"more than 3 messages with calls in a turn": 1}
    assert server.calls["POST /chat/completions"] == 4


def test_calls_that_were_made_before_a_crash_are_not_made_again(server: Any, tmp_path: Path) -> None:
    CALLED.clear()
    server.answer = answering(asks_for_weather)
    stops = client(server, tmp_path, max_requests=1)
    with pytest.raises(SynthError, match="max_requests"):  # the first wave; calls are made; then the bound
        Pipeline([step()]).run([{"city": "Oslo"}], stops, "t", max_requests=1)
    assert CALLED["Oslo"] == 1
    (row,) = Pipeline([step()]).run([{"city": "Oslo"}], client(server, tmp_path), "t").rows()
    assert CALLED["Oslo"] == 1
    assert row["messages"][-1]["content"].startswith("The tool says")
    assert server.calls["POST /chat/completions"] == 2


def test_wrong_tools_are_said_before_anything_is_sent(server: Any, tmp_path: Path) -> None:
    def bare(x):  # type: ignore[no-untyped-def]
        return x

    for wrong, message in (
        (bare, "the tool 'bare' has a parameter 'x' without a type"),
        ("nothing", "there is no tool 'nothing' .known: "),
        (3, "a tool is a function with a name"),
    ):
        with pytest.raises(SynthError, match=message):
            Pipeline([step(tools=[wrong])]).run([{"city": "x"}], client(server, tmp_path), "t")
    with pytest.raises(SynthError, match="needs `user`"):
        Pipeline([step(turns=2)]).run([{"city": "x"}], client(server, tmp_path), "t")
    with pytest.raises(SynthError, match="two tools are called 'weather'"):
        Pipeline([step(servers={"s": mcp(tmp_path, name="weather")})]).run(
            [{"city": "x"}], client(server, tmp_path), "t"
        )
    assert not server.calls


def test_a_recipe_names_tools_of_its_own_code() -> None:
    @tool
    def doubled(x: float) -> float:
        """Double a number."""
        return 2 * x

    made = Converse(model="m", tools=["doubled"])
    assert list(made.check()) == []
    assert PythonTool(doubled).call({"x": 2}) == ("4.0", False)


# -- servers of tools -----------------------------------------------------------------------

SERVER = """
import json, os, sys

def say(**what):
    print(json.dumps({"jsonrpc": "2.0", **what}), flush=True)

for line in sys.stdin:
    asked = json.loads(line)
    method, number, params = asked.get("method"), asked.get("id"), asked.get("params") or {}
    if method == "initialize":
        assert params["protocolVersion"] and params["clientInfo"]["name"] == "posttrain"
        say(id=number, result={"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                               "serverInfo": {"name": "little", "version": "1"}})
    elif method == "tools/list":
        first = {"name": "NAME", "description": "Look something up.", "inputSchema":
                 {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}
        second = {"name": "environment", "inputSchema": {"type": "object", "properties": {}}}
        page = {"tools": [second]} if params.get("cursor") else {"tools": [first], "nextCursor": "2"}
        say(id=number, result=page)
    elif method == "tools/call":
        what = params["arguments"].get("what")
        say(method="notifications/message", params={"level": "info", "data": "hm"})
        say(id="theirs", method="ping")
        assert json.loads(sys.stdin.readline()) == {"jsonrpc": "2.0", "id": "theirs", "result": {}}
        with open("LOG", "a") as log:
            log.write(f"{what}\\n")
        if what == "crash":
            sys.exit("out of paper")
        if what == "hang":
            import time; time.sleep(60)
        if what == "refuse":
            say(id=number, error={"code": -32602, "message": "not that"})
        elif params["name"] == "environment":
            say(id=number, result={"content": [{"type": "text", "text": " ".join(sorted(os.environ))}]})
        else:
            parts = [{"type": "text", "text": f"about {what}"}, {"type": "image", "data": "", "mimeType": "image/png"}]
            say(id=number, result={"content": parts, "isError": what == "fail"})
"""


def mcp(folder: Path, name: str = "search", **more: Any) -> McpServer:
    script = folder / f"{name}.py"
    script.write_text(textwrap.dedent(SERVER).replace("NAME", name).replace("LOG", str(folder / "log")))
    return McpServer(command=[sys.executable, str(script)], **more)


def looks_up(what: str, name: str = "search") -> Callable[[Body], str | list[Body]]:
    return lambda body: [calling(name, {"what": what})] if body["messages"][-1]["role"] == "user" else "done"


@pytest.mark.parametrize(
    ("what", "said", "failed"),
    [("cats", "about cats\n[image]", 0), ("fail", "about fail\n[image]", 1), ("refuse", "Error: not that", 1)],
)
def test_tools_of_a_server_process_are_offered_called_and_kept(
    server: Any, tmp_path: Path, what: str, said: str, failed: int
) -> None:
    server.answer = answering(looks_up(what))
    made = step(tools=[], servers={"s": mcp(tmp_path)})
    for _ in range(2):
        (row,) = Pipeline([made]).run([{"city": "x"}], client(server, tmp_path), "t").rows()
    assert [t["function"]["name"] for t in row["tools"]] == ["search", "environment"]
    assert row["tools"][0]["function"]["parameters"]["required"] == ["what"]
    assert (row["messages"][2]["content"], row["failed_calls"]) == (said, failed)
    assert (tmp_path / "log").read_text() == f"{what}\n"


def test_a_server_process_sees_no_keys(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.answer = answering(looks_up("", "environment"))
    made = step(tools=[], servers={"s": mcp(tmp_path, only=["environment"], env={"MINE": "1"})})
    (row,) = Pipeline([made]).run([{"city": "x"}], client(server, tmp_path), "t").rows()
    seen = row["messages"][2]["content"].split()
    assert "MINE" in seen
    assert "PATH" in seen
    assert "OPENAI_API_KEY" not in seen
    assert len(row["tools"]) == 1


@pytest.mark.parametrize(
    ("what", "message"), [("crash", "has ended during tools/call. It said: out of paper"), ("hang", "has not answered")]
)
def test_a_server_process_that_dies_or_hangs_is_named_and_what_came_is_kept(
    server: Any, tmp_path: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_home, "PATIENCE", 0.1)
    server.answer = answering(looks_up(what))
    made = step(tools=[], servers={"s": mcp(tmp_path, timeout=0.5 if what == "hang" else 20.0)})
    with pytest.raises(SynthError, match=message):
        Pipeline([made]).run([{"city": "x"}], client(server, tmp_path), "t")
    server.answer = answering(looks_up("cats"))
    with pytest.raises(SynthError, match=message):  # the model's reply is kept, so that it is the same call again
        Pipeline([made]).run([{"city": "x"}], client(server, tmp_path), "t")
    assert server.calls["POST /chat/completions"] == 1


def test_a_server_that_is_none_is_named(server: Any, tmp_path: Path) -> None:
    for command, message in (([str(tmp_path / "none")], "does not start"), (["true"], "has ended during initialize")):
        made = step(tools=[], servers={"s": McpServer(command=command)})
        with pytest.raises(SynthError, match=message):
            Pipeline([made]).run([{"city": "x"}], client(server, tmp_path), "t")


# -- a simulated user -----------------------------------------------------------------------


def test_a_model_plays_the_user_until_it_has_what_it_wants(server: Any, tmp_path: Path) -> None:
    def says(body: Body) -> str:
        last = body["messages"][-1]["content"]
        if body["model"] == "player":
            assert "You are a baker." in last
            assert "Error" not in last
            turn = last.count("[assistant]")
            return "[END]" if turn == 2 else f"And then? ({turn})"
        return f"Answer {len(body['messages'])}."

    server.answer = answering(says)
    made = Converse(model="m", n=2, turns=5, user=User(role="You are {who}.", model="player"))
    report = Pipeline([made]).run([{"prompt": "Hello", "who": "a baker"}], client(server, tmp_path), "t")
    rows = list(report.rows())
    assert [row["turns"] for row in rows] == [2, 2]
    assert [(m["role"], m["content"]) for m in rows[0]["messages"]] == [
        ("user", "Hello"), ("assistant", "Answer 1."), ("user", "And then? (1)"), ("assistant", "Answer 3."),
    ]  # fmt: skip
    assert conversation(rows[0])["messages"][-1]["role"] == "assistant"
    bounded = attrs.evolve(made, turns=2)
    (row, _) = Pipeline([bounded]).run([{"prompt": "Hello", "who": "a baker"}], client(server, tmp_path), "u").rows()
    assert row["turns"] == 2
    assert row["messages"][-1]["role"] == "assistant"


def test_one_conversation_that_fails_does_not_cost_the_others(server: Any, tmp_path: Path) -> None:
    def answer(body: Body) -> tuple[int, Body]:
        last = body["messages"][-1]["content"]
        if "bad" in last and body["model"] == "player":
            return 400, {"error": {"message": "no", "code": "content_policy"}}
        return answering(lambda body: "go on" if body["model"] == "player" else "yes")(body)

    server.answer = answer
    made = Converse(model="m", turns=2, user=User(model="player"))
    report = Pipeline([made]).run([{"prompt": "bad"}, {"prompt": "good"}], client(server, tmp_path), "t")
    (row,) = report.rows()
    assert [m["content"] for m in row["messages"]] == ["good", "yes", "go on", "yes"]
    assert report.stages[1].dropped == {"the user: request failed: content_policy": 1}


def test_thoughts_go_back_with_the_calls_that_followed_from_them_and_not_later(server: Any, tmp_path: Path) -> None:
    def answer(body: Body) -> tuple[int, Body]:
        if body["model"] == "player":
            return answering(lambda body: "Weather in Rome?")(body)
        status, reply = answering(asks_for_weather)(body)
        reply["choices"][0]["message"]["reasoning_content"] = "hm"
        return status, reply

    server.answer = answer
    made = step(turns=2, user=User(model="player"))
    (row,) = Pipeline([made]).run([{"city": "Oslo"}], client(server, tmp_path), "t").rows()
    sent = [body["messages"] for _, body in server.bodies if body["model"] == "m"]
    thought = [[bool(m.get("reasoning_content")) for m in messages] for messages in sent]
    assert thought == [[False], [False, True, False], [False] * 5, [False] * 5 + [True, False]]
    assert sum(bool(m.get("reasoning_content")) for m in row["messages"]) == 4


# -- samplers, names, templates -----------------------------------------------------------------


def test_samples_follow_their_weights_and_depend_on_nothing_but_their_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"persona": "a nurse"}\n{"persona": "a pilot"}\n')
    made = Sample(
        attributes={"level": ["easy", "hard"], "topic": {"law": 1, "art": 9}},
        sources={"persona": source(tmp_path / "p.jsonl")}, n=3,
    )  # fmt: skip
    rows = [{"id": i} for i in range(300)]
    drawn = list(made.table(rows))
    assert len(drawn) == 900
    count = Counter(row["topic"] for row in drawn)  # type: ignore[index]
    assert 780 < count["art"] < 840
    assert {row["persona"] for row in drawn} == {"a nurse", "a pilot"}  # type: ignore[index]
    assert list(made.table(rows[100:]))[:3] == drawn[300:303]
    assert list(made.table([{"x": 1}] * 20)) != [next(iter(made.table([{"x": 1}])))] * 60  # equal rows draw differently
    assert "art" in str(made.facts(drawn)["topic"])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the row has a column 'level' already"):
        list(made.table([{"level": 3}]))
    wrong = Sample(attributes={"a": {"x": -1}, "b": "text"})
    assert [message for _, message in wrong.check()] == [
        "a: weights are numbers from 0 on, one of them above 0", "b: give a list of values, or values with their weights",
    ]  # fmt: skip


def source(path: Path) -> Any:
    from posttrain.blocks.data.sources import Source

    return Source(name_or_path=str(path))


def test_columns_get_new_names(tmp_path: Path) -> None:
    made = Rename(columns={"response": "prompt"}, drop=["model", "none"])
    assert made.fold({"a": 1, "prompt": "old", "response": "new", "model": "m"}, []) == [{"a": 1, "prompt": "new"}]
    with pytest.raises(DataError, match="no column 'response'; did you mean 'respons'"):
        made.fold({"respons": 1}, [])


def test_jinja_knows_the_columns_alone_and_a_missing_one_is_named_with_its_row(server: Any, tmp_path: Path) -> None:
    made = Generate(
        model="m", syntax="jinja",
        messages=[
            Template(role="system", content="{% if formal %}Be formal.{% else %}Relax.{% endif %}"),
            Template(role="user", content="{% for x in items %}{{ loop.index }}. {{ x.name | upper }}\n{% endfor %}"),
        ],
    )  # fmt: skip
    rows = [{"formal": False, "items": [{"name": "ä"}, {"name": "b"}]}]
    (row,) = Pipeline([made]).run(rows, client(server, tmp_path), "t").rows()
    assert [m["content"] for m in row["prompt"]] == ["Relax.", "1. Ä\n2. B\n"]
    sent = server.paid_lines
    with pytest.raises(DataError, match=r"0-source.jsonl:2: there is no column 'formal'; did you mean 'formaal'"):
        Pipeline([made]).run([*rows, {"formaal": 1, "items": []}], client(server, tmp_path), "u")
    with pytest.raises(
        DataError,
        match=r"the template asks for what is not there: 'dict object' has no attribute 'name' \(columns: formal, items\)",
    ):
        Pipeline([made]).run([{"formal": 1, "items": [{}]}], client(server, tmp_path), "v")
    assert server.paid_lines == sent
    broken = Generate(model="m", syntax="jinja", template="{% if x %}")
    assert [(name, message[:25]) for name, message in broken.check()] == [("template", "is no Jinja: line 1: Unex")]
    escape = Generate(model="m", syntax="jinja", template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(DataError, match="asks for what is not there|cannot be filled"):
        escape.prompt({"x": 1})


def test_text_goes_on_without_a_chat_template(server: Any, tmp_path: Path) -> None:
    def answer(body: Body) -> tuple[int, Body]:
        assert "messages" not in body
        text = " How do bees fly?\n" if "<|user|>" in body["prompt"] else "  "
        return 200, {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}

    server.answer = answer
    made = Complete(model="m", prompt="{begin}", n=2, into="question", body={"max_tokens": 9})
    vllm = VllmSynth(base_url=server.url, work_dir=tmp_path, attempts=1)
    report: Report = Pipeline([made]).run([{"begin": "<|user|>"}, {"begin": "x"}], vllm, "t")
    assert [row["question"] for row in report.rows()] == ["How do bees fly?"] * 2
    assert report.stages[1].dropped == {"the reply holds no text": 2}
    assert server.calls["POST /completions"] == 4
