"""What benchmarks/gpu.sh runs: measurements on one GPU, each with a limit of time, and a table of what they found.

Measurements of a kind share a process, which is started again when one of them fails. Results are kept line by line in
`$OUT/results.jsonl`: the same command goes on with what is missing. `$OUT/gpu.md` is the page for benchmarks/gpu.md.
"""

import argparse
import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_profile
import gpu_sft
from gpu_sft import ROOT, Setting

OUT = Path(os.environ.get("OUT", ROOT / "out" / "gpu"))
LIMIT = 110
"""Seconds of a measurement, unless it says otherwise."""
Found = dict[str, Any]


def setting(tiny: bool, **keys: Any) -> Setting:
    """The Llama of 1.2 B parameters, two packed rows of 4096 tokens."""
    sizes = {"steps": 2, "length": 256} if tiny else {"steps": 20, "length": 4096}
    return Setting(**{"tiny": tiny, "rows": 2, "compile": False, **sizes, **keys})


def shown(result: Found) -> Found:
    """The figures of a training run."""
    mfu = {"MFU": round(result["mfu"], 3)} if result.get("mfu") else {}
    return {"tokens/s": round(result["rate"]), **mfu, "peak GiB": round(result["gib"], 2)}


# -- machine ----------------------------------------------------------------------------


def machine(tiny: bool) -> Found:
    """What there is, and how fast a product and a copy are on it at best."""
    import torch
    import transformers

    device, size = ("cpu", 256) if tiny else ("cuda", 8192)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    spent = timed(lambda: x @ x, device)
    moved = timed(lambda: x.clone(), device)
    return {
        "device": "CPU" if tiny else torch.cuda.get_device_name(), "torch": torch.__version__,
        "transformers": transformers.__version__, "Python": sys.version.split()[0],
        "TFLOP/s": round(2 * size**3 / spent / 1e12, 1), "TB/s": round(4 * size**2 / moved / 1e12, 2),
    }  # fmt: skip


def timed(work: Callable[[], Any], device: str, times: int = 10) -> float:
    """Return the seconds of one call, after three to warm up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


# -- supervised fine-tuning -----------------------------------------------------------------


def sft(tiny: bool, **keys: Any) -> Found:
    """posttrain, as users call it."""
    compiled = keys.pop("compile", False)
    return shown(gpu_sft.posttrain_(setting(tiny, compile=compiled and not tiny), **keys))


def sft_mixed(tiny: bool) -> Found:
    """What a recipe that says nothing gets: weights in float32, products in bfloat16."""
    return sft(tiny, dtype="float32", trainer={} if tiny else {"precision": "bf16-mixed"})


def sft_ahead(tiny: bool) -> Found:
    """Batches collated and pinned in a thread, beside the loop."""
    import attrs

    wanted = setting(tiny)
    source = wanted.loader()
    pin = (
        source.collate if tiny else lambda rows, multiple: source.collate(rows, multiple).map(lambda x: x.pin_memory())
    )
    return shown(gpu_sft.posttrain_(wanted, source=attrs.evolve(source, ahead=1, collate=pin)))


def sft_fsdp(tiny: bool, **keys: Any) -> Found:
    """Weights and moments in float32 in shards of one rank; perhaps kept by the host."""
    import posttrain

    more = {"strategy": posttrain.FSDP(**keys)} | ({} if tiny else {"precision": "bf16-mixed"})
    return shown(gpu_sft.posttrain_(setting(tiny, steps=2 if tiny else 6), dtype="float32", trainer=more))


def bare(tiny: bool, compile: bool = False) -> Found:
    """A loop that anybody would write."""
    return shown(gpu_sft.bare(setting(tiny, compile=compile and not tiny)))


def trl(tiny: bool) -> Found:
    """TRL's trainer."""
    return shown(gpu_sft.trl(setting(tiny)))


# -- methods ----------------------------------------------------------------------------


def dpo(tiny: bool, packing: bool) -> Found:
    """Pairs with a long prompt: computed once, or with each side in a padded row."""
    import posttrain

    count, prompt, reply = (2, 40, 20) if tiny else (8, 1024, 512)
    wanted = setting(tiny, rows=count, length=2 * (prompt + reply), steps=2 if tiny else 10)
    return shown(gpu_sft.posttrain_(wanted, method=posttrain.DPOTrainer, source=pairs(wanted, prompt, reply, packing)))


