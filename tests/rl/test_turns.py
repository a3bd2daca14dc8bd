"""Several turns: what the policy said is what is trained, and what it was told is not."""

import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from compare import near
from policies import digest, grpo, replies, share
from ranks import on_two_ranks
from tokens import SPECIAL, byte_tokenizer
from toy import metrics
from transformers import AutoTokenizer

from posttrain import Resume, TransformersSampler, before, block
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.rollouts.ledger import read
from posttrain.blocks.rollouts.replies import Call, Outcome, Turn
from posttrain.blocks.rollouts.turns.calls import HERMES, Convention, convention
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import PosttrainError, RecipeError, TrainingError
from posttrain.synth import ToolEnvironment, tool

STOP = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,")
"""So that a random model ends its turns."""


@block("environment", "test-quiz")
class Quiz:
    """Says how long a turn was, until one is even; that earns something."""

    max_turns: int = 4
    max_tokens: int = 400
    weight: float = 1.0
    specs: list[dict[str, Any]] = []

    def reset(self, row: dict[str, Any]) -> Any:
        asked: list[str] = []

        def step(turn: Turn) -> Outcome:
            asked.append(turn.text)
            if len(asked) > 1 and len(turn.text) % 2 == 0:
                return Outcome(reward=0.5)
            return Outcome([{"role": "user", "content": f"{row['letter']}: {len(turn.text)}"}], 0.25)

        return SimpleNamespace(step=step)


def quiz(folder: Path, model: Path, **keys: Any) -> Any:
    defaults: dict[str, Any] = {
        "environment": Quiz(), "sampler": TransformersSampler(max_new_tokens=8, stop=STOP), "letters": "efgh",
        "max_steps": 1, "rewards": [digest],
    }  # fmt: skip
    return grpo(folder, model, **{**defaults, **keys})


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [one for line in read(folder) for one in line["replies"]]


def test_what_the_policy_said_is_trained_and_what_it_was_told_is_not(tmp_path: Path, tiny_model: Path) -> None:
    grpo_keys: dict[str, Any] = {"beta": 0.05, "updates": 1}
    quiz(tmp_path / "run", tiny_model, **grpo_keys).train()
    (first, *_) = metrics(tmp_path / "run")
    assert first["policy/moved"] == 0.0
    assert first["sampler/gap"] < 1e-5
    assert first["sampler/max_ratio"] < 1 + 1e-4
    assert first["turns"] > 1.2
    assert first["turns/anew"] == 0.0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    drawn = 0
    for line in read(tmp_path / "run"):
        for one in line["replies"]:
            told, said = set(one["told"]), [m for m in one["messages"] if m["role"] == "assistant"]
            drawn += len(one["ids"]) - len(told)
            pieces = spans(one["ids"], told, tokenizer)
            assert [bare(text) for own, text in pieces if own] == [bare(m["content"]) for m in said]
            for (_, text), (own, answer) in itertools.pairwise(pieces):
                if not own:
                    length = len(bare(text))
                    letter = line["row"]["letter"]
                    asks = f"<|im_start|>user\n{letter}: {length}<|im_end|>\n<|im_start|>assistant\n"
                    assert answer in (f"<|im_end|>\n{asks}", f"\n{asks}")
            gained = 0.25 * (len(said) - 1) + (
                0.5 if one["messages"][-1]["role"] == "assistant" and one["ended"] else 0
            )
            assert one["rewards"]["environment"] in (gained, gained + 0.25)
            assert one["reward"] == pytest.approx(one["rewards"]["environment"] + one["rewards"]["test-hash"])
    assert first["supervised_tokens"] == drawn


def bare(text: str) -> str:
    for special in SPECIAL:
        text = text.replace(special, "")
    return text


def spans(ids: list[int], told: set[int], tokenizer: Any) -> list[tuple[bool, str]]:
    """Return the stretches of a reply: whether the policy said it, and its text."""
    found: list[tuple[bool, list[int]]] = []
    for i, token in enumerate(ids):
        if not found or found[-1][0] == (i in told):
            found.append((i not in told, []))
        found[-1][1].append(token)
    return [(own, tokenizer.decode(some)) for own, some in found]


