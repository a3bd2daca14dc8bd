"""Pipelines that are stopped, and rows and steps that cannot be."""

import datetime
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, client, error

from posttrain.errors import DataError, SynthError
from posttrain.synth import (
    Compare,
    Filter,
    Generate,
    Pipeline,
    Report,
    Step,
    TaskStopped,
    Verify,
)
from posttrain.synth.ledger import results
from posttrain.synth.pipelines.view import page


class Full:
    """A disk that is full for some files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = open

        class Stuck:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, text: str) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                self.file.close()

        def opened(path: Any, *given: Any, **more: Any) -> Any:
            return Stuck(real(path, *given, **more)) if name in str(path) else real(path, *given, **more)

        monkeypatch.setattr(results, "open", opened, raising=False)


def test_a_stopped_pipeline_shows_and_exports_nothing_of_the_run_before(server: Server, tmp_path: Path) -> None:
    steps = Pipeline([Generate(model="m"), Filter(column="finish_reason", equals="stop")])
    made = client(server, tmp_path, concurrency=1)
    steps.run([{"prompt": f"q{i}"} for i in range(3)], made, "p")
    assert len(list(Report.load(tmp_path / "p").rows())) == 3
    server.faults["POST /chat/completions"] = [error(401, message="expired")]
    with pytest.raises(TaskStopped):
        steps.run([{"prompt": f"other {i}"} for i in range(5)], made, "p")
    left = Report.load(tmp_path / "p")
    with pytest.raises(SynthError, match=r"step 1 \(generate\) was stopped: .*expired"):
        left.rows()
    assert [(stage.name, stage.rows_out) for stage in left.stages] == [("source", 5), ("generate", 0)]
    assert "Not finished" in page(left)
    assert "re: q" not in page(left)


def test_a_killed_pipeline_leaves_no_report_of_the_run_before(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    Pipeline([Step()]).run([{"prompt": "a"}], made, "p")

    class Killed(BaseException):
        pass

    class Kills(Step):
        def fold(self, row: Any, replies: Any) -> Any:
            (tmp_path / "seen").write_text((tmp_path / "p" / "report.json").read_text())
            return [row]

    Pipeline([Kills()]).run([{"prompt": "a"}], made, "p")
    assert "is running, or was stopped" in json.loads((tmp_path / "seen").read_text())["unfinished"]


def test_a_full_disk_stops_a_pipeline_with_a_message(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        Full(full, "1-generate")
        with pytest.raises(SynthError, match=r"1-generate\S* cannot be written: No space left on device"):
            Pipeline([Generate(model="m")]).run([{"prompt": "q1"}], client(server, tmp_path), "p")
    report = Pipeline([Generate(model="m")]).run([{"prompt": "q1"}], client(server, tmp_path), "p")
    assert len(list(report.rows())) == 1
    assert server.paid_lines == 1


def test_a_file_that_a_step_misses_is_not_called_a_full_disk(server: Server, tmp_path: Path) -> None:
    def missing(row: Any) -> bool:
        return bool(Path("/no/such/file").read_text())

    with pytest.raises(FileNotFoundError):
        Pipeline([Filter(function=missing)]).run([{"prompt": "q1"}], client(server, tmp_path), "p")


NOON = datetime.datetime(2026, 11, 26, 12)


@pytest.mark.parametrize(
    ("step", "row", "said"),
    [
        (Compare(model="j"), {"prompt": "p", "rejected": "x"}, r":1: there is no column 'chosen'"),
        (Filter(column="response", least=3), {"prompt": "p", "response": "x"}, r":1: column 'response' holds text"),
        (Verify(function="json_schema", wanted="form"), {"prompt": "p", "response": "{}", "form": '{"type": 3}'},
         r":1: not a valid JSON schema"),
        (Step(), {"prompt": "p", "at": NOON}, r"row 1: column 'at' holds a datetime"),
        (Step(), {"prompt": "p", "picture": {"bytes": [b"x"]}}, r"row 1: column 'picture' holds a bytes"),
        (Step(), {"prompt": "p", "odd": {(1, 2): 3}}, r"row 1: column 'odd' holds a tuple"),
        (Step(), "text", r"row 1: a row is an object of columns, not a str"),
    ],
)  # fmt: skip
def test_what_a_step_cannot_work_with_is_said_with_the_row(
    server: Server, tmp_path: Path, step: Step, row: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        Pipeline([step]).run([row], client(server, tmp_path), "p")


def test_a_check_that_raises_drops_its_row_and_is_counted(server: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": text} for text in ("1", "x", "3")]
    report = Pipeline([Verify(function=lambda answer, row: int(answer) > 2)]).run(rows, client(server, tmp_path), "p")
    assert [row["score"] for row in report.rows()] == [0, 1]
    assert report.stages[1].dropped == {"the check raised ValueError": 1}


def test_a_schema_that_is_none_is_said_before_anything_is_sent() -> None:
    ((name, message),) = Verify(function="json_schema", options={"schema": {"type": "strin"}}).check()
    assert (name, "not a valid JSON schema" in message) == ("options", True)


def test_nan_does_not_pass_a_filter(server: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "score": float("nan")}, {"prompt": "q", "score": 4}]
    report = Pipeline([Filter(least=3)]).run(rows, client(server, tmp_path), "p")
    assert [row["prompt"] for row in report.rows()] == ["q"]
    assert report.stages[1].dropped == {"score is not a number (NaN)": 1}
