"""The processes that a check starts: two ranks that take a step together, and a run that is killed.

`python -m posttrain.tools.twin.processes ranks | step | killed RECIPE FOLDER [KEY=VALUE ...]`
"""

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from posttrain.hooks import after
from posttrain.runtime.launch import relaunch
from posttrain.tools.twin.twin import Twin, quietly
from posttrain.trainer import Trainer


def main(arguments: list[str]) -> None:
    """Do one part of a check in a process of its own.

    `ranks` starts two, which take a `step`; `killed` trains and is killed.
    """
    part, path, folder, *overrides = arguments
    if part == "ranks":
        sys.exit(relaunch(2, "-m", ["posttrain.tools.twin.processes", "step", *arguments[1:]]))
    twin = Twin(Path(path), overrides, Path(folder))
    if part == "step":
        step = twin.one_step("two-ranks", rows=2, devices=2)
        if int(os.environ["RANK"]) == 0:
            save_file({"gradient": step.gradient, "loss": torch.tensor(step.loss)}, twin.folder / "two.safetensors")
        return

    @after("trainer.save")
    def die(trainer: Trainer, result: None) -> None:
        if trainer.run.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    twin.resumable("cut").train(callbacks=[die])


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    with quietly():
        main(sys.argv[1:])
