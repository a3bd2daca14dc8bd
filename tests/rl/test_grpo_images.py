"""Reinforcement learning with images: what is true of text is true of prompts with pictures, beside others without."""

import base64
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
import vision
from compare import near
from PIL import Image
from policies import digest, replies
from ranks import on_two_ranks
from toy import metrics

import posttrain
from posttrain import (
    JSONL,
    AdamW,
    Constant,
    GRPOTrainer,
    HFModel,
    LoRA,
    OnlineDPOTrainer,
    OnPolicyDistillTrainer,
    PromptData,
    Resume,
    TransformersSampler,
    before,
)
from posttrain.blocks.images.processor import as_tensor
from posttrain.blocks.rollouts.ledger import read
from posttrain.errors import DataError, RecipeError, TrainingError

EVERY = [f if f in ("qwen2_5_vl", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in vision.FAMILIES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the tiny models are."""
    return vision.models(tmp_path_factory)


def grpo(folder: Path, model: Path, method: Any = GRPOTrainer, **keys: Any) -> Any:
    source = vision.prompts(folder.parent / "rows")
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(),
        "logger": [JSONL()], "checkpoint": [], "log_every": 1, "rewards": [digest], "accelerator": "cpu",
        "output_dir": folder, "sampler": TransformersSampler(max_new_tokens=8), "group_size": 3,
    }  # fmt: skip
    keys = {name: value for name, value in {**defaults, **keys}.items() if value is not None}
    network = HFModel(name_or_path=str(model), **keys.pop("network", {}))
    more = {"sources": [source], "eval_sources": [source], "cache_dir": folder.parent / "cache"}
    data = PromptData(**(more | keys.pop("data", {})))
    return method(model=network, data=data, **keys)


@pytest.mark.parametrize("lora", [None, pytest.param(LoRA(r=2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", EVERY)
def test_at_first_nothing_has_moved(tmp_path: Path, model: Any, family: str, lora: Any) -> None:
    run = grpo(tmp_path / "run", model(family), beta=0.05, network={"lora": lora}, max_steps=1).train()
    assert run.loaders.ledger["total"]["images"] == 4
    assert run.last["policy/moved"] == 0.0
    assert run.last["kl"] == pytest.approx(0.0, abs=1e-9)
    assert run.last["sampler/gap"] < 1e-5
    assert run.last["sampler/max_ratio"] == pytest.approx(1.0, abs=1e-4)
    (batch,) = run.batches
    assert batch.counted["images"] == 3 * 4
    if family == "qwen2_5_vl":  # those of the three replies to a prompt are seen once
        assert len(batch.branch.arguments["images"].values["image_grid_thw"]) == 4


@pytest.mark.parametrize("family", EVERY)
def test_the_curve_does_not_depend_on_the_cut_or_on_branching(tmp_path: Path, model: Any, family: str) -> None:
    parts = ["language", "projector", "tower"]
    keys: dict[str, Any] = {"beta": 0.05, "updates": 2, "eval_every": 2, "optimizer": AdamW(lr=1e-4)}
    cuts: dict[str, Any] = {"whole": (4, 1, True), "1x4": (1, 4, True), "padded": (2, 2, False)}
    for name, (rows, times, branching) in cuts.items():
        cut = {"micro_batch_size": rows, "gradient_accumulation_steps": times, "branching": branching}
        grpo(tmp_path / name, model(family), network={"train": parts}, **keys, **cut).train()
        lines = [
            [{k: v for k, v in line.items() if k != "tokens"} for line in metrics(tmp_path / n)]
            for n in (name, "whole")
        ]
        near(*lines, name)
        assert replies(tmp_path / name) == replies(tmp_path / "whole")


@pytest.mark.parametrize("family", EVERY)
def test_the_likeliest_replies_are_those_of_transformers(tmp_path: Path, model: Any, family: str) -> None:
    run = grpo(
        tmp_path / "run", model(family), eval_every=1, eval_temperature=0.0, optimizer=AdamW(lr=1e-12), max_steps=1
    ).train()
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(model(family)).eval()
    processor, place = run.tokenizer.images.theirs, vision.PLACES[family]
    found = {line["row"]["answer"]: line["replies"][0]["ids"] for line in read(tmp_path / "run", "evaluations")}
    asked = {
        "a": (f"{place} what?", [0]),
        "b": ("say no", []),
        "c": (f"{place}this?", [2]),
        "d": (f"{place} or {place}?", [1, 3]),
    }
    for name, (text, numbers) in asked.items():
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        images = [vision.opened(tmp_path / "rows" / f"{n}.png") for n in numbers]
        given = run.tokenizer([prompt], return_tensors="np")
        if images:
            given = processor(text=[prompt], images=images, return_tensors=run.tokenizer.images.made_as)
        given = {key: as_tensor(value) for key, value in given.items()}
        with torch.no_grad():
            said = theirs.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert said.tolist()[: len(found[name])] == found[name], name


def test_another_picture_is_answered_otherwise(tmp_path: Path, model: Any) -> None:
    said = {}
    for name, number in (("one", 0), ("same", 0), ("other", 7)):
        run = grpo(tmp_path / name / "run", model("gemma3"), max_steps=1)
        vision.picture(number, vision.SIZES[0]).save(tmp_path / name / "rows" / "0.png")
        run.train()
        said[name] = {
            line["row"]["answer"]: [one["ids"] for one in line["replies"]] for line in read(tmp_path / name / "run")
        }
    assert said["one"] == said["same"]
    assert said["one"]["a"] != said["other"]["a"]
    assert said["one"]["b"] == said["other"]["b"]


def test_a_placeholder_that_the_policy_says_ends_its_reply(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands for no image, neither in the reply nor for those that stand behind it in the batch."""
    from posttrain.blocks.rollouts import in_process

    drawn, image = in_process.drawn, vision.config_of("qwen2_5_vl", vision.tokenizer_of("qwen2_5_vl")).image_token_id

    def says_images(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> Any:
        tokens, _ = drawn(logits, uniform, temperature)
        tokens = torch.where(uniform < 0.3, image, tokens)
        return tokens, (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(in_process, "drawn", says_images)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "no image"}) + "\n")
    for name, keys in {
        "branching": {}, "padded": {"branching": False}, "text": {"data": {"sources": [text], "eval_sources": []}},
    }.items():  # fmt: skip
        run = grpo(tmp_path / name, model("qwen2_5_vl"), max_steps=1, **keys).train()
        assert run.last["sampler/gap"] < 1e-5
        said = [one for line in read(tmp_path / name) for one in line["replies"]]
        ended = [one for one in said if image in one["ids"]]
        assert ended
        assert all(one["ended"] and one["ids"].index(image) == len(one["ids"]) - 1 for one in ended)


def test_what_is_written_down_names_images_and_holds_none(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.cli import main

    seen: list[Any] = []

    @posttrain.block("reward", "test-sees")
    class Sees:
        weight: float = 1.0
        name: str = ""

        def build(self, run: Any) -> Any:
            return lambda samples: seen.extend(samples) or [float(n) for n in range(len(samples))]

    grpo(tmp_path / "run", model("idefics3"), rewards=[Sees()], max_steps=1).train()
    written_down = (tmp_path / "run" / "rollouts.jsonl").read_text()
    png = (tmp_path / "rows" / "2.png").read_bytes()
    assert base64.b64encode(png).decode()[:40] not in written_down
    lines = {line["row"]["answer"]: line for line in read(tmp_path / "run")}
    named = hashlib.sha256(png).hexdigest()
    assert lines["c"]["images"] == [{"hash": named, "size": [33, 57]}]
    assert lines["c"]["row"]["messages"][0]["content"][0] == {"type": "image", "base64": {"hash": named}}
    assert [Path(one["path"]).name for one in lines["d"]["images"]] == ["1.png", "3.png"]
    assert "images" not in lines["b"]
    assert lines["d"]["text"].count("<image>") == 2  # one token for each, not all that the network sees
    samples = {sample.row["answer"]: sample for sample in seen}
    assert [picture.size for picture in samples["d"].images] == [(64, 64), (96, 40)]
    assert samples["a"].messages[0]["content"][0]["path"] == str(tmp_path / "rows" / "0.png")
    assert main(["view", str(tmp_path / "run"), "--step", "1"]) == 0
    page = (tmp_path / "run" / "view.html").read_text()
    assert f"image 33x57: in the row, {named}" in page
    assert f"image 40x24: {tmp_path / 'rows' / '0.png'}" in page


def test_a_killed_run_goes_on_to_the_same_weights_and_replies(tmp_path: Path, model: Any) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "micro_batch_size": 2, "beta": 0.05, "checkpoint": [Resume(every=2)]}
    whole = grpo(tmp_path / "whole", model("qwen2_5_vl"), **keys).train()

    @before("trainer.step")
    def dies(trainer: Any, batches: Any) -> None:
        if trainer.run.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path / "cut", model("qwen2_5_vl"), **keys).train(callbacks=[dies])
    cut = grpo(tmp_path / "cut", model("qwen2_5_vl"), **keys).train()
    assert cut.first_step == 2
    assert replies(tmp_path / "cut") == replies(tmp_path / "whole")
    pairs = zip(whole.model.parameters(), cut.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def train_on_ranks(folder: Path, model: str) -> None:
    """Two prompts on each of two ranks: at times only one of them has images."""
    from strategies import STRATEGIES

    for name in ("ddp", "fsdp"):
        cut = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "devices": 2, "strategy": STRATEGIES[name]}
        grpo(folder / name, Path(model), beta=0.05, eval_every=2, optimizer=AdamW(lr=1e-4), **cut).train()


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path: Path, model: Any) -> None:
    grpo(tmp_path / "one", model("qwen2_5_vl"), beta=0.05, eval_every=2, optimizer=AdamW(lr=1e-4)).train()
    on_two_ranks(tmp_path, "test_grpo_images", f"train_on_ranks(folder, {str(model('qwen2_5_vl'))!r})")
    for name in ("ddp", "fsdp"):
        near(metrics(tmp_path / "two" / name), metrics(tmp_path / "one"), name)
        assert replies(tmp_path / "two" / name) == replies(tmp_path / "one")