def test_one_turn_with_an_environment_is_as_without(tmp_path: Path, tiny_model: Path) -> None:
    quiz(tmp_path / "with", tiny_model, environment=Quiz(max_turns=1, weight=0.0)).train()
    quiz(tmp_path / "without", tiny_model, environment=None).train()
    assert replies(tmp_path / "with") == replies(tmp_path / "without")


def test_the_curve_does_not_depend_on_the_cut(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 2, "loss_type": "dr_grpo", "updates": 2, "eval_every": 2}
    quiz(tmp_path / "whole", tiny_model, **keys).train()
    cuts = {"1x4": (1, 4, True), "padded": (4, 1, False)}
    for name, (micro, parts, branching) in cuts.items():
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts, "branching": branching}
        quiz(tmp_path / name, tiny_model, **keys, **cut).train()
        found = [
            [{k: v for k, v in x.items() if k != "tokens"} for x in metrics(tmp_path / n)] for n in (name, "whole")
        ]
        near(*found, name)
        assert replies(tmp_path / name) == replies(tmp_path / "whole")


FORGETFUL = TEMPLATES["chatml"].replace(
    "message['content'] + '<|im_end|>'",
    "(message['content'] if loop.last or message['role'] != 'assistant' else '(...)') + '<|im_end|>'",
)
"""A template that leaves out what was said in earlier turns, as those of reasoning models do with thoughts."""


def test_where_the_template_writes_earlier_turns_anew_each_is_a_sample_of_its_own(
    tmp_path: Path, tiny_model: Path
) -> None:
    from posttrain import HFTokenizer

    trainer = quiz(tmp_path / "run", tiny_model, tokenizer=HFTokenizer(chat_template=FORGETFUL))
    last = trainer.train().last
    assert last["turns/anew"] == pytest.approx(last["turns"] - 1)
    assert last["policy/moved"] == 0.0
    assert last["sampler/gap"] < 1e-5
    said = lines_of(tmp_path / "run")
    parts = [part for one in said for part in (*one["earlier"], one)]
    assert not any(part["told"] for part in parts)
    assert last["supervised_tokens"] == sum(len(part["ids"]) for part in parts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    again = [tokenizer.decode(one["prompt"]) for one in said if one["earlier"]]
    assert again
    assert all("<|im_start|>assistant\n(...)<|im_end|>" in prompt for prompt in again)


def test_a_conversation_that_runs_out_of_turns_or_room_is_cut_off_and_counted(tmp_path: Path, tiny_model: Path) -> None:
    for name, environment in {"turns": Quiz(max_turns=2), "room": Quiz(max_tokens=30)}.items():
        last = quiz(tmp_path / name, tiny_model, environment=environment).train().last
        said = lines_of(tmp_path / name)
        assert last["reply/cut_off"] == sum(not one["ended"] for one in said) / len(said) > 0
        assert all(not one["told"] or max(one["told"]) < len(one["ids"]) - 1 for one in said)
        turns = [sum(m["role"] == "assistant" for m in one["messages"]) for one in said]
        assert max(turns) == 2


def test_a_killed_run_goes_on_to_the_same_conversations(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "checkpoint": [Resume(every=2)], "letters": "abcdefgh"}
    whole = quiz(tmp_path / "whole", tiny_model, **keys).train()

    @before("trainer.step")
    def dies(trainer: Any, batches: Any) -> None:
        if trainer.run.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiz(tmp_path / "cut", tiny_model, **keys).train(callbacks=[dies])
    cut = quiz(tmp_path / "cut", tiny_model, **keys).train()
    assert cut.first_step == 2
    assert replies(tmp_path / "cut") == replies(tmp_path / "whole")
    pairs = zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def train_on_ranks(folder: Path, model: str) -> None:
    from strategies import STRATEGIES

    keys: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "devices": 2, "max_steps": 2}
    quiz(folder / "fsdp", Path(model), **keys, strategy=STRATEGIES["fsdp"]).train()


