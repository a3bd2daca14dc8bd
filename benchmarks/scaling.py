"""Bytes that a rank sends in a training step, and time per step, for 1, 2 and 4 CPU ranks under each strategy.

    python benchmarks/scaling.py [--ranks 1 2 4] [--steps 6] [--only ddp fsdp zero-3]
    python benchmarks/scaling.py --model          # what these counts mean on 8, 64 and 1024 GPUs (docs/scaling.md)

Bytes are counted from the messages that ranks hand to torch.distributed, whoever does (DDP's reducer, FSDP2,
DeepSpeed), and are those of ring algorithms. They do not depend on the machine. Times do: ranks share its cores.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EVERY_TIME = {  # otherwise DeepSpeed keeps a model as small as this one gathered
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
STRATEGIES = {
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "zero-1": {"type": "deepspeed", "config": {"zero_optimization": {"stage": 1}}},
    "zero-2": {"type": "deepspeed", "config": {"zero_optimization": {"stage": 2}}},
    "zero-3": {"type": "deepspeed", "config": {"zero_optimization": {"stage": 3, **EVERY_TIME}}},
}
FACTOR = {"ddp": 2, "fsdp": 3, "zero-1": 3, "zero-2": 3, "zero-3": 3}
"""A rank sends this many times (n - 1) / n of the parameters' bytes. ddp: all gradients to all (2). fsdp, zero-3: parameters
before forward and backward (1 + 1), gradients to their owners (1). zero-1, zero-2: as DeepSpeed does it by default, all
gradients to all (2), of which each rank throws away what it does not own, then new parameters (1)."""
SHAPE = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip
WARM_UP = 2

# -- counting -------------------------------------------------------------------------


def sent(name: str, tensors: list, ranks: int) -> float:
    """Return the bytes a rank sends for a collective, as ring algorithms do it.

    Args:
        name: of the operator in torch's `c10d` namespace.
        tensors: its arguments, output first where it has both.
        ranks: in the group.
    """
    size = [tensor.numel() * tensor.element_size() for tensor in tensors]
    rest = (ranks - 1) / ranks
    if name.startswith("allreduce"):
        return 2 * rest * sum(size)
    if name.startswith(("_allgather_base", "allgather_into_tensor")):
        return rest * size[0]  # of the whole
    if name.startswith("allgather"):
        return rest * (sum(size) - size[-1])  # the outputs, then the input
    if name.startswith(("_reduce_scatter_base", "alltoall_base", "reduce_scatter_tensor")):
        return rest * size[1]
    if name.startswith("reduce_scatter"):
        return rest * sum(size[1:])
    if name.startswith(("broadcast", "reduce", "scatter", "gather")):
        return rest * sum(size)
    if name.startswith(("barrier", "monitored_barrier", "recv")):
        return 0.0
    if name.startswith("send"):
        return float(sum(size))
    raise NotImplementedError(f"c10d::{name}")


def counter(ranks: int):
    """Return a mode that counts, while it is entered, the bytes this rank sends with each collective."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sent(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.bytes: Counter = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            import torch

            space, _, name = func.name().partition("::")
            if space == "c10d":
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                self.bytes[name.split(".")[0]] += sent(name, tensors, ranks)
            return func(*args, **(kwargs or {}))

    return Sent()


def one(strategy: str, steps: int) -> None:
    """Train as a rank under torchrun; rank zero prints what it saw."""
    import warnings

    warnings.simplefilter("ignore")
    import posttrain
    from posttrain.registry import lookup

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import toy

    ranks, at, totals = int(os.environ["WORLD_SIZE"]), [], []
    mode = counter(ranks)

    @posttrain.before("trainer.step")
    def begin(trainer, batches):
        at.append(time.perf_counter())
        totals.append(-sum(mode.bytes.values()))

    @posttrain.after("trainer.step")
    def end(trainer, loss):
        at[-1] = time.perf_counter() - at[-1]
        totals[-1] += sum(mode.bytes.values())

    keys = dict(STRATEGIES[strategy])
    block = lookup("strategy", keys.pop("type"))(**keys)
    with tempfile.TemporaryDirectory() as folder, mode:
        run = toy.trainer(
            Path(folder), model={"config": SHAPE}, strategy=block, micro_batch_size=1, max_steps=steps + WARM_UP,
            checkpoint=[], logger=[], log_every=1000,
        ).train(callbacks=[begin, end])  # fmt: skip
    if run.fabric.is_global_zero:
        found = {
            "bytes": statistics.median(totals[WARM_UP:]), "seconds": statistics.median(at[WARM_UP:]),
            "collectives": dict(mode.bytes),
        }  # fmt: skip
        print(json.dumps(found))


def measure(strategy: str, ranks: int, steps: int) -> dict | str:
    """Return what a strategy does with so many ranks, or why it cannot be measured."""
    if strategy.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        return "deepspeed is not installed"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
        "--one", strategy, "--steps", str(steps),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return (errors or ["it failed"])[0].strip()[:100]
    return json.loads(lines[-1])


