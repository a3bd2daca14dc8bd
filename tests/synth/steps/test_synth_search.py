"""Monte Carlo tree search over the steps of a solution."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from synth_server import chat

from posttrain.errors import SynthError
from posttrain.synth import OpenAISynth, Pair, Pipeline, Search
from posttrain.synth.steps.turns.tree import Node, bound

Body = dict[str, Any]


def client(server: Any, folder: Path, **more: Any) -> OpenAISynth:
    return OpenAISynth(base_url=server.url, api_key="sk-test-key", mode="online", work_dir=folder, **more)


def test_values_go_up_the_tree_and_the_least_tried_of_equals_comes_next() -> None:
    root = Node()
    root.expanded = True
    root.add("a", 0.5, final=False)
    root.add("b", 0.25, final=False)
    a, b = root.children
    assert root.leaf(0.0) is a
    a.expanded = True
    a.add("a1", 0.0, final=False)
    a.add("a2", 1.0, final=True)
    assert (a.visits, a.mean) == (3, 0.5)
    assert (root.visits, root.total) == (4, 1.75)
    assert bound(b, 2.0) == pytest.approx(0.25 + 2.0 * math.sqrt(math.log(4) / 1))
    assert root.leaf(2.0) is b  # tried once, and `a` three times
    assert root.leaf(0.0) is a.children[0]  # a2 is final
    b.expanded = a.children[0].expanded = True  # nothing came of either
    assert root.leaf(2.0) is None
    assert [node.text for node in root.finals()] == ["a2"]
    assert [node.text for node in a.children[1].path] == ["a", "a2"]


def solver(body: Body) -> tuple[int, Body]:
    """Counts up to three: the steps `up` are right, `down` are wrong; the judge knows."""
    text = body["messages"][-1]["content"]
    reply = chat(body)
    steps = re.findall(r"^\d+\. (\w+)", text.partition("Steps so far")[2], flags=re.MULTILINE)
    if body["model"] == "judge":
        said = json.dumps({"rationale": "r", "score": 5 if steps[-1] == "up" else 1})
    else:
        solver.asked += 1  # type: ignore[attr-defined]
        word = "up" if solver.asked % 2 else "down"  # type: ignore[attr-defined]
        said = f"Step {len(steps) + 1}: {word}" + (" The answer is: 3." if len(steps) == 2 else "")
    reply["choices"][0]["message"]["content"] = said
    return 200, reply


def search(**more: Any) -> Search:
    given = {"model": "m", "judge": "judge", "template": "{question}", "width": 2, "expansions": 6, "depth": 3}
    return Search(**{**given, **more})


def test_a_search_finds_the_path_of_right_steps_and_pays_once(server: Any, tmp_path: Path) -> None:
    solver.asked = 0  # type: ignore[attr-defined]
    server.answer = solver
    for _ in range(2):
        report = Pipeline([search()]).run(
            [{"question": "Count.", "id": 1}], client(server, tmp_path, concurrency=1), "t"
        )
        sent = server.paid_lines
    (row,) = report.rows()
    assert row["response"] == "up\n\nup\n\nup The answer is: 3."
    assert (row["score"], row["id"], len(row["steps"])) == (1.0, 1, 3)
    assert all(0 < step["value"] <= 1 for step in row["steps"])
    assert row["steps"][0]["visits"] > row["steps"][1]["visits"] > row["steps"][2]["visits"] == 1
    assert row["prompt"] == [{"role": "user", "content": "Count."}]
    assert server.paid_lines == sent <= 6 * 2 * 2  # expansions, steps of each, a judgement of each step


def test_all_solutions_make_pairs_and_a_verifier_stands_above_the_judge(server: Any, tmp_path: Path) -> None:
    solver.asked = 0  # type: ignore[attr-defined]

    def answer(body: Body) -> tuple[int, Body]:
        status, reply = solver(body)
        message = reply["choices"][0]["message"]
        if "down The answer" in message["content"]:
            message["content"] = message["content"].replace("3.", "4.")
        assert (
            body["model"] != "judge" or "The answer" not in body["messages"][-1]["content"].partition("Steps so far")[2]
        )
        return status, reply

    server.answer = answer
    rows = [{"question": "Count.", "answer": "3"}]
    made = search(keep="all", check_by="number")
    report = Pipeline([made, Pair()]).run(rows, client(server, tmp_path, concurrency=1), "t")
    (pair,) = report.rows()
    assert pair["chosen"][-1]["content"].endswith("up The answer is: 3.") if isinstance(pair["chosen"], list) else (
        pair["chosen"].endswith("up The answer is: 3.")
    )  # fmt: skip
    assert (pair["score_chosen"], pair["score_rejected"]) == (1.0, 0.0)


def test_a_search_that_reaches_nothing_and_one_that_fails_say_so(server: Any, tmp_path: Path) -> None:
    solver.asked = 0  # type: ignore[attr-defined]
    server.answer = solver
    report = Pipeline([search(depth=2)]).run([{"question": "Count."}], client(server, tmp_path), "t")
    assert report.stages[1].dropped == {"no solution was reached": 1}
    server.answer = lambda body: (400, {"error": {"message": "no", "code": "bad"}})
    report = Pipeline([search()]).run([{"question": "Else."}], client(server, tmp_path), "u")
    assert report.stages[1].dropped == {"request failed: bad": 1}
    with pytest.raises(SynthError, match="there is no verifier 'numbers'; did you mean 'number'"):
        Pipeline([search(check_by="numbers")]).run([{"question": "q"}], client(server, tmp_path), "v")
