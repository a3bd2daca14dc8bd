"""How runs of two ranks end on a loaded machine: of N of them, how many with which exit code.

    nice python benchmarks/stress_ranks.py [--runs 200] [--hogs 4] [--cold] [--keep FOLDER]

Each run trains a tiny Llama for three steps and saves; every second one is stopped by SIGTERM. The ranks are forks of a
process that has imported everything, under the store of an agent as torchrun has it, and leave through the interpreter's
own end. `--cold` starts each run as people do, with `posttrain train`. What a failed run wrote is kept in FOLDER.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

IMPORTED = (
    "posttrain.trainer", "posttrain.blocks.checkpoints.state", "posttrain.blocks.models.causal", "torch._dynamo",
    "lightning.fabric", "lightning.fabric.loggers.tensorboard", "lightning.fabric.strategies.ddp", "datasets",
    "torch.utils.tensorboard", "torch.distributed.checkpoint", "posttrain.blocks.data.data", "rich.progress", "jinja2",
    "posttrain.blocks.loggers.console", "posttrain.tools.commands", "filelock", "posttrain.blocks.models.documents.attention",
    "posttrain.recipes.load", "posttrain.blocks.models.activations", "posttrain.blocks.losses.cross_entropy",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip
"""What ranks import, once for all of them."""
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]


def recipe(folder: Path) -> Path:
    """Write a tiny model, chats and their recipe."""
    from tokens import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.blocks.tokenizers.templates import TEMPLATES

    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} and {n}?", "response": str(2 * n)} for n in range(64)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = {
        "type": "sft", "model": {"name_or_path": str(folder / "model")}, "accelerator": "cpu", "resume": "never",
        "data": {"sources": [str(folder / "sums.jsonl")], "max_length": 128}, "log_every": 1, "devices": 2,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(said))
    return folder / "recipe.yaml"


def starve() -> None:
    """Let the threads of libraries run late, as on a machine that is loaded far more."""

    def look() -> None:
        python = {thread.native_id for thread in threading.enumerate()}
        while True:
            for task in (int(path.name) for path in Path("/proc/self/task").iterdir()):
                if task not in python:
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, task, 15)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()


def rank(number: int, port: int, arguments: list[str], log: Path, starved: bool) -> None:
    """Become a rank of a run: does not return."""
    from posttrain.cli import main

    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "ROLE_RANK": str(number), "ROLE_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "stress", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
    }  # fmt: skip
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if starved:
        starve()
    sys.exit(main(arguments))


def started(command: list[str], log: Path) -> "list[int]":
    """Start a command as people do."""
    with log.open("w") as out:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return [subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment).pid]


def serve(port_file: Path) -> None:
    """Hold the store through which the ranks find each other, as torchrun's agent does."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port_file.with_suffix(".part").write_text(str(store.port))
    port_file.with_suffix(".part").rename(port_file)
    while True:
        time.sleep(60)


def fork(function: "object", *arguments: "object") -> int:
    """Call a function in a new process, and return its number."""
    if pid := os.fork():
        return pid
    function(*arguments)  # type: ignore[operator]
    sys.exit(0)


def hog() -> None:
    """Take a processor."""
    while True:
        sum(range(10**6))


def ended(pids: list[int], seconds: float) -> list[int | None]:
    """Return the exit codes of processes; None for one that had to be killed."""
    codes: dict[int, int | None] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGABRT)  # with PYTHONFAULTHANDLER=1 it says where it hangs
        os.waitpid(pid, 0)
        codes[pid] = None
    return [codes[pid] for pid in pids]


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--hogs", type=int, default=4, help="processes that only take processors")
    parser.add_argument("--starve", action="store_true", help="let threads of libraries run late")
    parser.add_argument("--cold", action="store_true", help="start each run by its command")
    parser.add_argument("--keep", type=Path, default=Path("stress"), help="what failed runs wrote")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    folder, helpers, owner = Path(tempfile.mkdtemp(prefix="stress-")), [], os.getpid()
    os.environ["POSTTRAIN_CACHE"] = str(folder / "cache")
    try:
        stress(options, folder, helpers)
    finally:
        if os.getpid() == owner:  # the ranks come by here, too
            for pid in helpers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            shutil.rmtree(folder)


def stress(options: argparse.Namespace, folder: Path, helpers: list[int]) -> None:
    """Do the runs."""
    file = recipe(folder)
    helpers += [fork(hog) for _ in range(options.hogs)]
    if not options.cold:
        import faulthandler

        for module in IMPORTED:
            importlib.import_module(module)

        faulthandler.enable()
    found: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    for number in range(options.runs):
        stopped = number % 2 == 1
        log, out = folder / f"run-{number}.log", folder / f"run-{number}"
        arguments = ["train", str(file), f"output_dir={out}", f"max_steps={100_000 if stopped else 3}"]
        if options.cold:
            pids = started([sys.executable, "-m", "posttrain.cli", *arguments], log)
        else:
            port = folder / "port"
            agent = fork(serve, port)
            while not port.exists():
                time.sleep(0.01)
            pids = [fork(rank, i, int(port.read_text()), arguments, log, options.starve) for i in range(2)]
            port.unlink()
        if stopped:
            end = time.monotonic() + 200
            while time.monotonic() < end and not (out / "metrics.jsonl").exists():
                time.sleep(0.02)
            time.sleep(random.random() / 4)
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
        codes = ended(pids, 300)
        if not options.cold:
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
        label = f"{'stopped' if stopped else 'finished'}: {' '.join(map(str, codes))}"
        found[label] += 1
        if any(code != (128 + signal.SIGTERM if stopped else 0) for code in codes):
            kept = options.keep / f"{number}-{'-'.join(map(str, codes))}.log"
            kept.write_text(log.read_text(errors="replace"))
            print(f"run {number}: {label}; kept in {kept}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        if number % 50 == 49:
            print(f"{number + 1} runs in {time.monotonic() - begin:.0f} s: {dict(found)}", flush=True)
    for label, count in sorted(found.items()):
        print(f"| {label} | {count} |")


if __name__ == "__main__":
    main()
