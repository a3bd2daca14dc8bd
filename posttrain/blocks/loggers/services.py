"""Loggers of services and of spreadsheets. A run that goes on after a stop goes on in the same run there."""

import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.interfaces import Logger
from posttrain.registry import block

if TYPE_CHECKING:
    from posttrain.run import Run


@attrs.frozen
class Service:
    """A logger that is closed by a function of its own."""

    log: Callable[[dict[str, float], int | None], None]
    close: Callable[[str], None]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send the metrics of a step."""
        self.log(metrics, step)

    def finalize(self, status: str) -> None:
        """Close the run: `finished`, `interrupted` or `failed`."""
        self.close(status)


def missing(package: str) -> Iterator[tuple[str, str]]:
    """Yield what to do if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        yield "type", f"{package} is not installed: pip install 'posttrain[{package}]'"


@block("logger", "wandb")
class WandB:
    """Weights & Biases (extra `wandb`), by the key that `wandb login` or $WANDB_API_KEY gives."""

    project: str = "posttrain"
    """Made if there is none."""
    name: str | None = None
    """Of the run there; the name of the run's folder by default."""
    entity: str | None = None
    """The user or team that the project belongs to."""
    group: str | None = None
    """Shown together with other runs of this name."""
    tags: list[str] = attrs.field(factory=list)
    """To find it by."""
    offline: bool = False
    """Write to the run's folder alone; `wandb sync` sends it later."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that it is not installed."""
        yield from missing("wandb")

    def build(self, run: "Run") -> Logger:
        """Return the logger, with the recipe as the run's configuration."""
        from lightning.pytorch.loggers import WandbLogger

        id_ = run.memory.setdefault("wandb", secrets.token_hex(4))
        logger = WandbLogger(
            project=self.project, name=self.name or run.output_dir.absolute().name, id=id_, entity=self.entity,
            save_dir=run.output_dir, offline=self.offline, group=self.group, tags=self.tags or None,
        )  # fmt: skip
        logger.log_hyperparams(run.recipe)
        return Service(logger.log_metrics, lambda status: logger.experiment.finish(exit_code=int(status == "failed")))


@block("logger", "mlflow")
class MLflow:
    """MLflow (extra `mlflow`)."""

    experiment: str = "posttrain"
    """Made if there is none."""
    name: str | None = None
    """Of the run there; the name of the run's folder by default."""
    tracking_uri: str | None = None
    """Where the server or the folder is; $MLFLOW_TRACKING_URI, or else `mlflow.db` in the run's folder."""
    tags: dict[str, str] = attrs.field(factory=dict)
    """To find it by."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that it is not installed."""
        yield from missing("mlflow")

    def build(self, run: "Run") -> Logger:
        """Return the logger, with the recipe as the run's parameters."""
        from lightning.pytorch.loggers import MLFlowLogger

        here = f"sqlite:///{(run.output_dir / 'mlflow.db').absolute()}"
        logger = MLFlowLogger(
            experiment_name=self.experiment, run_name=self.name or run.output_dir.absolute().name, tags=self.tags,
            tracking_uri=self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or here,
            run_id=run.memory.get("mlflow"),
        )  # fmt: skip
        if "mlflow" not in run.memory:  # parameters cannot be changed there
            run.memory["mlflow"] = logger.run_id
            logger.log_hyperparams(run.recipe)
        states = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        return Service(logger.log_metrics, lambda status: logger.finalize(states.get(status, status.upper())))


@block("logger", "trackio")
class Trackio:
    """Trackio (extra `trackio`): on this machine, for `trackio show`, or in a Space of the Hugging Face hub."""

    project: str = "posttrain"
    """Made if there is none."""
    name: str | None = None
    """Of the run there; the name of the run's folder and four letters by default, for runs are told apart by it."""
    group: str | None = None
    """Shown together with other runs of this name."""
    space_id: str | None = None
    """A Space to write to, such as `me/curves`; made if there is none."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that it is not installed."""
        yield from missing("trackio")

    def build(self, run: "Run") -> Logger:
        """Return the logger, with the recipe as the run's configuration."""
        import trackio

        name = run.memory.setdefault("trackio", self.name or f"{run.output_dir.absolute().name}-{secrets.token_hex(2)}")
        there = trackio.init(
            project=self.project, name=name, group=self.group, space_id=self.space_id, config=run.recipe,
            resume="allow", embed=False,
        )  # fmt: skip
        return Service(there.log, lambda status: trackio.finish())


@block("logger", "csv")
class CSV:
    """`metrics.csv` in the run's folder, a line per step, written when the run ends: for spreadsheets."""

    def build(self, run: "Run") -> Logger:
        """Return the logger; of steps before this process, it has what `metrics.csv` held."""
        import csv

        path = run.output_dir / "metrics.csv"
        rows: dict[int, dict[str, Any]] = {}
        if run.step and path.exists():
            with path.open(newline="") as file:
                rows = {int(row["step"]): dict(row) for row in csv.DictReader(file) if int(row["step"]) <= run.step}

        def log(metrics: dict[str, float], step: int | None) -> None:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            rows.setdefault(int(step or 0), {}).update(finite)

        def close(status: str) -> None:
            names = ["step", *dict.fromkeys(name for row in rows.values() for name in row if name != "step")]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows({**row, "step": step} for step, row in sorted(rows.items()))

        return Service(log, close)
