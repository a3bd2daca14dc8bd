"""Keys: as people have them, in no message, and not in another process."""

import pickle
import traceback
from pathlib import Path

import pytest
from synth_server import KEY, Server, add, client, error, texts

from posttrain.errors import SynthError


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("mode", ["online", "batch"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n"])
def test_a_key_that_ends_in_a_line_break_works(server: Server, tmp_path: Path, mode: str, end: str) -> None:
    made = add(client(server, tmp_path, mode=mode, api_key=KEY + end), 2)
    assert len(texts(made.execute_batch_task("t"))) == 2
    assert {h.get("Authorization") for h in server.headers_seen} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("mode", ["online", "batch"])
@pytest.mark.parametrize(
    "wrong", [KEY + "\nexport X=1", KEY + " ", "\N{ZERO WIDTH SPACE}" + KEY, "schlüssel-1234", " \n"]
)
def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(
    server: Server, tmp_path: Path, mode: str, wrong: str
) -> None:
    wrong = wrong if wrong != KEY + " " else f"{KEY} {KEY}"
    with pytest.raises(SynthError, match="the API key") as caught:
        add(client(server, tmp_path, mode=mode, api_key=wrong), 2).execute_batch_task("t")
    assert KEY not in shown(caught.value)
    assert "schlüssel" not in shown(caught.value)
    assert not server.calls


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_header_that_cannot_be_sent_is_an_error_that_shows_no_header(
    server: Server, tmp_path: Path, mode: str
) -> None:
    wrong = "-".join(("org", "of", "mine")) + "\nX: y"
    with pytest.raises(SynthError, match="header") as caught:
        add(client(server, tmp_path, mode=mode, organization=wrong), 2).execute_batch_task("t")
    assert "org-of-mine" not in shown(caught.value)
    assert KEY not in shown(caught.value)


@pytest.mark.parametrize("call", ["POST /files", "GET /files", "POST /batches", "GET /batches/ID"])
def test_a_server_that_repeats_the_key_in_an_error_of_batches_does_not_get_it_printed(
    server: Server, tmp_path: Path, call: str
) -> None:
    made = add(client(server, tmp_path, mode="batch"), 2)
    server.faults["POST /files"] = [error(500)]
    server.faults[call] = [*server.faults.get(call, [])[: call == "GET /files"], error(400, message=f"what is {KEY}?")]
    with pytest.raises(SynthError) as caught:
        made.execute_batch_task("t")
    assert "[secret]" in str(caught.value)
    assert KEY not in shown(caught.value)


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_servers_get_to_know_who_asks(server: Server, tmp_path: Path, mode: str) -> None:
    add(client(server, tmp_path, mode=mode), 1).execute_batch_task("t")
    agents = {{name.lower(): value for name, value in h.items()}["user-agent"] for h in server.headers_seen}
    assert len(agents) == 1
    assert agents.pop().startswith("posttrain")


def test_a_client_can_be_sent_to_another_process_and_its_key_stays(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path), 1)
    made.execute_batch_task("t")
    packed = pickle.dumps(made)
    assert KEY.encode() not in packed
    made.ledger.close()
    again = pickle.loads(packed)
    assert len(texts(add(again, 1).execute_batch_task("t"))) == 1
    with pytest.raises(SynthError, match="stays in its process"):
        add(again, 2).execute_batch_task("t")
