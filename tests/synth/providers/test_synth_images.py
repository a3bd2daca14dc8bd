"""Rows with images pass through the steps, to every kind of server, and come out as trainers read them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from synth_server import chat
from test_synth_anthropic import Anthropic
from test_synth_anthropic import message as anthropic_message
from test_synth_bedrock import Bedrock
from test_synth_bedrock import message as bedrock_message
from test_synth_gemini import Gemini, candidate

from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.pairs import pair
from posttrain.blocks.data.rows.schemas import conversation
from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError, SynthError
from posttrain.synth import (
    AnthropicSynth,
    BedrockSynth,
    Compare,
    Converse,
    GeminiSynth,
    Generate,
    Judge,
    OpenAISynth,
    Pair,
    Pipeline,
    Search,
    TransformersSynth,
    User,
    VllmSynth,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(40))
DATA = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{DATA}"
SCORE = '{"rationale": "r", "score": 4}'


@pytest.fixture
def rows(tmp_path: Path) -> Source:
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "cat.png").write_bytes(PNG)
    (folder / "rows.jsonl").write_text('{"prompt": "What is <image>?", "images": ["pictures/cat.png"], "id": 1}\n')
    return Source(name_or_path=str(folder / "rows.jsonl"))


def sent_images(body: dict[str, Any]) -> list[str]:
    """The images of the last user turn, as each wire has them."""
    if "contents" in body:
        return [p["inlineData"]["data"] for p in body["contents"][-1]["parts"] if "inlineData" in p]
    found = []
    content = body["messages"][-1]["content"]
    for part in [] if isinstance(content, str) else content:
        if part.get("type") == "image_url":
            found.append(part["image_url"]["url"].partition(";base64,")[2])
        elif part.get("type") == "image":
            found.append(part["source"]["data"])
        elif "image" in part:
            assert part["image"]["format"] == "png"
            found.append(part["image"]["source"]["bytes"])
    return found


def judged(text: str) -> str:
    return SCORE if "impartial judge" in text else "A cat."


def clients(kind: str, folder: Path, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A server of some kind, which judges and answers, and its client."""
    if kind in ("openai", "vllm"):
        server = request.getfixturevalue("server")

        def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            reply = chat({**body, "messages": [{"content": ""}]})
            reply["choices"][0]["message"]["content"] = judged(json.dumps(body["messages"]))
            return 200, reply

        server.answer = answer
        if kind == "vllm":
            return server, VllmSynth(base_url=server.url, work_dir=folder)
        return server, OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=folder)
    if kind == "anthropic":
        server = Anthropic()
        server.says = lambda b: {**anthropic_message(b), "content": [{"type": "text", "text": judged(json.dumps(b))}]}
        made: Any = AnthropicSynth(base_url=server.url, api_key="sk-ant-0123456789", mode="online", work_dir=folder)
    elif kind == "gemini":
        server = Gemini()

        def says(body: dict[str, Any]) -> dict[str, Any]:
            reply = candidate(body)
            reply["candidates"][0]["content"]["parts"] = [{"text": judged(json.dumps(body))}]
            return reply

        server.says = says
        url = f"{server.root}/v1beta"
        made = GeminiSynth(base_url=url, api_key="AIza-0123456789", mode="online", work_dir=folder)
    else:
        server, bearer = Bedrock(), "bedrock-api-key-0123"
        server.bearer = bearer

        def converse(body: dict[str, Any]) -> dict[str, Any]:
            reply = bedrock_message(body)
            reply["output"]["message"]["content"] = [{"text": judged(json.dumps(body))}]
            return reply

        server.says = converse
        url = server.url.removesuffix("/v1")
        made = BedrockSynth(base_url=url, api_key=bearer, region="eu-west-1", work_dir=folder)
    request.addfinalizer(server.close)
    return server, made


