"""Duplicates, and test data among training data."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from through import Row, through

from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError
from posttrain.synth import (
    Decontaminate,
    Dedup,
)

WORDS = [f"w{i}" for i in range(3000)]


def documents(count: int, seed: int = 0) -> list[list[str]]:
    chance = random.Random(seed)
    return [chance.choices(WORDS, k=100) for _ in range(count)]


def noisy(document: list[str], chance: random.Random, rate: float = 0.02) -> list[str]:
    return [chance.choice(WORDS) if chance.random() < rate else word for word in document]


def test_minhash_finds_planted_near_duplicates_and_nothing_else() -> None:
    chance, originals = random.Random(1), documents(1000)
    rows = [{"response": " ".join(d), "of": None} for d in originals]
    rows += [{"response": " ".join(noisy(originals[i], chance)), "of": i} for i in range(500)]
    kept, dropped = through(Dedup(), rows)
    assert all(d.row["of"] is not None for d in dropped)  # no original is lost
    assert len(dropped) / 500 > 0.95
    matching = sum(d.detail == " ".join(originals[d.row["of"]])[:500] for d in dropped)
    assert matching == len(dropped)  # and the reason names the right one
    again, _ = through(Dedup(), rows)
    assert again == kept


def test_exact_duplicates_are_those_of_the_same_words() -> None:
    kept, dropped = through(
        Dedup(method="exact"), [{"response": t} for t in ("Say hi!", "say  hi", "say ho", "Say hi!")]
    )
    assert [row["response"] for row in kept] == ["Say hi!", "say ho"]
    assert len(dropped) == 2


DIFFERENT = [
    ("3+4", "3-4"), ("C", "C++"), ("C", "C#"), ("a<b", "a>b"), ("x²=5", "x²=\N{MINUS SIGN}5"), ("x=5", "x=-5"), ("x²", "x2"),
    ("good \U0001f600", "good \U0001f622"), ("f(x)", "f[x]"), ("3.4", "34"), ("5!", "5"), ("5%", "5"), ("1/2", "1*2"),
    ("हिन्दी", "हन्दी"), ('print("a")', "print(a)"), ("是", "不是"),
]  # fmt: skip


@pytest.mark.parametrize("method", ["exact", "minhash"])
@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda pair: " ".join(map(ascii, pair)))
def test_texts_that_differ_in_a_sign_are_no_duplicates(method: Any, pair: tuple[str, str]) -> None:
    kept, _ = through(Dedup(method=method), [{"response": text} for text in pair])
    assert [row["response"] for row in kept] == list(pair)


@pytest.mark.parametrize("method", ["exact", "minhash"])
def test_case_white_space_and_the_ends_of_clauses_make_no_difference(method: Any) -> None:
    texts = ["Say hi, please. It is 5.", "say  hi please it is 5", "SAY hi; please!\nIt is 5"]
    assert len(through(Dedup(method=method), [{"response": text} for text in texts])[0]) == 1
    assert len(through(Dedup(method=method), [{"response": t} for t in ("你好\uff0c世界。", "你好世界")])[0]) == 1


def test_the_same_answer_to_two_questions_is_no_duplicate() -> None:
    rows = [{"prompt": "2+2", "response": "4", "n": 1}, {"prompt": "8/2", "response": "4", "n": 2}]
    assert through(Dedup(), [*rows, {**rows[0], "n": 3}])[0] == rows
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "4"}]} for q in "abb"]
    assert through(Dedup(), chats)[0] == chats[:2]
    with pytest.raises(DataError, match="name them"):
        through(Dedup(), [{"score": 1}])


CHINESE = "一个水池有两个进水管和一个出水管\uff0c单开甲管三小时注满水池\uff0c单开乙管五小时注满\uff0c问同时打开需要多少小时才能注满水池"


JAPANESE = "ある店でりんごを三個とみかんを五個買うと合計で八百円になりました。りんご一個の値段はいくらですか"


@pytest.mark.parametrize("text", [CHINESE, JAPANESE], ids=["Chinese", "Japanese"])
def test_scripts_without_blanks_are_seen_word_by_word(text: str, tmp_path: Path) -> None:
    other = text.replace("三", "四")
    _, dropped = through(Dedup(), [{"response": text}, {"response": other}, {"response": text[::-1]}])
    assert [d.row["response"] for d in dropped] == [other]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": text}))
    step = Decontaminate(against=[Source(name_or_path=str(tmp_path / "test.jsonl"))])
    rows = [{"prompt": f"请回答\uff1a{text}\uff1f"}, {"prompt": text[:30]}, {"prompt": text[:6] + text[::-1]}]
    assert [row["prompt"] for row in through(step, rows)[0]] == [rows[2]["prompt"]]


def test_duplicates_of_given_rows_go_too(tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "Write a poem about the sea."}\n')
    step = Dedup(columns=["prompt"], against=[Source(name_or_path=str(tmp_path / "seeds.jsonl"))])
    kept, dropped = through(step, [{"prompt": "write a poem about the sea"}, {"prompt": "Name three birds."}])
    assert [row["prompt"] for row in kept] == ["Name three birds."]
    assert len(dropped) == 1


def test_decontamination_finds_planted_overlaps_and_nothing_else(tmp_path: Path) -> None:
    chance, tests, clean = random.Random(2), documents(50, seed=3), documents(200, seed=4)
    short_test = "one two three four five six seven eight"
    file = tmp_path / "test.jsonl"
    file.write_text(
        "".join(json.dumps({"question": " ".join(t), "id": 5}) + "\n" for t in tests)
        + json.dumps({"question": short_test})
        + "\n"
    )
    rows: list[Row] = []
    for i, document in enumerate(clean):
        words, planted = list(document), None
        if i % 4 == 0:
            size, start = chance.randint(13, 30), chance.randint(0, 60)
            planted = tests[i % 50][start : start + size]
            words[40:40] = ["before", *(w.upper() + "," for w in planted), "after"]
        elif i % 4 == 1:
            words[40:40] = ["before", *tests[i % 50][10:22], "after"]  # twelve words: one too few
        prompt = [{"role": "user", "content": " ".join(words)}]
        rows.append({"prompt": prompt, "response": "ok", "n": len(planted) if planted else 0})
    rows.append({"prompt": "x", "response": f"They say: {short_test.upper()}!", "n": 8})
    step = Decontaminate(against=[Source(name_or_path=str(file))], columns=["prompt", "response"])
    kept, dropped = through(step, rows)
    assert [row["n"] for row in kept] == [0] * 150
    assert len(dropped) == 51
    for drop in dropped:
        place, _, span = drop.detail.partition(": ")
        assert "test.jsonl" in place
        assert len(span.split()) == drop.row["n"]
