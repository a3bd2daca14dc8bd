"""Reinforcement learning from groups of replies: what must be true of it, whatever the model."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import near
from policies import digest, grpo, prompts, replies, share
from ranks import on_two_ranks
from toy import metrics

from posttrain import (
    AdamW,
    HFModel,
    LoRA,
    PromptData,
    Resume,
    TransformersSampler,
    before,
    load,
    reward,
)
from posttrain.blocks.losses.surrogate import LOSSES
from posttrain.blocks.rollouts.ledger import read
from posttrain.errors import PosttrainError, RecipeError, TrainingError


@reward("test-brief")
def brief(prompt: str, reply: str, row: dict[str, Any]) -> bool:
    return len(reply) < 8


# -- what is said ---------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_at_first_nothing_has_moved(tmp_path: Path, tiny_model: Path, lora: Any) -> None:
    grpo(tmp_path / "run", tiny_model, beta=0.05, lora=lora, max_steps=1).train()
    (first, *_) = metrics(tmp_path / "run")
    assert first["policy/moved"] == 0.0
    assert first["policy/clipped"] == 0.0
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["sampler/kl"] < 1e-7
    assert first["sampler/max_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert first["sampler/gap"] < 1e-5  # what the sampler said of its tokens is what the trainer says
    assert 0 < first["entropy"] < math.log(261) + 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_trainer_computes_at_the_temperature_of_the_sampler(
    tmp_path: Path, tiny_model: Path, temperature: float
) -> None:
    sampler = TransformersSampler(max_new_tokens=8, temperature=temperature)
    run = grpo(tmp_path / "run", tiny_model, sampler=sampler, max_steps=1).train()
    assert run.last["sampler/gap"] < 1e-5


def test_replies_do_not_depend_on_what_is_sampled_beside_them(tmp_path: Path, tiny_model: Path) -> None:
    for name, keys in {
        "whole": {}, "cut": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        "few": {"sampler": TransformersSampler(max_new_tokens=8, rows=4)},
    }.items():  # fmt: skip
        grpo(tmp_path / name, tiny_model, letters="abcdefgh", optimizer=AdamW(lr=1e-12), **keys).train()
    assert replies(tmp_path / "whole") == replies(tmp_path / "cut") == replies(tmp_path / "few")
    assert len(replies(tmp_path / "whole")) == 8
    every = [tuple(ids) for *_, group in replies(tmp_path / "whole") for ids in group]
    assert len(set(every)) == len(every)


def test_equal_prompts_of_a_step_get_different_replies(tmp_path: Path, tiny_model: Path) -> None:
    file = prompts(tmp_path / "same", "e")
    trainer = grpo(tmp_path / "run", tiny_model, max_steps=1)
    trainer.data = PromptData(sources=[file], cache_dir=tmp_path / "cache")
    trainer.train()
    groups = [group for *_, group in replies(tmp_path / "run")]
    assert len(groups) == 4
    assert groups[0] != groups[1]


def test_a_reply_ends_at_a_stop_text_or_is_cut_off(tmp_path: Path, tiny_model: Path) -> None:
    sampler = TransformersSampler(max_new_tokens=40, stop=["a", "bc"], temperature=3.0)
    grpo(tmp_path / "run", tiny_model, sampler=sampler, group_size=16, max_steps=1).train()
    said = [one for line in read(tmp_path / "run") for one in line["replies"]]
    stopped = [one for one in said if "a" in one["text"]]
    assert stopped
    assert all(one["ended"] and one["text"].index("a") == len(one["text"]) - 1 for one in stopped)
    assert all(len(one["ids"]) == 40 for one in said if not one["ended"])
    (first,) = metrics(tmp_path / "run")[:1]
    assert first["reply/cut_off"] == pytest.approx(sum(not one["ended"] for one in said) / len(said))


def test_nothing_is_learned_from_what_was_cut_off_if_so_said(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match="has anything to learn from"):
        grpo(tmp_path / "run", tiny_model, mask_truncated=True, sampler=TransformersSampler(max_new_tokens=1)).train()


def test_a_sampler_that_is_not_the_model_in_training_ends_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.blocks.rollouts.in_process import InProcess

    said = InProcess.sample
    trainer = grpo(tmp_path / "run", tiny_model)
    monkeypatch.setattr(InProcess, "sample", lambda self, *given: said(self, *given[:3], 5.0))
    monkeypatch.setattr("posttrain.blocks.rollouts.in_process.drawn", lambda x, u, t: _of_another(x, u, t))
    with pytest.raises(TrainingError, match=r"step 1: log-probabilities of sampler and trainer differ by .*max_gap"):
        trainer.train()


def _of_another(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> Any:
    tokens = torch.distributions.Categorical(logits=torch.zeros_like(logits)).sample()
    return tokens, torch.full((len(tokens),), -3.0)


# -- the curve ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_the_curve_does_not_depend_on_the_cut_or_on_branching(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    keys: dict[str, Any] = {"loss_type": loss, "beta": 0.05, "updates": 2, "entropy": 0.01, "correction": "token"}
    grpo(tmp_path / "whole", tiny_model, **keys).train()
    cuts = {"2x2": (2, 2, True), "1x4": (1, 4, True), "padded": (4, 1, False)}
    for name, (micro, parts, branching) in cuts.items():
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts, "branching": branching}
        grpo(tmp_path / name, tiny_model, **keys, **cut).train()
        drop = {"tokens"}
        lines = [
            [{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / n)]
            for n in (name, "whole")
        ]
        near(*lines, name)


KEYS: dict[str, Any] = {
    "beta": 0.05, "updates": 2, "eval_every": 2, "advantage": "batch_std", "rewards": [share, digest], "letters": "eaioeaio"
}  # fmt: skip
TWO = ("ddp", "fsdp", "zero-3")


def train_on_ranks(folder: Path, model: str, lora: bool) -> None:
    """With every strategy: two prompts on each of two ranks."""
    from strategies import STRATEGIES

    for name in TWO:
        if name in STRATEGIES:
            grpo(
                folder / name, Path(model), **KEYS, micro_batch_size=1, gradient_accumulation_steps=2,
                strategy=STRATEGIES[name], devices=2, lora=LoRA(r=2) if lora else None,
            ).train()  # fmt: skip


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_train_like_one_under_every_strategy(tmp_path: Path, tiny_model: Path, lora: bool) -> None:
    grpo(tmp_path / "one", tiny_model, **KEYS, lora=LoRA(r=2) if lora else None).train()
    on_two_ranks(tmp_path, "test_grpo", f"train_on_ranks(folder, {str(tiny_model)!r}, {lora})")
    done = [name for name in TWO if (tmp_path / "two" / name).exists()]
    assert "fsdp" in done
    for name in done:
        near(metrics(tmp_path / "two" / name), metrics(tmp_path / "one"), name)
        assert replies(tmp_path / "two" / name) == replies(tmp_path / "one")


def test_it_learns(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 25, "optimizer": AdamW(lr=1e-2), "group_size": 16, "rewards": [share]}
    run = grpo(tmp_path / "run", tiny_model, eval_every=25, **keys).train()
    rewards = [line["reward"] for line in metrics(tmp_path / "run") if "reward" in line]
    assert sum(rewards[-5:]) / 5 > 4 * (sum(rewards[:3]) / 3) + 0.1
    assert run.last["eval_reward"] > 0.2
    assert "eval_loss" not in run.last  # it measures rewards, no loss


def test_the_likeliest_replies_are_evaluated_if_so_said(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 1, "eval_every": 1, "optimizer": AdamW(lr=1e-12)}

    def found(seed: int, **more: Any) -> float:
        folder = tmp_path / f"{seed} {more}"
        return grpo(folder, tiny_model, **keys, **more, seed=seed).train().last["eval_reward"]  # type: ignore[no-any-return]

    assert found(1, eval_temperature=0.0) == pytest.approx(found(2, eval_temperature=0.0, eval_samples=3))
    assert found(1) != found(2)
    lines = list(read(tmp_path / "1 {}", "evaluations"))
    assert [(line["step"], len(line["replies"])) for line in lines] == [(1, 1)] * 4
    assert sum(line["replies"][0]["reward"] for line in lines) / 4 == pytest.approx(found(1))


# -- rewards --------------------------------------------------------------------------


def test_rewards_are_added_up_by_weight_and_each_is_logged(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.registry import lookup

    kinds = {name: lookup("reward", name) for name in ("test-share", "test-brief")}
    parts = [kinds["test-share"](weight=2.0), kinds["test-brief"](weight=-0.5), kinds["test-brief"](weight=0.0)]
    last = grpo(tmp_path / "run", tiny_model, rewards=parts, max_steps=1).train().last
    assert last["reward/test-brief"] == last["reward/test-brief #2"]
    assert last["reward"] == pytest.approx(2 * last["reward/test-share"] - 0.5 * last["reward/test-brief"], abs=1e-6)
    for line in read(tmp_path / "run"):
        for one in line["replies"]:
            assert one["reward"] == pytest.approx(2 * one["rewards"]["test-share"] - 0.5 * one["rewards"]["test-brief"])


def test_a_reward_that_raises_is_counted_and_named_and_teaches_nothing(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.registry import lookup

    failing = lookup("reward", "test-share")(fail_on="!")
    last = grpo(tmp_path / "run", tiny_model, letters="ee!!", rewards=[failing, digest], max_steps=1).train().last
    assert last["failed"] == last["failed/test-share"] == 0.5
    assert last["failed/test-hash"] == 0.0
    for line in read(tmp_path / "run"):
        for one in line["replies"]:
            bad = line["row"]["letter"] == "!"
            assert one["failed"] == ({"test-share": "ValueError: no such letter"} if bad else {})
            assert (one["reward"] is None) is bad
            assert one["advantage"] == 0.0 or not bad
    with pytest.raises(TrainingError, match="no reply has a reward.*test-share: ValueError: no such letter"):
        grpo(tmp_path / "all", tiny_model, letters="!!!!", rewards=[failing], max_steps=1).train()


@pytest.mark.parametrize("letters", ["e!", "!e"])
def test_a_reward_may_fail_in_some_micro_batches_alone(tmp_path: Path, tiny_model: Path, letters: str) -> None:
    from posttrain.registry import lookup

    failing = lookup("reward", "test-share")(fail_on="!")
    cut: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    last = grpo(tmp_path / "run", tiny_model, letters=letters, rewards=[failing, digest], **cut).train().last
    assert last["failed/test-share"] == last["failed"] == 0.5


@reward("test-odd")
def odd(prompt: str, reply: str, row: dict[str, Any], *, how: str = "nan") -> Any:
    if how == "hangs":
        try:
            time.sleep(60)
        except Exception:
            return 1.0
    return {"nan": math.nan, "text": "1", "none": None, "infinite": math.inf}[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [("nan", "it returned nan"), ("text", "it returned '1'"), ("none", "it returned None, which is no number"),
     ("infinite", "it returned inf"), ("hangs", "it took longer than 0.05 s")],
)  # fmt: skip
def test_a_reward_that_hangs_or_gives_no_number_is_named(tmp_path: Path, tiny_model: Path, how: str, said: str) -> None:
    from posttrain.registry import lookup

    bad = lookup("reward", "test-odd")(how=how, seconds=0.05)
    with pytest.raises(TrainingError, match=f"test-odd: {said}"):
        grpo(tmp_path / "run", tiny_model, rewards=[bad], group_size=2, max_steps=1).train()


def test_what_is_verified_in_data_generation_is_a_reward(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.synth import VerifyReward

    with pytest.raises(RecipeError, match="there is no verifier 'numbr'; did you mean 'number'"):
        grpo(tmp_path / "run", tiny_model, rewards=[VerifyReward(function="numbr")]).train()
    right = VerifyReward(function="exact", wanted="letter", name="right")
    last = grpo(tmp_path / "run", tiny_model, rewards=[right, digest], max_steps=1).train().last
    assert last["reward/right"] == 0.0
    assert last["failed"] == 0.0
    missing = VerifyReward(function="number", wanted="nowhere")
    with pytest.raises(PosttrainError, match="nowhere"):
        grpo(tmp_path / "missing", tiny_model, rewards=[missing], max_steps=1).train()


def test_a_reward_model_judges_what_was_said(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain import ModelReward

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for made in (judge, tokenizer):
        made.save_pretrained(tmp_path / "judge")
    block = ModelReward(name_or_path=str(tmp_path / "judge"), batch_size=3)
    grpo(tmp_path / "run", tiny_model, rewards=[block], max_steps=1).train()
    for line in read(tmp_path / "run"):
        for one in line["replies"]:
            chat = [{"role": "user", "content": line["row"]["prompt"]}, {"role": "assistant", "content": one["text"]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                assert one["reward"] == pytest.approx(judge.eval()(input_ids=ids).logits.item(), abs=1e-5)


def test_what_was_said_can_be_looked_at(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.cli import main
    from posttrain.registry import lookup

    failing = lookup("reward", "test-share")(fail_on="!")
    grpo(
        tmp_path / "run", tiny_model, letters="e!", micro_batch_size=2, rewards=[failing, digest], eval_every=2
    ).train()
    assert main(["view", str(tmp_path / "run"), "--step", "2"]) == 0
    page = (tmp_path / "run" / "view.html").read_text()
    assert page.count("4 replies") == 2
    assert "ValueError: no such letter" in page
    assert "say e:" in page
    assert main(["view", str(tmp_path / "run"), "--step", "7"]) == 2
    assert "nothing was said in step 7: " in capsys.readouterr().err


# -- recipes, and going on ------------------------------------------------------------


def test_it_is_trained_from_a_recipe_with_rewards_of_ones_own(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path, "eeee")
    Path("mine.py").write_text(
        "from posttrain import policy_loss, reward\n\n\n@reward('recipe-vowels')\n"
        "def vowels(prompt, reply, row, *, letters: str = 'aeiou'):\n"
        "    return sum(map(reply.count, letters)) / (1 + len(reply))\n\n\n"
        "@policy_loss('recipe-loss')\ndef plain(new, old, advantages, replies):\n"
        "    return -advantages * (new - old).exp()\n"
    )
    Path("recipe.yaml").write_text(
        f"type: grpo\ncode: mine.py\nmodel: {{name_or_path: {tiny_model}}}\ndata: {{sources: [prompts.jsonl]}}\n"
        "rewards:\n- {type: recipe-vowels, letters: aou, weight: 2}\n- {type: verify, function: exact, wanted: letter}\n"
        "loss_type: recipe-loss\nsampler: {max_new_tokens: 4}\nmax_steps: 1\nlogger: []\noutput_dir: run\n"
    )
    last = load("recipe.yaml").train().last
    assert "reward/recipe-vowels" in last
    assert "reward/verify" in last
    assert load("run/recipe.yaml", ["output_dir=again"]).train().last["reward"] == last["reward"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"loss_type": "grop"}, "loss_type: there is no policy loss 'grop'; did you mean 'grpo'"),
        ({"loss_type": "rloo", "clip_low": 0.1}, "clip_low: rloo takes no 'clip_low'"),
        ({"loss_args": {"delat": 3.0}}, "loss_args: dapo takes no 'delat'; did you mean 'delta'"),
        ({"group_size": 1}, "group_size: the advantage 'group_std' compares a reply with others"),
        ({"reference": HFModel(name_or_path="x")}, "reference: has no use while beta is 0"),
    ],
)
def test_what_contradicts_itself_is_said_before_training(
    tmp_path: Path, tiny_model: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        grpo(tmp_path / "run", tiny_model, **keys).train()


def test_a_prompt_that_is_too_long_is_named_or_left_out(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "so " * n, "letter": "e"}) + "\n" for n in (1, 2, 99)))
    trainer = grpo(tmp_path / "run", tiny_model, max_steps=1)
    for overflow, said in (("error", "raise data.max_length, or set data.overflow to drop$"), ("drop", "")):
        trainer.data = PromptData(sources=[file], cache_dir=tmp_path / "cache", max_length=64, overflow=overflow)
        if said:
            with pytest.raises(PosttrainError, match=said):
                trainer.train()
    assert trainer.train().loaders.ledger["total"]["documents"] == 2


def test_a_conversation_is_asked_without_its_reply(tmp_path: Path, tiny_model: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    rows = [
        {"messages": [*chat, {"role": "assistant", "content": "4"}], "letter": "e"},
        {"question": "2+2?", "answer": "4", "system": "Be brief.", "letter": "e"},
        {"prompt": chat, "letter": "e"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = grpo(tmp_path / "run", tiny_model, micro_batch_size=3, max_steps=1)
    trainer.data = PromptData(sources=[file], cache_dir=tmp_path / "cache")
    trainer.train()
    lines = list(read(tmp_path / "run"))
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert {line["text"] for line in lines} == {asked}
    assert any("answer" in line["row"] for line in lines)  # which rewards may compare with


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "columns 'text' hold no prompt .known: messages"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "holds no question: there is nothing to answer"),
        ({"prompt": "say <|im_end|>"}, "holds the control token <|im_end|>"),
    ],
)
def test_a_row_that_asks_nothing_is_refused(tmp_path: Path, tiny_model: Path, row: dict[str, Any], said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n")
    trainer = grpo(tmp_path / "run", tiny_model, max_steps=1)
    trainer.data = PromptData(sources=[file], cache_dir=tmp_path / "cache")
    with pytest.raises(PosttrainError, match=said.replace("<|", "<.").replace("|>", ".>")):
        trainer.train()


def test_a_killed_run_goes_on_to_the_same_weights_and_replies(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"letters": "abcdefghij", "max_steps": 6, "beta": 0.05, "checkpoint": [Resume(every=2)]}
    whole = grpo(tmp_path / "whole", tiny_model, **keys).train()

    @before("trainer.step")
    def dies(trainer: Any, batches: Any) -> None:
        if trainer.run.step == 4:
            with (trainer.run.output_dir / "rollouts.jsonl").open("a") as file:
                file.write('{"step": 5, "half a li')  # as a kill may leave it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path / "cut", tiny_model, **keys).train(callbacks=[dies])
    assert len(replies_of_lines(tmp_path / "cut")) > len(replies_until(tmp_path / "whole", 4))
    cut = grpo(tmp_path / "cut", tiny_model, **keys).train()
    assert cut.first_step == 4
    assert replies(tmp_path / "cut") == replies(tmp_path / "whole")
    pairs = zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    grpo(tmp_path / "cut", tiny_model, **(keys | {"max_steps": 1, "resume": "never"})).train()
    assert {line["step"] for line in read(tmp_path / "cut")} == {1}


def replies_of_lines(folder: Path) -> list[str]:
    return (folder / "rollouts.jsonl").read_text().splitlines()


def replies_until(folder: Path, step: int) -> list[Any]:
    return [one for one in replies(folder) if one[0] <= step]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_models_of_mamba_layers_alone_go_on_from_what_they_have_read(tmp_path: Path, kind: str) -> None:
    from tokens import byte_tokenizer
    from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

    from posttrain.blocks.tokenizers.templates import TEMPLATES

    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    keys: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = MambaConfig(**keys) if kind == "mamba" else Mamba2Config(**keys, num_heads=4, head_dim=16, n_groups=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    last = grpo(tmp_path / "run", tmp_path / "model", letters="efgh", max_steps=1).train().last
    assert last["sampler/gap"] < 1e-5
    assert last["policy/moved"] == 0.0
