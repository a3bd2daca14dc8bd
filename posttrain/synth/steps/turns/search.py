"""Search: solutions found step by step, by Monte Carlo tree search with a judge of each step.

As in ReST-MCTS* (arXiv:2406.03816) and AlphaMath (arXiv:2405.03553): each step has a value in place of rollouts, and
what is found further down counts for all steps before it. One expansion of every row goes out together, so that also a
search can be a batch.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import attrs
from attrs.validators import ge, gt, min_len

from posttrain.blocks.data.rows.schemas import CHATS
from posttrain.registry import block, key
from posttrain.synth.pipelines.images import beside, shown
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row, transcript
from posttrain.synth.pipelines.step import Asking, Prompting
from posttrain.synth.steps.judge import SYSTEM
from posttrain.synth.steps.turns.tree import Node
from posttrain.synth.steps.verdicts import THOUGHTS, mark, score_in, structured
from posttrain.synth.steps.verify import Verify

STEP = """\
{steps}Write the next step of the solution, only this one step, in a few sentences. If it is the last one, end it with
the answer, as "{last}: ..."."""
JUDGE = """\
[Conversation{mark}]
{conversation}
[End of the conversation{mark}]

[Steps so far{mark}]
{steps}
[End of the steps{mark}]

{rubric}

First say in a few sentences why, then give a score, a whole number from 1 (worst) to 5 (best). Reply with JSON only:
{{"rationale": "...", "score": ...}}"""
LOW, HIGH = 1, 5


@block("step", "search")
class Search(Prompting, Asking):
    """Look for solutions by a tree of steps, of which a model judges each.

    The row gets `prompt`, `response` (the steps of a solution), `score` (0 to 1) and `steps`: the text of each, with
    `value`, what all that was tried from there on was worth, which process reward models are trained on.
    """

    width: int = key(3, check=gt(0))
    """Next steps that are tried from one place."""
    expansions: int = key(8, check=gt(0))
    """Places from which the search goes on; each asks `width` times for a step, and for a judgement of each step."""
    depth: int = key(8, check=gt(0))
    """Steps of a solution at most."""
    exploration: float = key(0.7, check=ge(0))
    """How much is tried what was tried little: 0 always goes on from what looks best."""
    last: str = key("The answer is", check=min_len(1))
    """What the last step says before the answer."""
    rubric: str = key("Is the last step right, and does it lead towards the solution?", check=min_len(1))
    """How a step is judged."""
    judge: str | None = None
    """Model that judges; the one that answers unless given."""
    judge_body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of a request for a judgement."""
    check_by: str | None = None
    """A verifier (see the step `verify`): what it says of a whole solution is its value, in place of a judgement."""
    wanted: str | None = None
    """With `check_by`: column that holds the right answer."""
    keep: Literal["best", "all"] = "best"
    """The solution of the highest score, or each one that was found, which `pair` makes pairs of."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        yield from super().check()
        if self.check_by is not None:
            for _, message in self.verify.check():
                yield "check_by", message
        if "n" in self.body:
            yield "body", "n pays for several steps of which one is kept: give `width`"

    @property
    def verify(self) -> Verify:
        """What checks whole solutions."""
        return Verify(function=self.check_by or "exact", wanted=self.wanted)

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [self.model, *([self.judge] if self.judge else [])]

    @property
    def rounds(self) -> int:
        """Waves after the first: of an expansion, the steps and then their judgements."""
        return 2 * self.expansions - 1

    def chats(self, row: Row) -> list[Chat]:
        """Return what is asked first: the first steps."""
        return self.steps_after(Node(), row)

    def then(self, row: Row, replies: list[Reply]) -> list[Chat]:
        """Return the next steps to ask for, or the judgements of those that came."""
        return self.grown(row, replies)[1]

    def steps_after(self, node: Node, row: Row) -> list[Chat]:
        """Return the requests for steps that may come after one."""
        *before, question = self.prompt(row)
        steps = f"Steps so far:\n{numbered(node.path)}\n\n" if node.path else ""
        text = STEP.format(steps=steps, last=self.last)
        asked = question["content"]
        asked = f"{asked}\n\n{text}" if isinstance(asked, str) else [*asked, {"type": "text", "text": text}]
        said = [*before, {"role": "user", "content": asked}]
        return [Chat(said, self.model, self.body) for _ in range(self.width)]

    def judgement_of(self, node: Node, step: str, row: Row) -> Chat:
        """Return the request that judges a step."""
        conversation, steps = transcript(self.prompt(row)), numbered([*node.path, Node(step)])
        known = {"conversation": conversation, "steps": steps, "rubric": self.rubric}
        text = JUDGE.format(**known, mark=mark(conversation, steps))
        form = structured("judgement", score={"type": "integer", "enum": list(range(LOW, HIGH + 1))})
        asked = {"role": "user", "content": shown(text, self.prompt(row))}
        said = [{"role": "system", "content": SYSTEM}, asked]
        return Chat(said, self.judge or self.model, {**form, **self.judge_body})

    def grown(self, row: Row, replies: list[Reply]) -> tuple[Node, list[Chat]]:
        """Return the tree that the replies make, and what is asked next."""
        root, coming = Node(), iter(replies)
        for _ in range(self.expansions):
            node = root.leaf(self.exploration)
            if node is None:
                break
            came = list(islice(coming, self.width))
            if not came:
                return root, self.steps_after(node, row)
            node.expanded = True
            steps = list(dict.fromkeys(step for reply in came if (step := step_in(reply))))
            values = {step: self.verified(node, step, row) for step in steps}
            asked = [step for step in steps if values[step] is None]
            heard = list(islice(coming, len(asked)))
            if asked and not heard:
                return root, [self.judgement_of(node, step, row) for step in asked]
            values |= {step: worth(reply) for step, reply in zip(asked, heard, strict=True)}
            for step, value in values.items():
                if value is not None and (self.is_last(step) or len(node.path) + 1 < self.depth):
                    node.add(step, value, self.is_last(step))
        return root, []

    def is_last(self, step: str) -> bool:
        """Whether a step gives the answer."""
        return self.last.lower() in step.lower()

    def verified(self, node: Node, step: str, row: Row) -> float | None:
        """Return what the verifier says of a solution that ends with a step; None where it has nothing to say."""
        if self.check_by is None or not self.is_last(step):
            return None
        return self.verify.score(written([*node.path, Node(step)]), row)

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row with the best solution, or with each of them."""
        root, _ = self.grown(row, replies)
        prompt = self.prompt(row)
        made: Row = {**beside(row, prompt, *CHATS), "prompt": prompt}
        found = sorted(root.finals(), key=lambda node: -node.value)
        if not found:
            troubles = [reply.trouble for reply in replies if reply.text is None]
            tried = f"{sum(1 for _ in below(root))} steps were tried"
            return [Drop(made, troubles[0] if troubles and not root.children else "no solution was reached", tried)]
        best = found if self.keep == "all" else found[:1]
        return [
            {
                **made, "response": written(node.path), "score": node.value, "model": self.model,
                "steps": [{"text": step.text, "value": step.mean, "visits": step.visits} for step in node.path],
            }
            for node in best
        ]  # fmt: skip

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return the mean score, and how long the solutions are."""
        found = [(float(row["score"]), len(row["steps"])) for row in rows]
        if not found:
            return {}
        return {"mean score": sum(s for s, _ in found) / len(found), "steps": sum(n for _, n in found) / len(found)}


def step_in(reply: Reply) -> str | None:
    """Return the step that a reply writes, without its number and without what was thought before it."""
    text = THOUGHTS.sub("", reply.text or "").strip()
    return re.sub(r"^(?:\*\*)?step \d+[.:]?(?:\*\*)?\s*|^\d+[.)]\s+", "", text, flags=re.IGNORECASE).strip() or None


def worth(reply: Reply) -> float | None:
    """Return a judgement as a number from 0 to 1; None if it names no score."""
    score, _ = score_in(reply.said or "", LOW, HIGH)
    return None if score is None else (score - LOW) / (HIGH - LOW)


def numbered(path: list[Node]) -> str:
    """Return steps as a numbered list."""
    return "\n".join(f"{n}. {node.text}" for n, node in enumerate(path, 1))


def written(path: list[Node]) -> str:
    """Return steps as one text."""
    return "\n\n".join(node.text for node in path)


def below(node: Node) -> Iterator[Node]:
    """Yield all steps after one."""
    for child in node.children:
        yield child
        yield from below(child)
