"""Reward models that see images: packed pairs get the scores that transformers gives each conversation alone."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vision
from test_vision import folder, trained, written
from test_vision_pairs import pairs

import posttrain
from posttrain import HFTokenizer, PreferenceData, RewardModel, RewardTrainer
from posttrain.blocks.images.processor import as_tensor

__all__ = ["folder"]  # a fixture
FAST = ("qwen2_5_vl", "gemma3")
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in vision.FAMILIES]


def alone(tokenizer: Any, model: Any, messages: list[Any], root: Path) -> torch.Tensor:
    """The score that transformers' own processor and network give a conversation."""
    parts = [part for each in messages if isinstance(each["content"], list) for part in each["content"]]
    images = [vision.opened(root / part["path"]) for part in parts if part["type"] == "image"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = dict(tokenizer.images.theirs(text=[text], images=images or None, return_mm_token_type_ids=True))
    known = {
        *inspect.signature(type(model).forward).parameters,
        *inspect.signature(type(model.model).forward).parameters,
    }
    given = {k: as_tensor(v) for k, v in given.items() if k in known and k != "attention_mask"}
    score: torch.Tensor = model(**given, use_cache=False).logits[0, 0]
    return score


@pytest.mark.parametrize("family", EVERY)
def test_packed_scores_are_those_of_each_conversation_alone(folder: Any, tmp_path: Path, family: str) -> None:
    rows = pairs(tmp_path)[:-1]  # the last has its image beside the messages
    source = str(written(tmp_path, rows))
    block = RewardModel(name_or_path=str(folder(family)), train=["language", "projector", "tower"])
    tokenizer = HFTokenizer().build(block)
    network: Any = block.build(None)  # type: ignore[arg-type]
    data = PreferenceData(sources=[source], max_length=1024, cache_dir=tmp_path / "cache")
    (batch,) = data.build(tokenizer, 1, 0, 1, 0).train.one_pass()
    network.base.config.pad_token_id = network.base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    scores = network.eval()(batch)
    asked = [
        alone(tokenizer, theirs, [*row["prompt"], *row[side]], tmp_path)
        for row in rows
        for side in ("chosen", "rejected")
    ]
    expected = torch.stack(asked).view(-1, 2)
    order = scores.detach()[:, 0].argsort(), expected.detach()[:, 0].argsort()  # the rows come in another order
    torch.testing.assert_close(scores[order[0]], expected[order[1]], rtol=1e-5, atol=1e-5)
    assert float((expected[:, 0] - expected[:, 1]).detach().abs().min()) > 1e-3
    (scores.tanh() * torch.tensor([1.0, -2.0])).sum().backward()
    (expected.tanh() * torch.tensor([1.0, -2.0])).sum().backward()
    both = [(p.grad, q.grad) for p, q in zip(network.base.parameters(), theirs.parameters(), strict=True)]
    most = max(float(q.abs().max()) for _, q in both if q is not None)
    for mine, other in both:
        gap = (0 if mine is None else mine) - (0 if other is None else other)
        assert float(torch.as_tensor(gap).abs().max()) <= 1e-5 * most


def test_a_reward_model_that_sees_is_trained_and_goes_on_from_its_export(folder: Any, tmp_path: Path) -> None:
    root = tmp_path / "rows"
    root.mkdir()
    source = str(written(root, pairs(root)))

    def made(name: Any, out: str) -> Any:
        return RewardTrainer(
            model=RewardModel(name_or_path=str(name)), max_steps=3, micro_batch_size=1, accelerator="cpu", logger=[],
            data=PreferenceData(sources=[source], max_length=1024, cache_dir=tmp_path / "cache"), log_every=1,
            optimizer=posttrain.AdamW(lr=1e-2), output_dir=tmp_path / out, checkpoint=[posttrain.HuggingFace()],
        ).train()  # fmt: skip

    run = made(folder("llava"), "one")
    assert run.status == "finished"
    again = made(tmp_path / "one" / "huggingface", "two")
    assert again.last["loss"] < run.last["loss"]
    network = RewardModel(name_or_path=str(tmp_path / "one" / "huggingface")).build(None)  # type: ignore[arg-type]
    assert trained(network) == {"language", "projector"}
    assert network.base.score.weight.requires_grad
    assert (tmp_path / "one" / "huggingface" / "processor_config.json").is_file()


def test_the_head_of_a_reward_model_is_no_layer_for_adapters(folder: Any) -> None:
    pytest.importorskip("peft")
    block = RewardModel(name_or_path=str(folder("llava")), lora=posttrain.LoRA(r=2))
    names = [n for n, p in block.build(None).named_parameters() if p.requires_grad]  # type: ignore[arg-type]
    assert [n for n in names if "score" in n] == ["hf.base_model.model.score.modules_to_save.default.weight"]
    assert any("language_model" in n for n in names)