def parameters() -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are outside of its layers."""
    h, i, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    outside = 2 * v * h + h
    return outside + SHAPE["num_hidden_layers"] * (4 * h * h + 3 * h * i + 2 * h), outside


def formula(strategy: str, ranks: int) -> float:
    """Return the bytes a rank sends in a step, in float32. FSDP2 gathers what is outside of the layers only once."""
    total, outside = parameters()
    return 4 * (ranks - 1) / ranks * (FACTOR[strategy] * total - (outside if strategy == "fsdp" else 0))


# -- the model ------------------------------------------------------------------------

PEAK, MFU = 989e12, 0.50
"""An H100 SXM's dense bf16 operations per second (NVIDIA's data sheet), and the share of them that one GPU alone reaches."""
NVLINK, NIC, PER_NODE, EFFICIENCY = 450e9, 50e9, 8, 0.8
"""Bytes per second and direction of a GPU's NVLink and of its 400 Gb/s network card, GPUs per node, share that is reached."""
HOP, OVERLAP = 10e-6, 0.9
"""Seconds per step of a ring, and the share of the computing under which communication can hide."""


def predicted(strategy: str, gpus: int, size: float, layers: int, tokens: int, accumulate: int = 1) -> dict:
    """Return seconds of a step: computing, communicating, and together, and the efficiency against one GPU alone.

    Args:
        strategy: `ddp`, `fsdp` (over all GPUs) or `hsdp` (shards within a node, gradients reduced across nodes).
        gpus: in all.
        size: parameters; 2 bytes each when gathered, 4 when gradients are reduced.
        layers: that are gathered and reduced one by one.
        tokens: per GPU and micro-batch.
        accumulate: micro-batches of a step; ddp reduces once, the others for each, to keep gradients in shards.
    """
    compute = 6 * size * tokens * accumulate / (PEAK * MFU)
    rest = (gpus - 1) / gpus
    # A ring enters and leaves each node once, by all of its cards together.
    across = min(NVLINK, NIC * PER_NODE) * EFFICIENCY if gpus > PER_NODE else NVLINK * EFFICIENCY
    if strategy == "ddp":
        seconds = 2 * rest * 4 * size / across + 2 * (gpus - 1) * HOP
    elif strategy == "fsdp":
        seconds = accumulate * (rest * (2 * 2 + 4) * size / across + 3 * layers * (gpus - 1) * HOP)
    else:
        inside, nodes = (PER_NODE - 1) / PER_NODE, max(1, gpus // PER_NODE)
        seconds = inside * (2 * 2 + 4) * size / (NVLINK * EFFICIENCY)
        seconds += 2 * (nodes - 1) / nodes * 4 * size / PER_NODE / (NIC * EFFICIENCY) + 2 * (nodes - 1) * HOP * layers
        seconds *= accumulate
    step = compute + max(0.0, seconds - OVERLAP * compute)
    return {"compute": compute, "communicate": seconds, "step": step, "efficiency": compute / step}


def model() -> None:
    """Print the table of docs/scaling.md."""
    print("| model | tokens per GPU and step | strategy | GPUs | compute s | communicate s | step s | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size, layers in (("1 B", 1.2e9, 16), ("8 B", 8.0e9, 32), ("70 B", 70.6e9, 80)):
        for tokens, accumulate in ((8192, 1), (8192, 4)):
            for strategy in ("ddp", "fsdp", "hsdp"):
                if (strategy == "ddp" and size > 4e9) or (strategy == "hsdp" and size > 30e9):
                    continue  # 16 bytes per parameter do not fit into 80 GB, of one GPU or of eight
                for gpus in (8, 64, 1024):
                    if size > 30e9 and gpus == 8:
                        continue
                    p = predicted(strategy, gpus, size, layers, tokens, accumulate)
                    times = " | ".join(f"{p[key]:.2f}" for key in ("compute", "communicate", "step"))
                    print(
                        f"| {name} | {accumulate} x {tokens} | {strategy} | {gpus} | {times} | {p['efficiency']:.0%} |"
                    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--model", action="store_true", help="predict for GPUs instead of measuring here")
    parser.add_argument("--one", choices=STRATEGIES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        return one(chosen.one, chosen.steps)
    if chosen.model:
        return model()
    print("| strategy | ranks | MB sent per rank and step | ring formula, MB | measured / formula | s per step |")
    print("|---|---|---|---|---|---|")
    for strategy in chosen.only:
        for ranks in chosen.ranks:
            found = measure(strategy, ranks, chosen.steps)
            if isinstance(found, str):
                print(f"| {strategy} | {ranks} | {found} | | | |", flush=True)
                continue
            expected = formula(strategy, ranks)
            ratio = f"{found['bytes'] / expected:.4f}" if expected else "-"
            print(
                f"| {strategy} | {ranks} | {found['bytes'] / 1e6:.3f} | {expected / 1e6:.3f} | {ratio} "
                f"| {found['seconds']:.3f} |", flush=True,
            )  # fmt: skip
    return None


if __name__ == "__main__":
    main()
