"""Loggers of services get what others get, in one run there, however often the run is cut. The services are doubles here."""

import csv
import io
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch.loggers as theirs
import pytest
import rich.console
from toy import metrics, trainer

from posttrain import before
from posttrain.blocks.loggers.console import ConsoleLogger
from posttrain.blocks.loggers.logger import JSONL, Console
from posttrain.blocks.loggers.services import CSV, MLflow, Trackio, WandB
from posttrain.blocks.loggers.services import missing as services_missing
from posttrain.errors import RecipeError

CALLS: list[Any] = []


class Recorder:
    """What our blocks use of Lightning's loggers."""

    def __init__(self, **given: Any) -> None:
        CALLS.append(given)
        self.given, self.lines, self.parameters = given, dict[int, dict[str, float]](), list[Any]()
        self.run_id = given.get("run_id") or "made-there"
        self.experiment = SimpleNamespace(finish=lambda exit_code: CALLS.append(exit_code))

    def log_metrics(self, found: dict[str, float], step: int | None = None) -> None:
        CALLS.append((step, found))

    def log_hyperparams(self, recipe: Any) -> None:
        CALLS.append(recipe["type"])

    def finalize(self, status: str) -> None:
        CALLS.append(status)


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(theirs, "WandbLogger", Recorder)
    monkeypatch.setattr(theirs, "MLFlowLogger", Recorder)
    monkeypatch.setattr("posttrain.blocks.loggers.services.missing", lambda package: [])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run(folder: Path, logger: Any, **keys: Any) -> Any:
    made = trainer(folder, max_steps=6, **keys)
    made.logger = [JSONL(), logger]
    return made.train()


def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    block = WandB(project="p", tags=["t"], offline=True)
    run(tmp_path / "first", block, stop_after=4)
    run(tmp_path / "first", block)
    begun = [call for call in CALLS if isinstance(call, dict)]
    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["name"], len(begun[0]["id"])) == ("p", "first", 8)
    assert [call[0] for call in CALLS if isinstance(call, tuple)] == [1, 2, 3, 4, 5, 6]
    losses = [call[1]["loss"] for call in CALLS if isinstance(call, tuple)]
    assert losses == [line["loss"] for line in metrics(tmp_path / "first")]
    assert [call for call in CALLS if call == 0] == [0, 0]  # exit codes
    run(tmp_path / "second", block)
    assert [call for call in CALLS if isinstance(call, dict)][-1]["id"] != begun[0]["id"]


def test_mlflow_goes_on_in_the_same_run_and_says_how_it_ended(tmp_path: Path) -> None:
    run(tmp_path, MLflow(), stop_after=4)
    run(tmp_path, MLflow())
    begun = [call for call in CALLS if isinstance(call, dict)]
    assert [call["run_id"] for call in begun] == [None, "made-there"]
    assert begun[0]["tracking_uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert [call for call in CALLS if isinstance(call, str)][1:] == ["KILLED", "FINISHED"]


def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: Any) -> Any:
        CALLS.append(given)
        return SimpleNamespace(log=lambda found, step: CALLS.append((step, found)))

    double = SimpleNamespace(init=init, finish=lambda: CALLS.append("closed"))
    monkeypatch.setitem(sys.modules, "trackio", double)
    run(tmp_path / "first", Trackio(), stop_after=4)
    run(tmp_path / "first", Trackio())
    run(tmp_path / "second" / "first", Trackio())
    names = [call["name"] for call in CALLS if isinstance(call, dict)]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("first-")
    assert [call[0] for call in CALLS if isinstance(call, tuple)] == [1, 2, 3, 4, 5, 6] * 2
    assert CALLS.count("closed") == 3


def test_a_spreadsheet_holds_every_step(tmp_path: Path) -> None:
    run(tmp_path, CSV(), stop_after=4)
    run(tmp_path, CSV())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in metrics(tmp_path)]


@pytest.mark.parametrize("block", [WandB(), MLflow(), Trackio()])
def test_a_service_that_is_not_installed_is_noticed_before_anything_is_loaded(
    block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ((where, message),) = services_missing(type(block).__name__.lower())
    assert (where, message.partition(":")[2]) == ("type", f" pip install 'posttrain[{type(block).__name__.lower()}]'")


def test_what_was_opened_is_closed_when_a_later_logger_fails(tmp_path: Path) -> None:
    class Broken:
        def build(self, run: Any) -> Any:
            raise RecipeError("no")

    made = trainer(tmp_path, max_steps=2)
    made.logger = [MLflow(), Broken()]
    with pytest.raises(RecipeError):
        made.train()
    assert CALLS[-1] == "FAILED"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "run the same command again "),
        ({"checkpoint": []}, "nothing was saved (checkpoint: [resume])"),
        ({"resume": "never"}, "run the same command again with resume=auto"),
    ],
)  # fmt: skip
def test_an_interrupted_run_says_whether_it_can_go_on(
    keys: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, max_steps=6, stop_after=2, **keys)
    made.logger = [Console()]
    made.train()
    assert said in capsys.readouterr().out


def test_names_with_brackets_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "a[red]b"
    made = trainer(folder, max_steps=1)
    made.logger = [Console()]
    made.train()
    shown = capsys.readouterr().out
    assert "a[red]b" in shown
    assert "[bold]" not in shown
    from posttrain.blocks.loggers.ledger import ledger

    counts = {"rows_in": 2, "dropped": {"[bold]": 1}, "documents": 1}
    table = ledger({"sources": {"notes/[ab]*.jsonl": counts}})
    rich.console.Console(width=200).print(table)
    shown = capsys.readouterr().out
    assert "notes/[ab]*.jsonl" in shown
    assert "1 dropped: [bold]" in shown


def test_what_is_logged_stands_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, log = Terminal(), logging.getLogger("posttrain.somewhere")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)

    class Shown:
        def build(self, run: Any) -> Any:
            return ConsoleLogger(run, rich.console.Console(file=screen, force_terminal=True, width=120))

    @before("trainer.step")
    def warns(trainer: Any, batches: Any) -> None:
        log.warning("mind the gap")

    made = trainer(tmp_path, max_steps=1)
    made.logger = [Shown()]
    try:
        made.train([warns])
    finally:
        logging.getLogger().removeHandler(handler)
    assert re.search(r"\x1b\[2Kmind the gap *\n", screen.getvalue())
    assert "mind the gap" not in terminal.getvalue()
    assert handler.stream is terminal
