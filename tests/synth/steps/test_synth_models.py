"""Reward models, and a model in this process."""

from pathlib import Path
from typing import Any

import pytest
from synth_server import last
from through import Row

from posttrain.synth import (
    Generate,
    Pipeline,
    Reward,
    TransformersSynth,
    VllmSynth,
)


def test_rewards_of_a_server_are_raw_logits(server: Any, tmp_path: Path) -> None:
    logits = {"short": -0.2, "a long answer": 1.5}
    server.answer = lambda body: (200, {"data": [{"index": 0, "probs": [logits[last(body)]]}], "usage": {}})
    made = VllmSynth(base_url=server.url, work_dir=tmp_path)
    rows = [{"prompt": "p", "response": text} for text in logits]
    report = Pipeline([Reward(model="rm")]).run(rows, made, "t")
    assert [row["score"] for row in report.rows()] == [-0.2, 1.5]
    assert all(path == "/classify" and body["use_activation"] is False for path, body in server.bodies)


def test_rewards_of_a_model_in_this_process_are_those_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    folder = tmp_path / "rm"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "p" * i, "response": "r" * (7 - i)} for i in range(1, 6)]
    local = TransformersSynth(name_or_path=str(folder), work_dir=tmp_path / "w", batch_size=2)
    scores = [row["score"] for row in Pipeline([Reward()]).run(rows, local, "t").rows()]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for row, score in zip(rows, scores, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        assert score == pytest.approx(float(model(**ids).logits[0, 0].detach()), abs=1e-5)


def test_a_model_in_this_process_answers_the_same_wherever_it_was_stopped(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}"} for i in range(10)]
    steps = Pipeline([Generate(body={"max_tokens": 8})])

    def run(folder: str, **more: Any) -> list[Row]:
        made = TransformersSynth(name_or_path=str(tiny_model), work_dir=tmp_path / folder, batch_size=4, device="cpu")
        return list(steps.run(rows, made, "t", **more).rows())

    whole = run("a")
    assert len({row["response"] for row in whole}) > 5  # sampled, not greedy

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.done >= 4:
            raise Stop

    with pytest.raises(Stop):
        run("b", progress=stop)
    assert run("b") == whole


def test_a_model_that_was_trained_further_answers_anew(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    first = TransformersSynth(name_or_path=str(folder), work_dir=tmp_path / "w").namespace
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(folder)
    assert TransformersSynth(name_or_path=str(folder), work_dir=tmp_path / "w").namespace != first
