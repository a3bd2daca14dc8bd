"""Rows that mean the same, and the map of what rows cover."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.errors import DataError, SynthError
from posttrain.synth import AnthropicSynth, OpenAISynth, Pipeline, Semantic, TransformersSynth
from posttrain.synth.pipelines.view import page
from posttrain.synth.steps.alike.semantic import placed, vendi

ROWS = [
    {"prompt": text, "id": i} for i, text in enumerate(("a red cat", "red cat a", "two blue dogs", "blue dogs", "rain"))
]


def client(server: Any, folder: Path, **more: Any) -> OpenAISynth:
    return OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=folder, **more)


def words(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """An embedding that counts words, whatever their order."""
    made = [0.0] * 1024
    for word in body["input"].split():
        made[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 1024] += 1.0
    return 200, {"data": [{"index": 0, "embedding": made}], "usage": {"prompt_tokens": 2, "total_tokens": 2}}


def test_the_first_of_those_that_mean_the_same_stays_and_all_are_placed(server: Any, tmp_path: Path) -> None:
    server.answer = words
    step = Semantic(model="e", threshold=0.8)
    for _ in range(2):
        report = Pipeline([step]).run(ROWS, client(server, tmp_path), "t")
        assert server.paid_lines == 5
    kept, dropped = list(report.rows()), list(report.dropped())
    assert [row["id"] for row in kept] == [0, 2, 4]
    assert [(row["id"], row["dropped"]["detail"]) for row in dropped] == [(1, "a red cat"), (3, "two blue dogs")]
    assert [row["similarity"] for row in dropped] == [1.0, pytest.approx(2 / np.sqrt(6), abs=1e-4)]
    assert dropped[0]["place"] == kept[0]["place"] != kept[1]["place"]
    assert not any("\0" in name for row in (*kept, *dropped) for name in row)
    facts = report.stages[1].facts
    assert facts["diversity (Vendi)"] == pytest.approx(3.0)
    html = page(report)
    assert html.count('<circle class="kept"') == 3
    assert html.count('<circle class="lost"') == 2
    assert "Coverage" in html


def test_a_server_that_gives_no_embedding_costs_its_row_alone(server: Any, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return (200, {"data": []}) if body["input"] == "rain" else words(body)

    server.answer = answer
    report = Pipeline([Semantic(model="e")]).run(ROWS, client(server, tmp_path), "t")
    assert report.stages[1].dropped == {"the reply holds no embedding": 1, "means the same as an earlier row": 1}
    server.answer = lambda body: (200, {"data": [{"embedding": [1.0] * len(body["input"])}]})
    with pytest.raises(SynthError, match="differ in length: two models"):
        Pipeline([Semantic(model="other")]).run(ROWS, client(server, tmp_path), "u")
    with pytest.raises(DataError, match="dedup knows none of the columns x"):
        Pipeline([Semantic(model="e")]).run([{"x": 1}], client(server, tmp_path), "v")
    claude = AnthropicSynth(api_key="sk-ant", work_dir=tmp_path / "a")
    with pytest.raises(SynthError, match="AnthropicSynth answers chats only, not /embeddings"):
        Pipeline([Semantic(model="e", body={"max_tokens": 5})]).run(ROWS, claude, "w")


def test_a_model_in_this_process_embeds_as_a_server_would(tiny_model: Path, tmp_path: Path) -> None:
    made = TransformersSynth(name_or_path=str(tiny_model), work_dir=tmp_path, batch_size=2, device="cpu")
    rows = [*ROWS, {"prompt": "a red cat", "id": 9}]
    report = Pipeline([Semantic(threshold=0.9999, client=made)]).run(rows, made, "t")
    dropped = list(report.dropped())
    assert (9, "a red cat") in [(row["id"], row["dropped"]["detail"]) for row in dropped]
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        alone = (
            model(**tokenizer("rain", return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0].mean(0)
        )
    made.add_request_to_batch_task("u", "/embeddings", {"model": "m", "input": "rain"})
    made.add_request_to_batch_task("u", "/embeddings", {"model": "m", "input": "rain over all the town"})
    found = made.execute_batch_task("u")[0]["response"]["body"]["data"][0]["embedding"]
    torch.testing.assert_close(torch.tensor(found), torch.nn.functional.normalize(alone, dim=0), rtol=1e-4, atol=1e-5)


def test_the_vendi_score_counts_what_is_different() -> None:
    same, apart = np.ones((4, 1)) / 1.0, np.eye(4)
    assert vendi(same) == pytest.approx(1.0)
    assert vendi(apart) == pytest.approx(4.0)
    assert vendi(np.concatenate([apart, apart])) == pytest.approx(4.0)
    spread = placed(np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0.5, 0], [0, -0.5, 0]]))
    assert spread == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]]
