"""Programs that check, and small steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from through import through

from posttrain.synth import (
    FewShot,
    Filter,
    Split,
    Verify,
)
from posttrain.synth.steps.rows import items
from posttrain.synth.steps.verify import last_number


@pytest.mark.parametrize(
    ("text", "items_wanted"),
    [
        ("1. Sing [1]\n2. Dance [2]", ["Sing [1]", "Dance [2]"]),
        ("See [1].\n- one\n- two", ["one", "two"]),
        ('Here you are [1]: ["a", "b"]', ["a", "b"]),
        ('```json\n["a", {"b": 1}]\n```', ["a", '{"b": 1}']),
        ('["a [x]", "b"]', ["a [x]", "b"]),
        ("[1] is no list", []),
    ],
)
def test_a_list_is_told_from_a_reference(text: str, items_wanted: list[str]) -> None:
    assert items(text) == items_wanted


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1/2", 0.5), ("so x = 3 / 4.", 0.75), ("1e3", 1000), ("2.5E-2", 0.025), ("\N{MINUS SIGN}5", -5), ("-5", -5),
        ("it is \N{MINUS SIGN}$1,200.50.", -1200.5), ("10-4", 4), ("(1,2)", 2), ("1,234", 1234), ("+7", 7), ("x2 = 3", 3),
        ("no number", None), ("1/0", 0),
    ],
)  # fmt: skip
def test_the_last_number_is_read_as_people_write_it(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_verifiers() -> None:
    def score(text: str, wanted: Any, function: str, **more: Any) -> float:
        row = {"prompt": "p", "response": text, "answer": wanted}
        ((made,), _) = through(Verify(function=function, **more), [row])
        return float(made["score"])

    assert score("so 3*4=12, that is $1,200.", "... #### 1200", "number") == 1
    assert score("12 or 13", "#### 12", "number") == 0
    assert score("no number", "#### 12", "number") == 0
    assert score(" Paris ", "paris", "exact") == 1
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    for text, right in (('{"a": 1}', 1), ('```json\n{"a": 1}\n```', 1), ('{"a": "1"}', 0), ("{", 0)):
        assert score(text, None, "json_schema", options={"schema": schema}) == right

    ((_, message),) = Verify(function="nmber").check()
    assert "did you mean 'number'?" in message


def test_a_verifier_of_ones_own_comes_from_the_recipes_code(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key")
    Path("rows.jsonl").write_text('{"prompt": "hi"}\n')
    Path("polite_answers.py").write_text(
        "from posttrain.synth import verifier\n\n\n@verifier('polite')\ndef polite(answer, row, word):\n    return word in answer\n"
    )
    Path("r.yaml").write_text(
        f"code: [polite_answers.py]\nclient: {{type: openai, base_url: '{server.url}', mode: online, work_dir: w}}\n"
        "source: rows.jsonl\nsteps:\n- {type: generate, model: m}\n- {type: verify, function: polite, options: {word: hi}}\n"
        "output: out.jsonl\n"
    )
    assert cli.main(["synth", "run", "r.yaml"]) == 0
    assert json.loads(Path("out.jsonl").read_text())["score"] == 1


def test_filter_says_what_a_row_lacks() -> None:
    kept, dropped = through(Filter(least=3, most=4), [{"score": s} for s in (2, 3, 4, 5, None)])
    assert [row["score"] for row in kept] == [3, 4]
    assert sorted(d.reason for d in dropped) == ["score is above 4", "score is below 3", "there is no score"]
    kept, _ = through(Filter(column="finish_reason", equals="stop"), [{"finish_reason": r} for r in ("stop", "length")])
    assert len(kept) == 1
    assert list(Filter().check())


def test_self_instruct_shows_examples_and_splits_lists() -> None:
    made, _ = through(FewShot(k=2, rows=5), [{"prompt": f"task {i}"} for i in range(4)])
    assert made == through(FewShot(k=2, rows=5), [{"prompt": f"task {i}"} for i in range(4)])[0]
    assert len({row["examples"] for row in made}) > 1
    (listed, _), (none, dropped) = (
        through(Split(), [{"response": "1. Sing\n2. Dance"}]),
        through(Split(), [{"response": "?"}]),
    )
    assert [row["prompt"] for row in listed] == ["Sing", "Dance"]
    assert (none, dropped[0].reason) == ([], "holds no list")
