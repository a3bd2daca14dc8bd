"""Every benchmark, one after the other, as one page with a picture: `make bench`.

    python benchmarks/side_by_side.py [--quick] [--output benchmarks/results.md]

Run it on a machine that does nothing else. What is not installed or not there (TRL, the openai SDK, GSM8K) is left out.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "lightning", "tokenizers", "trl", "openai")
FULL = {
    "A step of supervised fine-tuning": ["sft_step.py", "--only", "tiny", "--steps", "10", "--rounds", "3"],
    "A step of DPO": ["dpo_step.py", "--only", "tiny", "--steps", "10", "--rounds", "3"],
    "From a command to the first step": ["startup.py", "--rounds", "3"],
    "Data preparation": ["data_prep.py", "--chats", "1000"],
    "A request to a model": ["synth.py", "--requests", "2000", "--lanes", "64"],
    "Near duplicates": ["dedup.py"],
}
QUICK = {"--steps": "3", "--rounds": "1", "--requests": "200", "--chats": "100"}
CAVEATS = """\
Ratios carry over to other machines, absolute figures do not. All of this is a CPU: on GPUs kernels, memory bandwidth and
communication decide, and nothing here has been measured there. TRL is given packed rows and its fused optimizer; its
tokens are counted at the share to which it fills rows. ArcticTraining runs in an environment of its own, with transformers
4.57, DeepSpeed and a compiled Adam; it allows one packed row per step, which is given twice the length."""

Table = list[dict[str, str]]


def table_of(text: str) -> Table:
    """Return the last markdown table in a text, a dict per row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rule = max((i for i, line in enumerate(lines) if re.fullmatch(r"[|\\-]+", line)), default=1)
    names, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[rule - 1 :] if line != lines[rule]
    ]
    return [dict(zip(names, row, strict=False)) for row in rows]


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to see that everything runs; the figures mean nothing")
    parser.add_argument("--arctic", metavar="PYTHON", help="of an environment in which ArcticTraining is installed")
    parser.add_argument("--output", type=Path, default=HERE / "results.md")
    chosen = parser.parse_args()
    parts, tables = [], {}
    for title, (script, *options) in FULL.items():
        if chosen.arctic and script == "sft_step.py":
            options = [*options, "--arctic", chosen.arctic]
        if chosen.quick:
            options = [QUICK.get(options[i - 1], o) if i else o for i, o in enumerate(options)]
        print(f"{title}: {script} {' '.join(options)}", flush=True)
        command = [sys.executable, str(HERE / script), *options]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
        if done.returncode:
            print(f"  left out: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}", flush=True)
            continue
        table = "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))
        tables[title] = table_of(table)
        parts.append(f"## {title}\n\n`python benchmarks/{script} {' '.join(options)}`\n\n{table}\n")
        print(table, flush=True)
    picture = chosen.output.with_suffix(".png")
    draw(tables, picture)
    head = f"# Side by side, {time.strftime('%d %B %Y').lstrip('0')}\n\n{machine()}\n\n![the same as bars]({picture.name})\n\n{CAVEATS}\n"
    chosen.output.write_text("\n".join([head, *parts]))
    print(chosen.output)


def machine() -> str:
    """Return what it was measured on."""
    from posttrain.runtime.folder import installed

    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    found = [f"{package} {made}" for package in PACKAGES if (made := installed(package))]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    name = model[1] if model else platform.machine()
    return (f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, Python {platform.python_version()}, "
            f"{', '.join(found)}, commit {commit.stdout.strip()}.")  # fmt: skip


def number(text: str) -> float | None:
    """Return the first number in a cell."""
    found = re.search(r"\d[\d,]*\.?\d*", text)
    return float(found[0].replace(",", "")) if found else None


def draw(tables: dict[str, Table], target: Path) -> None:
    """Draw a panel for each kind of measurement: ours in blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, list[tuple[str, float]]]] = []
    for title, kind in (("A step of supervised fine-tuning", "SFT"), ("A step of DPO", "DPO")):
        for row in tables.get(title, []):
            trained = f", {row['trained']} trained" if "trained" in row else ""
            bars = [(key.partition(" ")[0], number(value)) for key, value in row.items() if key.endswith("tok/CPU s")]
            panels.append((f"{kind}{trained}: tokens per CPU second", [(n, v) for n, v in bars if v]))
        if rows := tables.get(title):
            names = [key.partition(" ")[0] for key in rows[-1] if key.endswith("tok/CPU s")]
            memory = [number(cell) for cell in rows[-1]["peak MB"].split("/")]
            panels.append((f"{kind}: peak MB", [(n, v) for n, v in zip(names, memory, strict=False) if v]))
    if rows := tables.get("From a command to the first step"):
        panels.append(
            ("seconds to the first step, and to import", [(row[""], number(row["seconds"]) or 0) for row in rows])
        )
    if rows := tables.get("Data preparation"):
        panels.append(
            (
                "data: Mtok per CPU second",
                [(textwrap.fill(row[""], 30), number(row["Mtok per CPU s"]) or 0) for row in rows],
            )
        )
    if rows := tables.get("A request to a model"):
        bars = [
            (f"{row['client']}, {row['in flight']} in flight", number(row["CPU us per request"]) or 0) for row in rows
        ]
        panels.append(("synth: CPU microseconds per request", bars))
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(12, 1.9 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, bars) in zip(axes.flat, panels, strict=False):
        names, values = [name for name, _ in bars][::-1], [value for _, value in bars][::-1]
        ours = ["posttrain" in name or name.startswith("ledger") for name in names]
        drawn = axis.barh(names, values, color=["#2f5fd0" if mine else "#b9c0cc" for mine in ours], height=0.7)
        axis.bar_label(drawn, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
        axis.margins(x=0.15)
        axis.tick_params(axis="y", length=0, labelsize=8)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
