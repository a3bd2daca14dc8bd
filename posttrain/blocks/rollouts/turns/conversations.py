"""Policy and environment talk with each other, by tokens: what the policy said stays as it was drawn.

The answer of an environment is appended as the tokens of what the chat template writes behind the turn. Where the
template would write the conversation so far in another way, as those do that forget earlier thoughts, the turns so far
are a sample by themselves, and a new one begins with the conversation as it is rendered then. Both are trained.
"""

from typing import TYPE_CHECKING, Any

import torch

from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.offsets import tokenize
from posttrain.blocks.rollouts.in_process import ends_of
from posttrain.blocks.rollouts.replies import Group, Outcome, Reply, Turn
from posttrain.blocks.rollouts.turns.calls import convention
from posttrain.errors import TrainingError
from posttrain.interfaces import AheadSampler, EnvironmentBlock, Episode, Sampler
from posttrain.runtime.launch import all_reduce

if TYPE_CHECKING:
    from posttrain.run import Run


class Conversations:
    """Lets the policy of a run talk with an environment."""

    def __init__(
        self, run: "Run", speaker: Sampler, environment: EnvironmentBlock, template_args: dict[str, Any]
    ) -> None:
        self.run, self.speaker, self.environment = run, speaker, environment
        self.renderer = ChatRenderer(run.tokenizer, template_args=template_args)
        self.convention, self.ends = convention(self.renderer), set(ends_of(run))

    def answers(
        self, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None
    ) -> list[list[Reply]]:
        """Return n conversations for each prompt; a turn is a function of the weights, the key, and its number."""
        talks = [[Talk(self, group, (*key, i)) for i in range(n)] for group, key in zip(groups, keys, strict=True)]
        every = [talk for some in talks for talk in some]
        first = self.speaker.sample([group.prompt for group in groups], keys, n, temperature)
        for talk, reply in zip(every, (one for some in first for one in some), strict=True):
            talk.hear(reply, last=self.environment.max_turns == 1)
        for turn in range(1, self.environment.max_turns):
            alive = [talk for talk in every if not talk.over]
            if not anywhere(self.run, self.speaker, bool(alive)):
                break
            asked = [talk.context for talk in alive], [(*talk.key, turn) for talk in alive]
            for talk, (reply,) in zip(alive, self.speaker.sample(*asked, 1, temperature), strict=True):
                talk.hear(reply, last=turn + 1 == self.environment.max_turns)
        return [[talk.reply() for talk in some] for some in talks]


def anywhere(run: "Run", speaker: Sampler, alive: bool) -> bool:
    """Return whether something goes on, on any rank: all of them ask the sampler equally often, while it may need
    weights from all of them."""
    if isinstance(speaker, AheadSampler) and speaker.held:
        return alive
    return bool(all_reduce(run.fabric, torch.tensor(float(alive), device=run.fabric.device), "MAX"))


def shown_in(tokenizer: Any, ids: list[int], ends: set[int]) -> str:
    """Return a turn with its special tokens, but for the one that ended it."""
    return str(tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids))


class Talk:
    """One conversation."""

    def __init__(self, among: Conversations, group: Group, key: tuple[int, ...]) -> None:
        self.among, self.group, self.key = among, group, key
        self.tokenizer = among.run.tokenizer
        self.episode: Episode = among.environment.reset(group.row)
        self.prompt, self.earlier = group.prompt, list[Reply]()
        self.ids, self.said, self.log_probs = list[int](), list[bool](), list[float]()
        self.messages, self.reward, self.over, self.ended = list[dict[str, Any]](), 0.0, False, False

    @property
    def context(self) -> list[int]:
        """What the policy goes on from."""
        return [*self.prompt, *self.ids]

    def add(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """Append tokens: of the policy with their log-probabilities, of others without."""
        self.ids += ids
        self.said += [log_probs is not None] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)

    def hear(self, reply: Reply, last: bool) -> None:
        """Take in a turn of the policy, and the environment's answer to it."""
        self.add(reply.ids, reply.log_probs)
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        shown = shown_in(self.tokenizer, reply.ids, self.among.ends)
        self.messages.append({"role": "assistant", "content": text})
        if not reply.ended:
            self.over = True
            return
        turn = self.among.convention.read(text, shown)
        outcome: Outcome = self.episode.step(turn)
        self.reward += outcome.reward
        self.over = self.ended = not outcome.messages
        if outcome.messages:
            self.messages += outcome.messages
            self.over = last or not self.grown(turn, shown, outcome.messages)

    def grown(self, turn: Turn, shown: str, answer: list[dict[str, Any]]) -> bool:
        """Append an answer, or begin again where the template writes the turns so far otherwise.

        Returns:
            Whether there is room for another turn.
        """
        before = [*self.group.messages, *self.messages[: -1 - len(answer)]]
        far, renderings = str(self.tokenizer.decode(self.context, clean_up_tokenization_spaces=False)), list[str]()
        for spelled in self.among.convention.spellings(turn, shown, len(before)):
            try:
                rendered = self.among.renderer.asked(
                    {**self.group.conversation, "messages": [*before, spelled, *answer]}
                )
            except Refused as refused:
                reason = refused
                continue
            renderings.append(rendered)
            self.messages[-1 - len(answer)] = spelled
            if rendered.startswith(far):
                (more,) = tokenize(self.tokenizer, [rendered[len(far) :]])
                self.add(list(more.ids))
                break
        else:
            if not renderings:
                raise TrainingError(f"the chat template cannot write what the environment answers: {reason}")
            self.begin_anew(renderings[-1])
        return self.length() < self.among.environment.max_tokens

    def begin_anew(self, rendered: str) -> None:
        """Close the sample so far, and begin one with the conversation as it is rendered now."""
        self.earlier.append(self.part(True))
        (prompt,) = tokenize(self.tokenizer, [rendered])
        self.prompt, self.ids, self.said, self.log_probs = list(prompt.ids), [], [], []

    def length(self) -> int:
        """Return by how many tokens the conversation has grown."""
        return len(self.context) - len(self.group.prompt)

    def part(self, ended: bool, **more: Any) -> Reply:
        """Return the sample in hand, without what nobody answered."""
        keep = max((i + 1 for i, said in enumerate(self.said) if said), default=0)
        prompt = None if self.prompt is self.group.prompt else self.prompt
        return Reply(self.ids[:keep], self.log_probs[:keep], ended, self.said[:keep], prompt, **more)

    def reply(self) -> Reply:
        """Return the whole conversation."""
        known: dict[str, Any] = {"messages": self.messages, "reward": self.reward}
        if not self.ids and self.earlier:  # it had no more room behind the last rendering
            *earlier, last = self.earlier
            return Reply(last.ids, last.log_probs, self.ended, last.said, last.prompt, tuple(earlier), **known)
        return self.part(self.ended, earlier=tuple(self.earlier), **known)
