"""One of two ranks that wait for scripts of tests, so that tests share what it takes to start them (see ranks.py).

`torchrun ... rank.py FOLDER PARENT` runs `FOLDER/0.json`, `1.json`, ... as they come, and answers each with a file that is
empty if all went well. What a script does to the process stays: it cleans up behind itself.
"""

import itertools
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

folder, parent, agent, rank = Path(sys.argv[1]), int(sys.argv[2]), os.getppid(), os.environ["RANK"]
LAUNCHED = dict(os.environ)
"""What torchrun has set, which the environment of a test has not."""


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)
        if os.getppid() != agent or gone(parent):  # nobody waits any more
            os._exit(0)


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


for number in itertools.count():
    wait_for(folder / f"{number}.json")
    given = json.loads((folder / f"{number}.json").read_text())
    os.environ.clear()
    os.environ.update(LAUNCHED | given["environment"])
    sys.argv = given["argv"]
    error = ""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        error = traceback.format_exc()
    part = folder / f"{number}-{rank}.part"
    part.write_text(error)
    part.rename(folder / f"{number}-{rank}")
    if error:
        os._exit(1)  # torchrun ends the other, which may wait for this one
