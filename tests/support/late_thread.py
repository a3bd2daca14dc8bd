"""A rank whose gloo threads run late while it ends: run by tests/ranks/test_ranks.py.

One processor, on which other processes want to run, and the lowest priority for gloo's threads: what they do after a
collective is done, they do when the main thread has left long since.
"""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from posttrain.runtime import launch

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
dist.init_process_group("gloo")
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # it keeps the group
for task in (int(path.name) for path in Path("/proc/self/task").iterdir()):
    if task != threading.get_native_id():
        os.setpriority(os.PRIO_PROCESS, task, 19)
for _ in range(20):
    dist.all_reduce(torch.tensor(1.0))
if sys.argv[1] == "settled":
    launch._leave()
else:
    dist.destroy_process_group()
