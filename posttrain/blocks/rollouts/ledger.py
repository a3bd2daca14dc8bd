"""Every reply of a run on disk: `rollouts.jsonl` in its folder, a line for each group, and `evaluations.jsonl`.

What a killed process wrote after its last checkpoint is taken back when the run goes on, since those steps are taken
again. With several ranks each writes a file of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.blocks.rollouts.groups import reference
from posttrain.blocks.rollouts.replies import Failure, Group, Reply

if TYPE_CHECKING:
    from posttrain.run import Run

ROLLOUTS, EVALUATIONS = "rollouts", "evaluations"


class Rollouts:
    """Writes down what was said in each step, and what it was worth."""

    def __init__(self, run: "Run", name: str = ROLLOUTS) -> None:
        self.run, self.file = run, run.output_dir / f"{name}{run.suffix}.jsonl"
        self.begun = False

    def write(self, groups: list[Group], step: int) -> None:
        """Add the groups of a step."""
        if not self.begun and self.file.exists():
            with self.file.open("r+b") as file:
                file.truncate(_end(file, self.run.step))
        self.begun = True
        with self.file.open("a", encoding="utf-8") as file:
            for group in groups:
                file.write(json.dumps({"step": step, **_line(group)}, default=str) + "\n")


def _end(file: Any, step: int) -> int:
    """Return where the last whole line of steps up to this one ends."""
    end = 0
    for line in file:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                return end
        except (ValueError, KeyError, TypeError):
            return end
        end += len(line)
    return end


def _line(group: Group) -> dict[str, Any]:
    replies = []
    for i, (reply, sample) in enumerate(zip(group.replies, group.samples, strict=True)):
        said = {name: part[i] for name, part in group.parts.items()}
        replies.append({
            "text": sample.text, "ids": reply.ids, "ended": reply.ended, "reward": group.rewards[i],
            "rewards": {name: one for name, one in said.items() if not isinstance(one, Failure)},
            "failed": {name: one.reason for name, one in said.items() if isinstance(one, Failure)},
            "advantage": group.advantages[i] if group.advantages else None, **_turns(reply),
        })  # fmt: skip
    prompt = group.samples[0].prompt if group.samples else ""
    again = {} if group.rounds is None else {"resampled": group.rounds}
    images = {"images": [reference(image) for image in group.images]} if group.images else {}
    return {"prompt": group.place, "text": prompt, "row": group.row, **images, **again, "replies": replies}


def _turns(reply: Reply) -> dict[str, Any]:
    """Return what there is more to say of several turns: the conversation, and which tokens the policy did not say."""
    if not reply.messages:
        return {}
    earlier = [{"ids": part.ids, "told": _told(part), "prompt": part.prompt} for part in reply.earlier]
    return {"messages": reply.messages, "told": _told(reply), "prompt": reply.prompt, "earlier": earlier}


def _told(reply: Reply) -> list[int]:
    return [i for i, drawn in enumerate(reply.drawn) if not drawn]


def read(folder: Path, name: str = ROLLOUTS) -> Iterator[dict[str, Any]]:
    """Yield what was written in a run's folder, by all ranks, step by step."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob(f"{name}*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    yield from sorted(lines, key=lambda line: (line["step"], line["prompt"]))
