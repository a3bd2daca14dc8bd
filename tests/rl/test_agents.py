"""Agents ask the policy over HTTP; what it says to them is trained by its tokens, as everything that is sampled."""

import asyncio
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from compare import near
from policies import digest, grpo, replies
from ranks import on_two_ranks
from toy import metrics
from transformers import AutoTokenizer

from posttrain import Resume, TransformersSampler, agent, before, block
from posttrain.blocks.rollouts.agents.agent import Agent
from posttrain.blocks.rollouts.ledger import read
from posttrain.blocks.rollouts.replies import Outcome, Turn
from posttrain.errors import TrainingError
from posttrain.registry import lookup

STOP = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,")

CLIENT = httpx.Client(timeout=60)
"""Of all agents: one that is made anew takes 50 ms."""


def ask(base_url: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Ask as a client does; errors of the server raise."""
    body = {"model": "m", "messages": messages, **more}
    answer = CLIENT.post(f"{base_url}/chat/completions", json=body)
    if answer.status_code != 200:
        raise ValueError(answer.json()["error"]["message"])
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


@agent("test-quiz-agent")
def quizzes(row: dict[str, Any], base_url: str, *, slow: bool = False) -> float:
    """Says how long a turn was, until one is even; that earns something."""
    messages, earned = [{"role": "user", "content": row["prompt"]}], 0.0
    for n in range(1, 5):
        if slow:
            time.sleep(random.random() / 50)
        choice = ask(base_url, messages, temperature=0.3, max_tokens=1000)
        said = choice["message"]["content"]
        if choice["finish_reason"] == "length":
            return earned
        if n > 1 and len(said) % 2 == 0:
            return earned + 0.5
        messages += [
            {"role": "assistant", "content": said}, {"role": "user", "content": f"{row['letter']}: {len(said)}"},
        ]  # fmt: skip
        earned += 0.25
    return earned


@block("environment", "test-quiz-stepped")
class Stepped:
    """The same, as an environment that answers turns."""

    max_turns: int = 4
    max_tokens: int = 4096
    weight: float = 1.0
    specs: list[dict[str, Any]] = []

    def reset(self, row: dict[str, Any]) -> Any:
        asked: list[str] = []

        class Episode:
            def step(self, turn: Turn) -> Outcome:
                asked.append(turn.text)
                if len(asked) > 1 and len(turn.text) % 2 == 0:
                    return Outcome(reward=0.5)
                return Outcome([{"role": "user", "content": f"{row['letter']}: {len(turn.text)}"}], 0.25)

        return Episode()


def played(folder: Path, model: Path, environment: Any = "test-quiz-agent", **keys: Any) -> Any:
    made = (
        lookup("environment", environment)(**keys.pop("options", {})) if isinstance(environment, str) else environment
    )
    defaults: dict[str, Any] = {
        "sampler": TransformersSampler(max_new_tokens=8, stop=STOP), "letters": "efgh", "max_steps": 1,
        "rewards": [digest],
    }  # fmt: skip
    return grpo(folder, model, environment=made, **{**defaults, **keys})


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [one for line in read(folder) for one in line["replies"]]


def test_an_agent_trains_what_was_said_and_not_what_was_told(tmp_path: Path, tiny_model: Path) -> None:
    played(tmp_path / "run", tiny_model, beta=0.05).train()
    (first,) = metrics(tmp_path / "run")
    assert first["policy/moved"] == 0.0
    assert first["sampler/gap"] < 1e-5
    assert first["turns"] > 1.2
    assert first["turns/anew"] == 0.0
    said = lines_of(tmp_path / "run")
    assert first["supervised_tokens"] == sum(len(one["ids"]) - len(one["told"]) for one in said)
    assert any(one["told"] for one in said)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for one in said:
        turns = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
        own = tokenizer.decode(
            [t for i, t in enumerate(one["ids"]) if i not in set(one["told"])], skip_special_tokens=True
        )
        assert own == "".join(turns)
        assert one["text"] == turns[-1]
        assert one["rewards"]["environment"] >= 0.25 * (len(turns) - 1)


def test_an_agent_is_trained_as_an_environment_that_does_the_same(tmp_path: Path, tiny_model: Path) -> None:
    """Both conversations are made of the same tokens, given the same draws."""
    played(tmp_path / "agent", tiny_model).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for line in read(tmp_path / "agent"):
        for one in line["replies"]:
            episode = Stepped().reset(line["row"])
            earned, told = 0.0, []
            turns = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
            for n, text in enumerate(turns):
                if n == len(turns) - 1 and not one["ended"]:
                    break
                outcome = episode.step(Turn(text))
                earned += outcome.reward
                told += outcome.messages
            assert one["rewards"]["environment"] == pytest.approx(earned)
            heard = tokenizer.decode([t for i, t in enumerate(one["ids"]) if i in set(one["told"])])
            assert all(m["content"] in heard for m in told[: len(turns) - 1])
            assert one["prompt"] is None


def test_the_speed_of_agents_and_how_many_play_at_a_time_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    played(tmp_path / "whole", tiny_model).train()
    played(tmp_path / "slow", tiny_model, options={"slow": True, "concurrency": 3}).train()
    assert replies(tmp_path / "slow") == replies(tmp_path / "whole")


def test_the_curve_does_not_depend_on_the_cut(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 2, "loss_type": "dr_grpo", "eval_every": 2}
    played(tmp_path / "whole", tiny_model, **keys).train()
    cut: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "branching": False}
    played(tmp_path / "cut", tiny_model, **keys, **cut).train()
    found = [[{k: v for k, v in x.items() if k != "tokens"} for x in metrics(tmp_path / n)] for n in ("cut", "whole")]
    near(*found, "cut")
    assert replies(tmp_path / "cut") == replies(tmp_path / "whole")


def test_a_killed_run_goes_on_to_the_same_episodes(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "checkpoint": [Resume(every=2)]}
    whole = played(tmp_path / "whole", tiny_model, **keys).train()

    @before("trainer.step")
    def dies(trainer: Any, batches: Any) -> None:
        if trainer.run.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        played(tmp_path / "cut", tiny_model, **keys).train(callbacks=[dies])
    cut = played(tmp_path / "cut", tiny_model, **keys).train()
    assert replies(tmp_path / "cut") == replies(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True))


@agent("test-forgets")
async def forgets(row: dict[str, Any], base_url: str) -> bool:
    """Asks a second question without the first one, and a third that goes on with the first; two side by side."""
    async with httpx.AsyncClient(timeout=60) as client:

        async def said(messages: list[dict[str, Any]]) -> str:
            body = {"model": "m", "messages": messages}
            answer = await client.post(f"{base_url}/chat/completions", json=body)
            return str(answer.json()["choices"][0]["message"]["content"])

        first = [{"role": "user", "content": row["prompt"]}]
        one, other = await asyncio.gather(said(first), said([{"role": "user", "content": "something else"}]))
        tail = [{"role": "assistant", "content": one}, {"role": "user", "content": other}]
        await said([*first, *tail])
        return len(one) > len(other)


def test_what_does_not_go_on_with_a_conversation_begins_another_and_all_are_trained(
    tmp_path: Path, tiny_model: Path
) -> None:
    last = played(tmp_path / "run", tiny_model, "test-forgets").train().last
    assert last["turns"] == 3.0
    assert last["turns/anew"] == 1.0
    assert last["policy/moved"] == 0.0
    assert last["sampler/gap"] < 1e-5
    said = lines_of(tmp_path / "run")
    parts = [part for one in said for part in (*one["earlier"], one)]
    assert last["supervised_tokens"] == sum(len(part["ids"]) - len(part["told"]) for part in parts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    others = [tokenizer.decode(part["prompt"]) for part in parts if part["prompt"] is not None]
    assert len(others) == len(said)
    assert all("something else" in prompt for prompt in others)


@agent("test-troubled")
def troubled(row: dict[str, Any], base_url: str) -> Any:
    """Fails in one way for each letter."""
    first = [{"role": "user", "content": row["prompt"]}]
    if row["letter"] == "e":
        return 1.0
    said = ask(base_url, first)["message"]
    if row["letter"] == "f":
        raise RuntimeError("no luck")
    if row["letter"] == "g":
        return float("nan")
    if row["letter"] == "h":
        threading.Event().wait(3600)
    while row["letter"] == "i":
        first += [said, {"role": "user", "content": "more"}]
        said = ask(base_url, first)["message"]
    return 0.5


def test_agents_that_fail_are_counted_and_named_and_nothing_is_learned_from_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    options = {"timeout": 1.0, "max_turns": 3}
    keys: dict[str, Any] = {"letters": "efghij", "micro_batch_size": 6}
    last = played(tmp_path / "run", tiny_model, "test-troubled", options=options, **keys).train().last
    lines = {line["row"]["letter"]: line["replies"] for line in read(tmp_path / "run")}
    reasons = {letter: {one["failed"].get("environment") for one in some} for letter, some in lines.items()}
    assert reasons == {
        "e": {"it did not ask the policy anything"}, "f": {"RuntimeError: no luck"}, "g": {"it returned nan"},
        "h": {"it asked nothing for 1 s"}, "i": {None}, "j": {None},
    }  # fmt: skip
    assert last["failed/environment"] == pytest.approx(4 / 6)
    assert all(one["reward"] is None and not one["advantage"] for letter in "efgh" for one in lines[letter])
    assert {(one["ended"], one["rewards"]["environment"]) for one in lines["i"]} == {(False, 0.0)}


@agent("test-refused")
def refused(row: dict[str, Any], base_url: str) -> float:
    """Asks what cannot be answered, and remembers what it was told."""
    user = {"role": "user", "content": "x"}
    bodies: dict[str, Any] = {
        "n": {"messages": [user], "n": 2}, "stop": {"messages": [user], "stop": ["."]}, "none": {},
        "json": {"messages": [user], "response_format": {"type": "json_object"}},
        "forced": {"messages": [user], "tool_choice": "required"},
        "role": {"messages": [{"role": "nobody", "content": "x"}]},
        "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
        "long": {"messages": [{"role": "user", "content": "x" * 500}]},
        "tools": {"messages": [user], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    }  # fmt: skip
    for name, body in bodies.items():
        answer = CLIENT.post(f"{base_url}/chat/completions", json=body)
        REFUSED[name] = answer.status_code, answer.json()["error"]["message"]
    REFUSED["path"] = CLIENT.post(f"{base_url}/responses", json={}).status_code, "-"
    REFUSED["models"] = 200, CLIENT.get(f"{base_url}/models").json()["data"][0]["id"]
    return float(len(ask(base_url, [user])["message"]["content"]))


REFUSED: dict[str, tuple[int, str]] = {}


def test_what_cannot_be_answered_is_refused_in_words(tmp_path: Path, tiny_model: Path) -> None:
    played(tmp_path / "run", tiny_model, "test-refused", options={"max_tokens": 200}, letters="e").train()
    assert {name: code for name, (code, _) in REFUSED.items()} == {
        **dict.fromkeys(REFUSED, 400), "path": 404, "models": 200,
    }  # fmt: skip
    said = {name: message for name, (_, message) in REFUSED.items()}
    assert said["n"] == "n cannot be used here: ask several times"
    assert said["stop"].startswith("stop cannot be used here: a reply ends where")
    assert said["none"] == "the request has no messages"
    assert said["json"].startswith("response_format cannot be used here")
    assert said["forced"].startswith("tool_choice can only be auto or none")
    assert "nobody" in said["role"]
    assert said["image"].startswith("there are images in the conversation")
    assert "may have 200 (max_tokens)" in said["long"]
    assert said["tools"].startswith("the chat template leaves out the tools")
    assert said["models"] == "policy"


TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' "
    "+ (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + "
    "'\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECS = [{"type": "function", "function": {"name": "adder", "description": "add", "parameters": {"type": "object"}}}]


@agent("test-caller")
def calls(row: dict[str, Any], base_url: str) -> float:
    """Runs the tools that the policy calls, with the client of OpenAI, streamed and not."""
    import openai

    client, turns = openai.OpenAI(base_url=base_url, api_key="none"), 0
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    while True:
        turns += 1
        if turns == 2:
            with client.chat.completions.stream(model="m", messages=messages, tools=SPECS) as stream:  # type: ignore[arg-type]
                message = stream.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(model="m", messages=messages, tools=SPECS).choices[0].message  # type: ignore[arg-type]
        if not message.tool_calls:
            return float(message.content == "3" and turns == 3)
        messages.append(message.model_dump())
        for call in message.tool_calls:
            total = sum(json.loads(call.function.arguments).values())
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(total)})


def test_tools_are_called_in_the_way_of_the_template_by_the_client_of_openai(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    from posttrain import HFTokenizer
    from posttrain.blocks.rollouts.in_process import InProcess
    from posttrain.blocks.rollouts.replies import Reply

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    said = ['Well.\n<tool_call>\n{"name":  "adder", "arguments": {"a": 1}}\n</tool_call>', "3"]
    said.insert(1, said[0].replace('"a": 1', '"a": 1, "b": 2'))
    seen: list[str] = []

    def says(self: Any, prompts: Any, keys: Any, n: int, temperature: Any = None) -> Any:
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        seen.extend(texts)
        found = [tokenizer(said[text.count("<|im_start|>tool")] + "<|im_end|>")["input_ids"] for text in texts]
        return [[Reply(ids, [-1.0] * len(ids), True)] for ids in found]

    monkeypatch.setattr(InProcess, "sample", says)
    keys: dict[str, Any] = {"max_gap": None, "tokenizer": HFTokenizer(chat_template=TOOLS), "letters": "e"}
    last = played(tmp_path / "run", tiny_model, "test-caller", **keys).train().last
    assert last["reward/environment"] == 1.0
    assert last["turns"] == 3.0
    assert last["turns/anew"] == 0.0  # it called in a spelling of its own, which stays
    assert seen[-1].count(said[0]) == 1
    assert seen[-1].endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")
    (one, *_) = lines_of(tmp_path / "run")
    assert [m["role"] for m in one["messages"]] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert one["messages"][1]["tool_calls"][0]["function"] == {"name": "adder", "arguments": {"a": 1}}


def test_an_agent_as_a_class_and_without_a_reward_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    @block("environment", "test-class-agent")
    class Polite(Agent):
        """Asks politely."""

        please: str = "please"

        def play(self, row: dict[str, Any], base_url: str) -> None:
            ask(base_url, [{"role": "user", "content": f"{row['prompt']} {self.please}"}])

    last = played(tmp_path / "run", tiny_model, Polite(weight=0.0)).train().last
    assert "reward/environment" not in last
    assert last["failed"] == 0.0
    assert last["reward"] == last["reward/test-hash"]


def test_a_sampler_that_fails_ends_the_run_and_not_only_the_agents(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.blocks.rollouts.in_process import InProcess

    def fails(*_: Any) -> Any:
        raise TrainingError("the server is gone")

    monkeypatch.setattr(InProcess, "sample", fails)
    with pytest.raises(TrainingError, match="the server is gone"):
        played(tmp_path / "run", tiny_model).train()


def train_on_ranks(folder: Path, model: str) -> None:
    from strategies import STRATEGIES

    keys: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "devices": 2, "max_steps": 2}
    played(folder / "fsdp", Path(model), **keys, strategy=STRATEGIES["fsdp"]).train()


@pytest.mark.slow
def test_agents_on_two_ranks_play_like_those_on_one(tmp_path: Path, tiny_model: Path) -> None:
    played(tmp_path / "one", tiny_model, max_steps=2).train()
    on_two_ranks(tmp_path, "test_agents", f"train_on_ranks(folder, {str(tiny_model)!r})")
    near(metrics(tmp_path / "two" / "fsdp"), metrics(tmp_path / "one"), "fsdp")
    assert replies(tmp_path / "two" / "fsdp") == replies(tmp_path / "one")