def pairs(wanted: Setting, prompt: int, reply: int, packing: bool) -> Any:
    """Return a loader of so many random pairs a step."""
    import numpy as np

    from posttrain.blocks.data.loader import MapLoader
    from posttrain.blocks.layout import Example, collate_pairs

    random, known = np.random.default_rng(0), wanted.config().vocab_size

    def side(common: Any) -> Any:
        ids = np.concatenate([common, random.integers(1, known, int(random.integers(reply // 4, reply + 1)))])
        return ids, np.arange(len(ids)) >= prompt

    class Pairs:
        def __init__(self) -> None:
            starts = [random.integers(1, known, prompt) for _ in range(wanted.rows * (wanted.steps + 4))]
            self.found = [Example((side(start), side(start))) for start in starts]
            self.lengths = np.array([len(pair) for pair in self.found])
            self.source, self.weights = np.zeros(len(self.found), dtype=int), [1.0]

        def __len__(self) -> int:
            return len(self.found)

        def __getitem__(self, index: int) -> Any:
            return self.found[index]

    return MapLoader(
        examples=Pairs(), max_length=wanted.length, packing=False, micro_batch_size=wanted.rows, rank=0, world_size=1,
        seed=0, collate=partial(collate_pairs, packing=packing),
    )  # fmt: skip


def grpo(tiny: bool, shared: bool) -> Found:
    """Forward and backward for a prompt with eight replies: the prompt computed once, or with each."""
    import grpo_step
    import torch
    from lightning.fabric import Fabric

    import posttrain
    from posttrain.blocks.rollouts.groups import batch_of

    wanted, device = setting(tiny), "cpu" if tiny else "cuda"
    dtype = {} if tiny else {"dtype": "bfloat16"}
    block = posttrain.HFModel(name_or_path="x", random_init=True, config=wanted.config().to_dict(), **dtype)
    net = block.build(Fabric(accelerator="cpu", devices=1)).to(device)
    sizes = (32, 16, 4) if tiny else (2048, 500, 8)
    batch = batch_of([grpo_step.group(net.vocabulary, *sizes)], None, packing=shared, mask_truncated=False)
    computed = net.layout(batch).input_ids.numel()
    batch = batch.to(torch.device(device))
    spent = timed(lambda: grpo_step.ours(net, batch).backward(), device, 2 if tiny else 10)
    return {"ms": round(spent * 1e3, 1), "tokens computed": computed}


def longest(tiny: bool, length: int) -> Found:
    """One document, with everything on that makes room."""
    usual, gpu_sft.WARM_UP = gpu_sft.WARM_UP, 1
    try:
        result = gpu_sft.longest(setting(tiny, rows=1, steps=1, length=length // 256 if tiny else length))
    finally:
        gpu_sft.WARM_UP = usual
    return shown(result) | {"on": ", ".join(result["on"])}


def swiftkv_prefill(tiny: bool, tokens: int) -> Found:
    """A prompt up to its first new token: the base model against SwiftKV with half of its layers above."""
    import torch
    from transformers import AutoModelForCausalLM

    import posttrain.blocks.models.swiftkv.modeling  # noqa: F401 - registers the classes
    from posttrain import SwiftKVModel

    tokens, device = (tokens // 16, "cpu") if tiny else (tokens, "cuda")
    base = setting(tiny, length=tokens).config()
    student = SwiftKVModel(name_or_path="x", random_init=True, config=base.to_dict()).configured(base)
    ids = torch.randint(1, base.vocab_size, (1, tokens), device=device)
    spent, needed = [], []
    for config in (base, student):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        with torch.no_grad():
            spent.append(
                timed(lambda model=model: model(ids, use_cache=True, logits_to_keep=1), device, 2 if tiny else 5)
            )
        needed.append(operations(config, tokens, swiftkv=config is student))
        del model
    gain, formula = spent[0] / spent[1], needed[0] / needed[1]
    return {"base ms": round(spent[0] * 1e3, 1), "SwiftKV ms": round(spent[1] * 1e3, 1), "gain": round(gain, 2),
            "by formula": round(formula, 2)}  # fmt: skip


def operations(config: Any, tokens: int, swiftkv: bool) -> float:
    """Return what a prompt takes, counting half of each square: the kernels leave out what is not seen."""
    from posttrain.blocks.models.swiftkv.config import prefill_flops

    whole = config.num_key_value_layers if swiftkv else config.num_hidden_layers
    half = 2 * config.num_attention_heads * config.head_dim * tokens**2
    return prefill_flops(config, tokens, last_row=swiftkv) - whole * half


def swiftkv(tiny: bool) -> Found:
    """Training a SwiftKV student beside its teacher."""
    import posttrain

    found = gpu_sft.posttrain_(
        setting(tiny, steps=2 if tiny else 10), method=posttrain.SwiftKVTrainer, block=posttrain.SwiftKVModel
    )
    return {name: value for name, value in shown(found).items() if name != "MFU"}


def speculator(tiny: bool) -> Found:
    """Training three heads of a speculator on a frozen base."""
    import posttrain

    found = gpu_sft.posttrain_(
        setting(tiny, steps=2 if tiny else 10), method=posttrain.SpeculatorTrainer, block=posttrain.SpeculatorModel,
        n_predict=3, inner_dim=32 if tiny else 4096,
    )  # fmt: skip
    return {name: value for name, value in shown(found).items() if name != "MFU"}


def profile(tiny: bool) -> Found:
    """Ten steps of supervised fine-tuning, recorded: where the time goes, and how long the device is idle."""
    return gpu_profile.recorded(setting(tiny, steps=12 if not tiny else 5), OUT, 10 if not tiny else 3)


# -- what there is ------------------------------------------------------------------------

WORK: dict[str, dict[str, Callable[[bool], Found]]] = {
    "machine": {"machine": machine},
    "sft": {
        "posttrain": sft,
        "bare loop": bare,
        "posttrain, liger": partial(sft, liger=True),
        "posttrain, batches pinned in a thread": sft_ahead,
        "posttrain, bf16-mixed": sft_mixed,
        "posttrain, compiled": partial(sft, compile=True),
        "TRL": trl,
        "bare loop, compiled": partial(bare, compile=True),
    },
    "profile": {"profile": profile},
    "methods": {
        "DPO, prompts once": partial(dpo, packing=True),
        "DPO, padded": partial(dpo, packing=False),
        "GRPO update, prompt once": partial(grpo, shared=True),
        "GRPO update, padded": partial(grpo, shared=False),
        **{f"SwiftKV prefill of {n}": partial(swiftkv_prefill, tokens=n) for n in (2048, 8192, 32768)},
        "SwiftKV training": swiftkv,
        "speculator training": speculator,
        "FSDP, one rank": sft_fsdp,
        "FSDP, kept by the host": partial(sft_fsdp, cpu_offload=True),
        **{f"a document of {n}": partial(longest, length=n) for n in (65536, 131072, 262144)},
    },
}
ORDER = ("machine", "tests", "sft", "profile", "methods")
SECONDS = {"posttrain, compiled": 150, "bare loop, compiled": 150, "tests": 240, "a document of 262144": 150}
"""Limits of measurements that take longer."""


def tests(tiny: bool, seconds: float) -> Found:
    """Run the tests of a GPU, and return how they ended."""
    emulate = {"POSTTRAIN_EMULATE": "1"} if tiny else {}
    which = (
        ["tests/devices/test_gpu.py"] if tiny else ["tests/devices/test_gpu.py", "tests/tools/test_plan.py", "-n", "4"]
    )
    quiet = ["-W", "ignore", "-p", "no:cacheprovider", "--tb=short"]  # other versions may warn while they are imported
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *quiet, *which]
    file = OUT / "tests.txt"
    with file.open("w") as written:
        ended = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | emulate,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(ended.pid, signal.SIGKILL)
    lines = file.read_text().splitlines()
    failed = [line.removeprefix("FAILED ")[:160] for line in lines if line.startswith(("FAILED", "ERROR "))]
    summary = next((line.strip("= ") for line in reversed(lines) if "passed" in line or "failed" in line), "")
    return {"ended": summary or f"not within {seconds:.0f} s", "failed": len(failed), "which": failed[:40]}


def worker(names: list[str], tiny: bool) -> None:
    """Measure one after the other, and print each result as it comes."""
    import torch

    known = {name: work for part in WORK.values() for name, work in part.items()}
    for name in names:
        torch.compiler.reset()
        gc.collect()
        if not tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print("RESULT " + json.dumps({"name": name, **known[name](tiny)}), flush=True)
        if torch.distributed.is_initialized():  # the next strategy may want another backend
            torch.distributed.destroy_process_group()


def measured(names: list[str], tiny: bool, end: float, note: Callable[[Found], None]) -> None:
    """Measure in processes of their own, and note every result, or why there is none."""
    while names:
        if end - time.monotonic() < (1 if tiny else 20):
            for name in names:
                note({"name": name, "error": "no time was left"})
            return
        command = [sys.executable, __file__, "--worker", *names, *(["--tiny"] if tiny else [])]
        with (OUT / "errors.txt").open("a") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, start_new_session=True
            )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=handed_on, args=(child.stdout, lines), daemon=True)
        reader.start()
        fresh = True
        while names:
            found = result_of(lines, min(end - time.monotonic(), SECONDS.get(names[0], LIMIT)))
            if not fresh and found.get("error") == "":
                break  # what others left in this process may have been the reason: again, in one of its own
            if "error" in found:
                with_reason = found["error"] or (OUT / "errors.txt").read_text().strip().splitlines()[-1][:200]
                note({"name": names.pop(0), "error": with_reason})
                break
            names.remove(found["name"])
            note(found)
            fresh = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join()


def handed_on(lines: Any, to: "queue.Queue[str | None]") -> None:
    """Put lines into a queue as they come, and None behind the last."""
    with lines:
        for line in lines:
            to.put(line)
    to.put(None)


def result_of(lines: "queue.Queue[str | None]", seconds: float) -> Found:
    """Return the next result, or an error: a limit that has passed, or none for what the process said itself."""
    until = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            return {"error": f"more than {seconds:.0f} s"}
        if line is None:
            return {"error": ""}
        if line.startswith("RESULT "):
            found: Found = json.loads(line.removeprefix("RESULT "))
            return found


def page(results: dict[str, Found]) -> str:
    """Return the table, and how it compares with what is aimed at."""
    found = results.get("machine", {})
    commit = os.environ.get("COMMIT", "unknown")
    lines = [
        "# On a GPU", "", f"{found.get('device', 'unknown device')}, {time.strftime('%Y-%m-%d')}, commit "
        f"{commit}, `bash benchmarks/gpu.sh`. A Llama of 1.2 B parameters with random weights in",
        "bfloat16, two packed rows of 4096 tokens a step, AdamW, unless a row says otherwise; single runs of 20 steps.", "",
    ]  # fmt: skip
    for part in ORDER:
        rows = [results[name] for name in WORK.get(part, {part: None}) if name in results]
        if rows:
            lines += [f"## {part}", "", "| what | found |", "|---|---|"]
            lines += [f"| {row['name']} | {cell(row)} |" for row in rows] + [""]
    return "\n".join([*lines, "## Aims", "", *aims(results), ""])


def cell(row: Found) -> str:
    """Return what was found in words."""
    if "error" in row:
        return f"not measured: {row['error']}".replace("|", "/")
    shown = ((name, value) for name, value in row.items() if name != "name" and value not in ([], ""))
    return ", ".join(
        f"{name} {'; '.join(value) if isinstance(value, list) else value}" for name, value in shown
    ).replace("|", "/")


def aims(results: dict[str, Found]) -> list[str]:
    """Return what is aimed at beside what was found."""
    rates = {name: row["tokens/s"] for name, row in results.items() if row.get("tokens/s")}
    said = []
    if mfu := results.get("posttrain", {}).get("MFU"):
        said.append(f"- MFU at least 50 %: {mfu:.1%}")
    for ours, theirs, aim in (
        ("posttrain", "bare loop", "at most 2 % below the bare loop"), ("posttrain", "TRL", "above TRL"),
        ("posttrain, compiled", "bare loop, compiled", "compiled, at most 2 % below the bare loop"),
        ("DPO, prompts once", "DPO, padded", "DPO above padded"),
        ("posttrain, batches pinned in a thread", "posttrain", "a thread that pins ahead pays"),
    ):  # fmt: skip
        if ours in rates and theirs in rates:
            said.append(f"- {aim}: {rates[ours] / rates[theirs] - 1:+.1%}")
    for name, row in results.items():
        if "by formula" in row:
            said.append(f"- {name}, within 10 % of the formula: {row['gain'] / row['by formula'] - 1:+.1%}")
    return said or ["- nothing was measured that says so"]


def main() -> None:
    """Measure what is missing, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"parts ({', '.join(ORDER)}) or measurements")
    parser.add_argument("--again", action="store_true", help="measure also what has been")
    parser.add_argument("--seconds", type=float, default=550, help="after which nothing more is begun")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker, chosen.tiny)
        return
    began, file = time.monotonic(), OUT / "results.jsonl"
    end = began + chosen.seconds
    OUT.mkdir(parents=True, exist_ok=True)
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() and not chosen.again else []
    results: dict[str, Found] = {row["name"]: row for row in lines}

    def note(row: Found) -> None:
        results[row["name"]] = row
        with file.open("a") as written:
            written.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - began:5.0f} s  {row['name']}: {cell(row)}", flush=True)

    done = {name for name, row in results.items() if "error" not in row}
    for part in ORDER:
        wanted = [name for name in WORK.get(part, {part: None}) if not chosen.only or {part, name} & set(chosen.only)]
        names = [name for name in wanted if name not in done]
        if names == ["tests"]:
            note({"name": "tests", **tests(chosen.tiny, min(SECONDS["tests"], end - time.monotonic()))})
        elif names:
            measured(names, chosen.tiny, end, note)
        (OUT / "gpu.md").write_text(page(results))
    print("\n" + page(results))


if __name__ == "__main__":
    main()