@pytest.mark.slow
def test_two_ranks_converse_like_one(tmp_path: Path, tiny_model: Path) -> None:
    quiz(tmp_path / "one", tiny_model, max_steps=2).train()
    on_two_ranks(tmp_path, "test_turns", f"train_on_ranks(folder, {str(tiny_model)!r})")
    near(metrics(tmp_path / "two" / "fsdp"), metrics(tmp_path / "one"), "fsdp")
    assert replies(tmp_path / "two" / "fsdp") == replies(tmp_path / "one")


def test_conversations_can_be_looked_at(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.cli import main

    quiz(tmp_path / "run", tiny_model).train()
    assert main(["view", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "view.html").read_text()
    assert "[user] e: " in page
    assert "environment 0." in page


# -- tools ----------------------------------------------------------------------------

CALL = '{"name": "adder", "arguments": {"a": 1}}'
LISTS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
WRITES = {
    "hermes": (
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}",
        Convention("<tool_call>", "arguments"),
    ),
    "mistral": (
        "{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ {'name': c.function.name, "
        "'arguments': c.function.arguments, 'id': c.id} | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}"
        "{% endif %}",
        Convention("[TOOL_CALLS]", "arguments"),
    ),
    "llama": (
        '{% for c in m.tool_calls or [] %}{{ \'{"name": "\' + c.function.name + \'", "parameters": \' + '
        "(c.function.arguments | tojson) + '}' }}{% endfor %}",
        Convention("", "parameters"),
    ),
    "none": ("", HERMES),
}


@pytest.mark.parametrize("name", WRITES)
def test_calls_are_read_in_the_way_in_which_the_template_writes_them(name: str) -> None:
    how, wanted = WRITES[name]
    template = (
        LISTS + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}" + how
        + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )  # fmt: skip
    renderer = ChatRenderer(byte_tokenizer(template))
    found = convention(renderer)
    assert found == wanted
    if name == "none":
        return
    calls = [Call("adder", {"a": 1, "b": [2]}), Call("other", {})]
    some = calls[:1] if name == "llama" else calls
    functions = [{"id": "1", "function": {"name": call.name, "arguments": call.arguments}} for call in some]
    ask = {"role": "user", "content": "x"}
    written = renderer.asked({"messages": [ask, {"role": "assistant", "content": "", "tool_calls": functions}]})
    said = written.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    assert found.read(said, said).calls == some
    assert not found.read("just words", "just words").calls


def test_a_form_of_calls_that_is_no_json_is_refused() -> None:
    how = "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}></function>{% endfor %}"
    template = LISTS + "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}" + how + "{% endfor %}"
    with pytest.raises(TrainingError, match="writes tool calls in a form that is not read here"):
        convention(ChatRenderer(byte_tokenizer(template)))