@pytest.mark.parametrize("kind", ["openai", "vllm", "anthropic", "gemini", "bedrock"])
def test_images_reach_the_model_and_the_judge_of_every_provider(
    kind: str, rows: Source, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server, client = clients(kind, tmp_path / "work", request)
    name = "us.anthropic.claude-v1:0" if kind == "bedrock" else "m"
    body = {"max_tokens": 9}
    pipeline = Generate(model=name, body=body) | Judge(rubric="Is it right?", model=name, body=body)
    for _ in range(2):
        report = pipeline.run(rows, client, "t")
        assert len(server.bodies) == 2
    assert [sent_images(body) for _, body in server.bodies] == [[DATA], [DATA]]
    (row,) = report.rows()
    assert (row["response"], row["score"], row["id"]) == ("A cat.", 4.0, 1)
    assert "images" not in row
    messages = conversation(row)["messages"]  # as the data block reads it, from any folder
    (image,) = images_of(messages[0])
    assert Path(image["image"]).read_bytes() == PNG
    assert [part.get("text") for part in messages[0]["content"]] == ["What is ", None, "?"]


def test_images_go_through_templates_conversations_pairs_and_searches(
    server: Any, rows: Source, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = json.dumps(body["messages"])
        said = '{"rationale": "r", "winner": "A"}' if "Answer A" in text else judged(text)
        reply = chat({**body, "messages": [{"content": ""}]})
        server.said = getattr(server, "said", 0) + 1
        steps = "The answer is: a cat." if "next step" in text else f"{said} {server.said}"
        reply["choices"][0]["message"]["content"] = said if said.startswith("{") else steps
        return 200, reply

    server.answer = answer
    client = OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=tmp_path / "work")
    (row,) = Pipeline([Generate(model="m", template="Say what you see. ({id})")]).run(rows, client, "a").rows()
    assert conversation(row)["messages"][0]["content"][0]["type"] == "image"
    step = Converse(model="m", turns=2, user=User(model="p"))
    (row,) = Pipeline([step]).run(rows, client, "b").rows()
    assert [bool(images_of(m)) for m in conversation(row)["messages"]] == [True, False, False, False]
    searched = Search(model="m", width=1, expansions=1)
    (row,) = Pipeline([searched]).run(rows, client, "c").rows()
    assert row["response"] == "The answer is: a cat."
    both = Generate(model="m", n=2) | Judge(rubric="r", model="j") | Pair(margin=0) | Compare(model="j", swap=False)
    report = both.run(rows, client, "d")
    if made := list(report.rows()):
        assert images_of(pair(made[0]).conversations[0]["messages"][0])
    assert all(
        sent_images(body) == [DATA] for _, body in server.bodies if isinstance(body["messages"][-1]["content"], list)
    )
    assert sum(bool(sent_images(body)) for _, body in server.bodies) >= 8


def test_bytes_and_data_in_rows_are_sent_and_what_is_no_image_is_named(server: Any, tmp_path: Path) -> None:
    client = OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=tmp_path)
    server.answer = lambda body: (200, chat({**body, "messages": [{"content": "x"}]}))
    step = Generate(model="m")
    part = {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}}
    rows = [
        {"prompt": "q", "image": PNG}, {"prompt": "q", "images": [{"bytes": PNG, "path": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, part]}]},
    ]  # fmt: skip
    assert len(list(Pipeline([step]).run(rows, client, "t").rows())) == 3
    urls = [
        [p["image_url"] for p in b["messages"][-1]["content"] if p["type"] == "image_url"] for _, b in server.bodies
    ]
    assert sorted(url["url"] for (url,) in urls) == sorted([URL, URL, "https://a/b.png"])
    (tmp_path / "a.bmp").write_bytes(b"BM not for providers")
    for image, message in (
        (str(tmp_path / "a.bmp"), "is no PNG, JPEG, GIF or WebP"), (str(tmp_path / "none.png"), "No such file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"0-source.jsonl:1: .*{message}"):
            Pipeline([step]).run([{"prompt": "q", "images": [image]}], client, "u")
    local = TransformersSynth(name_or_path="x", work_dir=tmp_path / "l")
    with pytest.raises(SynthError, match="answers text alone"):
        Pipeline([step]).run([{"prompt": "q", "image": PNG}], local, "v")