def test_text_is_not_lost_in_a_template_that_goes_through_parts(tmp_path: Path, model: Any) -> None:
    """As those of many such models do: of a content that is one text, they would write nothing."""
    parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
        "<start_of_image>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = []
    for template in (None, parts):
        tokenizer = posttrain.HFTokenizer(chat_template=template)
        grpo(tmp_path / str(len(found)), model("gemma3"), tokenizer=tokenizer, max_steps=1).train()
        found.append([line["text"] for line in read(tmp_path / str(len(found)))])
    assert any("say no" in text for text in found[0])
    assert found[0] == found[1]


def test_a_judge_is_shown_the_images(tmp_path: Path, model: Any, server: Any) -> None:
    from posttrain.synth import OpenAISynth
    from posttrain.synth.rewards import JudgeReward

    seen: dict[str, list[str]] = {}

    def judged(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        question = next(name for name in ("what?", "say no", "this?", " or ") if name in parts[0]["text"])
        seen[question] = [part["image_url"]["url"] for part in parts[1:]]
        said = {"role": "assistant", "content": json.dumps({"rationale": "", "score": len(parts)})}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        return 200, {"id": "c", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    server.answer = judged
    client = OpenAISynth(base_url=server.url, api_key="k", work_dir=tmp_path / "ledger", mode="online")
    judge = JudgeReward(model="j", rubric="Good is what is right.", client=client)
    last = grpo(tmp_path / "run", model("gemma3"), rewards=[judge], max_steps=1).train().last
    assert last["failed/judge"] == 0.0
    assert {question: len(urls) for question, urls in seen.items()} == {"what?": 1, "say no": 0, "this?": 1, " or ": 2}
    for question, number in (("what?", 0), ("this?", 2)):
        sent = Image.open(io.BytesIO(base64.b64decode(seen[question][0].partition(",")[2]))).convert("RGB")
        assert sent.tobytes() == vision.opened(tmp_path / "rows" / f"{number}.png").tobytes()


# -- what cannot be -------------------------------------------------------------------


class TextAlone:
    """A sampler of one's own, written for text."""

    max_new_tokens, temperature = 4, 1.0

    def build(self, run: Any) -> Any:
        class Speaker:
            def sample(self, prompts: Any, keys: Any, n: int, temperature: float | None = None) -> Any:
                raise AssertionError("it is not asked")

        return Speaker()


class Echo:
    """An environment."""

    max_turns, max_tokens, specs, weight = 2, 64, [], 0.0

    def reset(self, row: dict[str, Any]) -> Any:
        raise AssertionError("it is not asked")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sampler": TextAlone()}, "sampler: it takes text alone, and the data holds images"),
        ({"environment": Echo()}, "environment: the data holds images, and a conversation of several turns takes none"),
        (
            {"rewards": [posttrain.ModelReward(name_or_path="JUDGE")]},
            "rewards: `type: model` reads text alone, and the data",
        ),
    ],
)
def test_what_takes_text_alone_refuses_images_in_one_line(
    tmp_path: Path, model: Any, tiny_model: Path, keys: dict[str, Any], said: str, stream: bool
) -> None:
    if "rewards" in keys:
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        judge.save_pretrained(tmp_path / "judge")
        transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "judge")
        keys = {"rewards": [posttrain.ModelReward(name_or_path=str(tmp_path / "judge"))]}
    trainer = grpo(tmp_path / "run", model("gemma3"), max_steps=1, **keys)
    if stream:  # of which nothing is known at the start
        sources = [posttrain.Source(name_or_path=str(tmp_path / "rows" / "prompts.jsonl"), stream=True)]
        trainer.data = PromptData(sources=sources, cache_dir=tmp_path / "cache")
    with pytest.raises(TrainingError if stream else RecipeError, match=said) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_model_of_text_refuses_prompts_with_images(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match="3 x there are images, and the model sees none"):
        grpo(tmp_path / "run", tiny_model).train()


