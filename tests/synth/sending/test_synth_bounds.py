"""What a task may cost, and how much may be sent a minute."""

import threading
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, add, chat, client, complete

from posttrain.synth import (
    Price,
    TaskStopped,
)
from posttrain.synth.ledger.keys import canonical


def costly(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A reply that uses all that it may, to a prompt of a token a byte."""
    used = {"prompt_tokens": len(canonical(body)), "completion_tokens": body["max_tokens"]}
    return 200, {**chat(body), "usage": used}


def test_the_cost_of_a_task_never_passes_its_bound(server: Server, tmp_path: Path) -> None:
    server.answer, server.delay = costly, 0.005
    made = client(server, tmp_path, concurrency=16, prices={"m": Price(input=10_000, output=1000)})
    for i in range(60):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i} " + "字" * 100}], model="m", max_tokens=20)
    bound = made.plan("t").cost
    with pytest.raises(TaskStopped, match="could pass max_cost"):
        made.execute_batch_task("t", max_cost=bound)
    status = made.status("t")
    assert bound / 2 < status.cost <= bound
    assert status.done > 2


def test_requests_wait_for_others_before_a_bound_stops_them(server: Server, tmp_path: Path) -> None:
    server.delay = 0.01
    made = add(client(server, tmp_path, prices={"m": Price(input=1, output=1000)}), 40, max_tokens=100)
    made.execute_batch_task(
        "t", max_cost=made.plan("t").cost
    )  # 40 at their ceiling would pass it; they use a twentieth
    assert made.status("t").done == 40


def test_a_cost_that_nothing_bounds_is_said_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, prices={"m": Price(input=1, output=1)}), 3)
    with pytest.raises(TaskStopped, match="3 requests set no max_tokens.*nothing was sent"):
        made.execute_batch_task("t", max_cost=5)
    assert server.paid_lines == 0


def test_what_is_in_batches_counts_against_the_bound(server: Server, tmp_path: Path) -> None:
    server.finish = lambda *batch: None
    made = add(client(server, tmp_path, mode="batch", prices={"m": Price(input=1, output=1000)}), 7, max_tokens=100)
    bound = made.plan("t").cost * 1.5
    made.execute_batch_task("t", wait=False, max_cost=bound)
    for i in range(7):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"more{i}"}], model="m", max_tokens=100)
    with pytest.raises(TaskStopped, match="under way.*passes max_cost"):
        made.execute_batch_task("t", wait=False, max_cost=bound)
    assert server.calls["POST /batches"] == 1
    server.finish = complete
    made.execute_batch_task("t", max_cost=bound * 2)
    assert server.paid_lines == 14


def test_answers_that_did_not_come_in_time_may_have_been_charged(server: Server, tmp_path: Path) -> None:
    gone = threading.Event()
    server.faults["POST /chat/completions"] = [lambda handler: gone.wait(20)] * 3
    price = {"m": Price(input=0, output=1000)}
    made = add(client(server, tmp_path, concurrency=1, timeout=0.1, prices=price), 1, max_tokens=100)
    with pytest.raises(TaskStopped, match=r"\$0.2000 may have been charged for answers that did not come"):
        made.execute_batch_task("t", max_cost=0.25)
    gone.set()


def test_an_image_counts_as_an_image_and_not_as_its_bytes(server: Server, tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    made = client(server, tmp_path)
    made.add_chat_to_batch_task("t", [{"role": "user", "content": [{"type": "text", "text": "x"}, picture]}], model="m")
    assert 1500 <= made.plan("t").input_tokens < 1600


def test_tokens_per_minute_that_were_not_used_are_given_back(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, concurrency=2, tpm=3000), 40)  # 1,024 each are reserved, and 15 are used
    done = threading.Event()
    worker = threading.Thread(target=lambda: (made.execute_batch_task("t"), done.set()), daemon=True)
    worker.start()
    assert done.wait(20)


def test_nobody_waits_for_ever_for_what_is_in_batches(server: Server, tmp_path: Path) -> None:
    price = {"m": Price(input=1000, output=0)}
    server.finish = lambda *batch: None
    add(client(server, tmp_path, mode="batch", prices=price), 3, max_tokens=9).execute_batch_task("t", wait=False)
    made = add(client(server, tmp_path, prices=price), 4, max_tokens=9)
    plan = made.plan("t")
    assert (plan.waiting, plan.new) == (3, 1)
    with pytest.raises(TaskStopped, match="could pass max_cost"):
        made.execute_batch_task("t", max_cost=plan.cost + plan.under_way)
    made.run("t", max_cost=5)
    assert made.status("t").done == 1