def test_what_is_asked_is_not_lost_in_a_template_that_goes_through_parts() -> None:
    parts = "{% for part in m.content %}{{ part.text if part.type is defined and part.type == 'text' }}{% endfor %}"
    loops = "{% for m in messages %}{{ m.role + ': ' }}" + parts + "{{ '\n' }}{% endfor %}"
    ask = {"messages": [{"role": "user", "content": "What is it?"}]}
    assert ChatRenderer(byte_tokenizer(loops)).asked(ask) == "user: What is it?\n"
    deaf = ChatRenderer(byte_tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}"))
    with pytest.raises(Refused, match="the chat template leaves out the last message"):
        deaf.asked(ask)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("<tool_call>{'a'}</tool_call>", "the call is no JSON"), ("<tool_call>[1]</tool_call>", "the call has no name"),
        ('<tool_call>{"name": "f", "arguments": 3}', "'arguments' is no object"), ("<tool_call>", "the call is no JSON"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_read_says_why(text: str, trouble: str) -> None:
    assert HERMES.read(text, text).trouble.startswith(trouble)


@tool
def adder(a: int, b: int = 0) -> int:
    """Add two numbers.

    Args:
        a: the first one.
        b: the other one.
    """
    if a < 0:
        raise ValueError("no negative numbers")
    if a == 99:
        time.sleep(60)
    return a + b


def test_tools_tell_their_results_and_what_went_wrong() -> None:
    environment = ToolEnvironment(tools=["adder"])
    assert [made["function"]["name"] for made in environment.specs] == ["adder"]
    told = {
        '{"a": 2, "b": 3}': "5", '{"a": -1}': "Error: ValueError: no negative numbers",
        '{"c": 1}': "Error: the arguments do not fit: ", '{"a": 99}': "Error: it took longer than 0.05 s",
    }  # fmt: skip
    for arguments, wanted in told.items():
        block = attrs.evolve(environment, seconds=0.05) if "99" in arguments else environment
        outcome = block.reset({}).step(Turn("", [Call("adder", json.loads(arguments))]))
        (said,) = outcome.messages
        assert (said["role"], said["name"]) == ("tool", "adder")
        assert said["content"].startswith(wanted)
    unknown = environment.reset({}).step(Turn("", [Call("addr", {})]))
    assert unknown.messages[0]["content"] == "Error: there is no tool 'addr'; did you mean 'adder'? (there are: adder)"
    assert environment.reset({}).step(Turn("", [], "no JSON")).messages[0]["content"] == "Error: no JSON"
    assert not environment.reset({}).step(Turn("42")).messages


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"environment": ToolEnvironment(tools=["addr"])}, "there is no tool 'addr'; did you mean 'adder'"),
        ({"environment": None, "rewards": []}, "rewards: give at least one"),
        ({"environment": ToolEnvironment(tools=["adder"]), "rewards": []}, "rewards: give at least one"),
    ],
)
def test_what_contradicts_itself_is_said_before_training(
    tmp_path: Path, tiny_model: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        quiz(tmp_path / "run", tiny_model, **keys).train()


def test_tools_that_the_template_leaves_out_are_refused_unless_the_prompt_says_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    with pytest.raises(PosttrainError, match="the chat template leaves out the tools"):
        quiz(tmp_path / "run", tiny_model, environment=ToolEnvironment(tools=["adder"])).train()
    quiet = ToolEnvironment(tools=["adder"], announce=False)
    assert quiz(tmp_path / "run", tiny_model, environment=quiet).train().last["turns"] == 1.0


def test_a_policy_that_calls_is_told_the_result_and_goes_on(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says what it should: the tokens are drawn elsewhere, and the trainer's log-probabilities are its."""
    from posttrain.blocks.rollouts.in_process import InProcess
    from posttrain.blocks.rollouts.replies import Reply

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [
        f"So: <tool_call>\n{{'name': 1}}<tool_call>{CALL}<|im_end|>",
        f"<tool_call>{CALL}<|im_end|>",
        "1<|im_end|>",
    ]
    seen: list[str] = []

    def says(self: Any, prompts: Any, keys: Any, n: int, temperature: Any = None) -> Any:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        text = turns[min(2, tokenizer.decode(prompts[0]).count("<|im_start|>tool"))]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [[Reply(ids, [-1.0] * len(ids), True) for _ in range(n)] for _ in prompts]

    monkeypatch.setattr(InProcess, "sample", says)
    environment = ToolEnvironment(tools=["adder"], announce=False)
    rewards = [share, digest]
    last = quiz(tmp_path / "run", tiny_model, environment=environment, max_gap=None, rewards=rewards).train().last
    assert last["turns"] == 3.0
    tail = seen[-1].split("<|im_start|>assistant\n", 1)[1]
    assert tail == (
        f"{turns[0]}\n<|im_start|>tool\nError: the call is no JSON: Expecting property name enclosed in double quotes: "
        f"line 2 column 2 (char 17)<|im_end|>\n<|im_start|>assistant\n{turns[1]}\n<|im_start|>tool\n1<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert {one["text"] for one in lines_of(tmp_path / "run") if one["ended"]} == {"1"}


# -- dynamic sampling -----------------------------------------------------------------


def test_flat_groups_are_sampled_anew_as_often_as_they_may(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.registry import lookup

    rare = lookup("reward", "test-share")()
    keys: dict[str, Any] = {
        "environment": None, "rewards": [rare], "letters": "abcdefgh", "micro_batch_size": 8, "group_size": 2
    }  # fmt: skip
    before = quiz(tmp_path / "0", tiny_model, **keys).train().last
    assert "resampled" not in before
    once = {line["prompt"]: [one["ids"] for one in line["replies"]] for line in read(tmp_path / "0")}
    for resample in (1, 6):
        last = quiz(tmp_path / f"{resample}", tiny_model, **keys, resample=resample).train().last
        lines = list(read(tmp_path / f"{resample}"))
        assert max(line["resampled"] for line in lines) <= resample
        assert last["resampled"] == pytest.approx(sum(line["resampled"] for line in lines) / len(lines))
        for line in lines:  # those that differed at once are as they were
            assert ([one["ids"] for one in line["replies"]] == once[line["prompt"]]) is (line["resampled"] == 0)
            assert line["resampled"] == resample or len({one["reward"] for one in line["replies"]}) > 1
    assert before["flat"] > last["flat"]


# -- judges ---------------------------------------------------------------------------


def test_a_judge_scores_replies_and_nothing_is_paid_twice(tmp_path: Path, tiny_model: Path, server: Any) -> None:
    from posttrain.synth import OpenAISynth
    from posttrain.synth.rewards import JudgeReward

    def judged(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        length = len(body["messages"][-1]["content"]) % 6
        said = json.dumps({"rationale": "", "score": length}) if length else "no idea"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return 200, {"id": "c", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    server.answer = judged
    client = OpenAISynth(base_url=server.url, api_key="k", work_dir=tmp_path / "ledger", mode="online")
    judge = JudgeReward(model="j", rubric="Good is what is as long as {letter}.", client=client, asks_again=0)
    keys: dict[str, Any] = {"environment": None, "rewards": [judge, digest], "max_steps": 1}
    last = quiz(tmp_path / "run", tiny_model, **keys).train().last
    paid = server.paid_lines
    assert 0 < last["failed/judge"] < 1
    scores = [one["rewards"].get("judge") for one in lines_of(tmp_path / "run")]
    assert {1.0, 2.0, 3.0, 4.0, 5.0, None} >= set(scores)
    assert len(set(scores)) > 2
    failed = {one["failed"]["judge"] for one in lines_of(tmp_path / "run") if one["failed"]}
    assert failed == {"no score: the reply gives no score on the scale (quality)"}
    quiz(tmp_path / "run", tiny_model, **keys, resume="never").train()
    assert server.paid_lines == paid
    assert [one["rewards"].get("judge") for one in lines_of(tmp_path / "run")] == scores


def test_a_reward_model_on_a_server_scores_replies(tmp_path: Path, tiny_model: Path, server: Any) -> None:
    from posttrain.synth import ModelServerReward, VllmSynth

    def scored(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"data": [{"index": 0, "probs": [len(body["messages"][-1]["content"]) / 4]}], "usage": {}}

    server.answer = scored
    reward = ModelServerReward(model="rm", client=VllmSynth(base_url=server.url, work_dir=tmp_path / "ledger"))
    last = quiz(tmp_path / "run", tiny_model, environment=None, rewards=[reward]).train().last
    said = lines_of(tmp_path / "run")
    assert [one["rewards"]["model-server"] for one in said] == [len(one["text"]) / 4 for one in said]
    assert last["failed"] == 0.0
    assert {path for path, _ in server.bodies} == {"/classify"}


def test_a_judge_without_a_client_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.synth import OpenAISynth
    from posttrain.synth.rewards import JudgeReward

    for client, said in ((None, "say who is asked"), (OpenAISynth(api_key="k"), "batches, which take hours")):
        with pytest.raises(RecipeError, match=f"client: .*{said}"):
            quiz(tmp_path / "run", tiny_model, rewards=[JudgeReward(model="j", rubric="good", client=client)]).train()
