"""`posttrain accept`: how well a speculator drafts, on prompts of a file."""

import json
from pathlib import Path

import pytest
import torch

from posttrain.blocks.models.speculator.network import load_speculator
from posttrain.blocks.models.speculator.speculate import Drafts, speculate
from posttrain.cli import main
from posttrain.recipes import load as recipes


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, sums: Path) -> Path:
    file = tmp_path / "speculator.yaml"
    file.write_text(f"""
type: spec-decode
model: {{name_or_path: {tiny_model}, n_speculator_heads: 2, speculator_width: 32, speculator_scale_input: true}}
data: {{sources: [{sums}], max_length: 64, train_on: [user, assistant]}}
optimizer: {{lr: 1e-2}}
output_dir: {tmp_path / "run"}
accelerator: cpu
max_steps: 10
generate_from: 5
gen_prompt_length: 20
gen_seq_length: 8
""")
    assert recipes.load(file).train().status == "finished"
    return tmp_path / "run"


def test_acceptance_is_measured_printed_and_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}+{n}="}) + "\n" for n in range(4)))
    assert main(["accept", str(run), "--prompts", str(prompts), "--max-new-tokens", "12"]) == 0
    output = capsys.readouterr().out
    assert (run / "acceptance.png").stat().st_size > 1000
    trainer = recipes.load(run / "recipe.yaml")
    hf, speculator = trainer.model.load().eval(), load_speculator(run / "huggingface")  # type: ignore[attr-defined]
    tokenizer = trainer.tokenizer.build(trainer.model)
    total = Drafts([0, 0])
    for n in range(4):
        text = f"<|im_start|>user\n{n}+{n}=<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        total.add(speculate(hf, speculator, ids, 12)[1])
    assert f"{total.tokens_per_step:.2f} tokens per pass of the base model" in output
    assert f"{total.accepted[0] / total.steps:.1%}" in output
    assert "4 prompts" in output


def test_more_drafts_than_heads_and_other_runs_are_refused(
    run: Path, tmp_path: Path, tiny_model: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["accept", str(run), "--prompts", str(sums), "--drafts", "3"]) != 0
    assert "3 drafts in a pass were asked for, and the speculator has 2 heads" in capsys.readouterr().err
    other = tmp_path / "sft"
    other.mkdir()
    (other / "recipe.yaml").write_text(
        f"type: sft\nmodel: {{name_or_path: {tiny_model}}}\ndata: {{sources: [{sums}]}}\n"
    )
    assert main(["accept", str(other), "--prompts", str(sums)]) != 0
    assert "not a speculator" in capsys.readouterr().err
