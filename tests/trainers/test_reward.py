"""Reward models: the Bradley-Terry loss, the same however a step is cut, and what is exported gives the same scores."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_metrics, assert_same_run
from toy import MARGINS, losses, metrics, network, pair, trainer

from posttrain.blocks.layout import collate_pairs
from posttrain.blocks.models.model import LoRA, RewardModel
from posttrain.blocks.optimizer import AdamW
from posttrain.errors import RecipeError, TrainingError
from posttrain.trainers.reward import RewardTrainer


def reward(folder: Path, **keys: Any) -> RewardTrainer:
    keys = {"rows": 60, "max_steps": 5, **keys}
    made: RewardTrainer = trainer(folder, RewardTrainer, **keys)
    return made


def test_the_loss_is_that_of_its_equations(tmp_path: Path) -> None:
    pairs = [pair(seed) for seed in range(5)]
    batch = collate_pairs([pairs], columns=MARGINS)
    made = reward(tmp_path, center_rewards=0.1)
    logged: dict[str, float] = {}
    made.run = type("Run", (), {})()  # type: ignore[assignment]
    made.run.log = lambda **values: logged.update(values)  # type: ignore[method-assign,assignment]
    scores = torch.tensor([[1.0, 0.5], [0.0, 2.0], [3.0, -1.0], [0.5, 0.5], [-1.0, -2.0]])
    made.run.model = lambda batch: scores  # type: ignore[assignment]
    expected = [
        -math.log(1 / (1 + math.exp(-(c - r - p.values["margins"])))) + 0.1 * (c + r) ** 2
        for (c, r), p in zip(scores.tolist(), pairs, strict=True)
    ]
    assert any(p.values["margins"] for p in pairs)
    assert made.loss(batch).item() == pytest.approx(sum(expected) / 5, abs=1e-6)
    assert float(logged["rewards/accuracy"]) == pytest.approx(3.5 / 5)  # a tie is half a win
    assert float(logged["rewards/margin"]) == pytest.approx((0.5 - 2 + 4 + 0 + 1) / 5)


@pytest.mark.parametrize("packing", [True, False])
def test_cutting_a_step_changes_neither_loss_nor_metrics(tmp_path: Path, packing: bool) -> None:
    keys = {"packing": packing, "eval_rows": 11, "eval_every": 2}
    whole = reward(tmp_path / "whole", micro_batch_size=4, **keys).train()
    cut = reward(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4, **keys).train()
    assert_same_run(whole, cut)
    assert_same_metrics(tmp_path / "whole", tmp_path / "cut")


def test_packed_pairs_train_like_padded_ones(tmp_path: Path) -> None:
    rows = reward(tmp_path / "rows", rows=30).data.build(None, 1, 0, 1, 42).train.rows(1)
    packed = reward(tmp_path / "packed", rows=30, micro_batch_size=rows).train()
    padded = reward(tmp_path / "padded", rows=30, packing=False, micro_batch_size=30).train()
    assert_same_run(packed, padded)


def test_it_learns_which_side_is_chosen(tmp_path: Path) -> None:
    reward(tmp_path, rows=600, max_steps=120, optimizer=AdamW(lr=1e-2), eval_rows=40, eval_every=1).train()
    found = [m["eval_rewards/accuracy"] for m in metrics(tmp_path)]
    assert found[0] < 0.7
    assert found[-1] > 0.8


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    rows = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": "no idea"} for a in range(6) for b in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    file = tmp_path / "reward.yaml"
    file.write_text(f"""
type: reward
model: {{name_or_path: {tiny_model}}}
data: {{sources: [{tmp_path / "pairs.jsonl"}], max_length: 64}}
optimizer: {{lr: 1e-2}}
output_dir: {tmp_path / "run"}
accelerator: cpu
max_steps: 6
micro_batch_size: 2
""")
    return file


def test_what_is_exported_gives_the_same_scores_in_transformers(recipe: Path, tmp_path: Path) -> None:
    """A batch padded on the right and single conversations; the text is what the chat template makes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain.recipes import load as recipes

    run = recipes.load(recipe, []).train()
    folder = tmp_path / "run" / "huggingface"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    served = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert served.config.num_labels == 1
    batch = next(iter(run.loaders.train.one_pass()))
    ours = run.model.module.eval()(batch).flatten()
    ids, lengths = batch["input_ids"].flatten(), torch.diff(batch["ends"], prepend=torch.tensor([-1]))
    found = zip(batch["ends"].tolist(), lengths.tolist(), strict=True)
    texts = [tokenizer.decode(ids[end - length + 1 : end + 1]) for end, length in found][:6]
    asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, padding_side="right")
    with torch.no_grad():
        together = served(**asked).logits[:, 0]
        alone = [served(**tokenizer(t, return_tensors="pt", add_special_tokens=False)).logits[0, 0] for t in texts]
    torch.testing.assert_close(ours[: len(texts)], together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_a_conversation_that_ends_with_padding_is_refused(recipe: Path, tmp_path: Path) -> None:
    """transformers would read the score off the token before."""
    from posttrain.recipes import load as recipes

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template)
    overrides = [f"tokenizer.chat_template={tmp_path / 't.jinja'}", "tokenizer.pad_token=<|im_end|>"]
    with pytest.raises(TrainingError, match="ends with the tokenizer's padding token.*tokenizer.pad_token"):
        recipes.load(recipe, overrides).train()
    overrides[1] = "tokenizer.pad_token=nothing"
    with pytest.raises(RecipeError, match=r"tokenizer.pad_token: .* has no token 'nothing'"):
        recipes.load(recipe, overrides).train()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_rewards_are_those_of_transformers_for_every_architecture(kind: str) -> None:
    config = {"model_type": kind} | ({"head_dim": 8} if kind == "qwen3" else {})
    net = network(RewardModel, config=config).build(None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    pairs = [pair(seed) for seed in range(4)]
    ours = net(collate_pairs([pairs[:2], pairs[2:]])).flatten()
    sides = [torch.tensor(ids)[None] for p in pairs for ids, _ in p.documents]
    net.hf.set_attn_implementation("eager")
    theirs = torch.cat([net.hf(input_ids=ids, use_cache=False).logits[:, 0] for ids in sides])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_adapters_and_the_head_are_trained_and_the_rest_is_not(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = reward(tmp_path, model={"lora": LoRA(r=4)}, optimizer=AdamW(lr=1e-2), overfit_first_batch=True).train()
    trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert all("lora" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