def test_plain_text_has_no_place_for_images(tmp_path: Path, model: Any) -> None:
    trainer = grpo(tmp_path / "run", model("gemma3"), max_steps=1)
    (tmp_path / "rows" / "prompts.jsonl").write_text(json.dumps({"text": "so", "image": "0.png"}) + "\n")
    trainer.data = attrs.evolve(trainer.data, text_column="text", eval_sources=[])
    with pytest.raises(DataError, match="there are images, and plain text .data.text_column. has no place for them"):
        trainer.train()
    (tmp_path / "rows" / "prompts.jsonl").write_text(json.dumps({"text": "so"}) + "\n")
    assert trainer.train().last["sampler/gap"] < 1e-5


# -- others that sample ---------------------------------------------------------------


def test_pairs_and_students_see_the_images_of_prompts(tmp_path: Path, model: Any) -> None:
    run = grpo(tmp_path / "pairs", model("gemma3"), OnlineDPOTrainer, max_steps=1).train()
    assert run.last["preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.batches[0].counted["images"] == 8
    keys: dict[str, Any] = {"rewards": None, "group_size": None, "teacher": HFModel(name_or_path=str(model("gemma3")))}
    run = grpo(tmp_path / "student", model("gemma3"), OnPolicyDistillTrainer, max_steps=1, **keys).train()
    assert run.last["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert run.batches[0].counted["images"] == 4
    keys["sampler"] = TextAlone()
    with pytest.raises(RecipeError, match="sampler: it takes text alone"):
        grpo(tmp_path / "text", model("gemma3"), OnPolicyDistillTrainer, **keys).train()
    trainer = grpo(
        tmp_path / "replies",
        model("gemma3"),
        OnPolicyDistillTrainer,
        max_steps=1,
        **(keys | {"sampler": TransformersSampler()}),
    )
    chat = json.dumps({"prompt": "<image>?", "completion": "yes", "images": ["0.png"]})
    (tmp_path / "rows" / "prompts.jsonl").write_text(chat + "\n")
    for stream in (False, True):
        source = posttrain.Source(name_or_path=str(tmp_path / "rows" / "prompts.jsonl"), stream=stream)
        trainer.data = posttrain.SFTData(sources=[source], cache_dir=tmp_path / "cache")
        with pytest.raises(
            (RecipeError, TrainingError), match="data: it holds images, and the student is shown those of"
        ):
            trainer.train()


# -- tools ----------------------------------------------------------------------------


def recipe(folder: Path, model: Path, **keys: Any) -> Path:
    said = {
        "type": "grpo", "model": {"name_or_path": str(model)}, "rewards": [{"type": "verify", "function": "exact", "wanted": "answer"}],
        "data": {"type": "prompts", "sources": [str(vision.prompts(folder))]}, "sampler": {"max_new_tokens": 8},
        "accelerator": "cpu", "max_steps": 2, "output_dir": str(folder / "run"), **keys,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(said))
    return folder / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("family", vision.FAMILIES)
def test_the_twin_of_a_recipe_samples_with_images(tmp_path: Path, model: Any, family: str) -> None:
    from posttrain.tools.twin import proofs

    checks = [proofs.masks, proofs.cuts, proofs.first_loss, proofs.memory]
    found = list(proofs.prove(recipe(tmp_path, model(family), beta=0.1), [], checks))
    assert [(one.name, one.figure) for one in found if not one.passed] == []


@pytest.mark.slow
def test_the_whole_twin_of_online_dpo_passes_with_images(tmp_path: Path, model: Any) -> None:
    from posttrain.tools.twin import proofs

    file = recipe(tmp_path, model("qwen2_5_vl"), type="online-dpo", checkpoint=[{"type": "huggingface"}])
    found = list(proofs.prove(file, []))
    assert [(one.name, one.figure) for one in found if one.passed is False] == []


def test_a_twin_says_what_its_own_sampler_would_hide(tmp_path: Path, model: Any) -> None:
    from posttrain.tools.twin import proofs

    sampler = {"type": "vllm-server", "base_url": "http://localhost:1"}
    (found,) = proofs.prove(recipe(tmp_path, model("gemma3"), sampler=sampler), [], [proofs.masks])
    assert found.passed is False
    assert found.figure.startswith("sampler: it takes text alone, and the data holds images")


@pytest.mark.slow
@pytest.mark.parametrize("method", [GRPOTrainer, OnlineDPOTrainer])
def test_a_plan_counts_what_the_images_of_prompts_take(tmp_path: Path, model: Any, method: Any) -> None:
    from posttrain.tools.tracing import trace

    def taken(**data: Any) -> int:
        trainer = grpo(
            tmp_path / "run",
            model("qwen3_vl"),
            method,
            data={"max_length": 64, **data},
            network={"train": ["language", "tower", "projector"]},
        )
        return sum(alive for _, alive in trace(trainer).moments)

    with_images = taken()
    (tmp_path / "rows" / "text.jsonl").write_text(json.dumps({"prompt": "say no"}) + "\n")
    assert with_images > taken(sources=[str(tmp_path / "rows" / "text.jsonl")])
