"""A classic environment of verifiers: the policy is told how long it spoke, until it has spoken twice."""

import verifiers as vf
from datasets import Dataset


class Echo(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": f"{len(messages[-1].content or '')} letters"}]


def letters(completion, answer, **kwargs):
    if answer == "2":
        raise ValueError("no such answer")
    return sum(len(m.content or "") for m in completion if m.role == "assistant") / 10


def turns(completion, **kwargs):
    return sum(m.role == "assistant" for m in completion)


def load_environment(count: int = 4):
    rows = [{"question": f"What is {a} + 1?", "answer": str(a)} for a in range(count)]
    held = Dataset.from_list(rows[:2])
    rubric = vf.Rubric(funcs=[letters, turns], weights=[1.0, 0.5])
    return Echo(
        dataset=Dataset.from_list(rows), eval_dataset=held, system_prompt="Be brief.", rubric=rubric, max_turns=2
    )
