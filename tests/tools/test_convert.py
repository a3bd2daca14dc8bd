"""`posttrain convert`: the same run in our words, and nothing lost in silence."""

from pathlib import Path

import pytest

from posttrain import load, yaml12
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.recipes.convert import convert

SFT = """\
type: sft
micro_batch_size: 2
gradient_accumulation_steps: 4
train_iters: 1k
sequence_parallel_size: 8
activation_checkpoint_cpu_offload: true
kill_switch_path: /tmp/stop
model:
  type: liger
  name_or_path: org/model
  attn_implementation: flash_attention_2
  peft_config: {peft_type: LORA, r: 8, lora_alpha: 16, target_modules: [q_proj], bias: none}
deepspeed:
  zero_optimization: {stage: 3}
  gradient_clipping: 0.5
  bf16: {enabled: true}
data:
  sources:
    - org/chats:train_sft[:1000]
    - {type: huggingface_instruct, name_or_path: org/others, sample_count: 500, role_mapping: {user: messages.role.user}}
  train_eval_split: [0.9, 0.1]
  max_length: 32_000
  pack_samples: true
  num_proc: 16
  repeat_to_pack_max_length: true
logger: {level: INFO, output_dir: logs}
scheduler: {type: wds, num_warmup_steps: 100, num_decay_steps: 450}
optimizer: {learning_rate: 1e-5}
checkpoint:
  - {type: deepspeed, save_every_n_steps: 10, output_dir: resume-here, auto_resume: true}
  - {type: huggingface, save_end_of_training: true, output_dir: exported}
  - {type: huggingface, enabled: false, output_dir: never}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "theirs.yml"
    file.write_text(text)
    return file


def test_a_recipe_means_the_same_run(tmp_path: Path) -> None:
    text, notes = convert(written(tmp_path, SFT))
    ours = tmp_path / "ours.yaml"
    ours.write_text(text)
    run = load(ours)
    assert (run.micro_batch_size, run.gradient_accumulation_steps, run.max_steps, run.max_grad_norm) == (
        2,
        4,
        1000,
        0.5,
    )
    assert run.strategy.config == {"zero_optimization": {"stage": 3}}  # type: ignore[attr-defined]
    assert run.sequence.size == 8  # type: ignore[union-attr]
    model, data = run.model, run.data
    assert model.liger and model.activation_checkpointing and model.offload_activations  # type: ignore[attr-defined]
    assert (model.lora.r, model.lora.alpha, model.lora.kwargs) == (8, 16, {"bias": "none"})  # type: ignore[attr-defined]
    first, second = data.sources  # type: ignore[attr-defined]
    assert (first.name_or_path, first.split, first.max_rows, second.max_rows) == ("org/chats", "train_sft", 1000, 500)
    assert data.eval_split == pytest.approx(0.1)  # type: ignore[attr-defined]
    assert data.packing and data.overflow == "drop" and data.max_length == 32_000  # type: ignore[attr-defined]
    assert (run.optimizer.lr, run.optimizer.weight_decay) == (1e-5, 0.1)  # type: ignore[attr-defined]  # their default
    assert (run.scheduler.warmup, run.scheduler.decay) == (100, 0.5)  # type: ignore[attr-defined]
    assert [type(block).__name__ for block in run.checkpoint] == ["Resume", "HuggingFace"]
    assert run.output_dir == Path("resume-here")
    said = "\n".join(notes)
    for key in ("kill_switch_path", "num_proc", "repeat_to_pack_max_length", "sample_count", "role_mapping"):
        assert key in said
        assert key in text  # also at the head of the file
    assert "logger.level" not in said


def test_their_defaults_are_written_out(tmp_path: Path) -> None:
    text, notes = convert(
        written(tmp_path, "type: dpo\nmodel: {name_or_path: a}\nref_model: {name_or_path: a}\nbeta: 0.2\n")
    )
    made = yaml12.parse(text, lambda line: (line, "")).data
    assert made["optimizer"] == {"lr": 5e-4, "weight_decay": 0.1}
    assert made["scheduler"] == {"type": "linear", "warmup": 0.1}
    assert made["data"]["max_length"] == 8192
    assert made["strategy"]["config"] == {"zero_optimization": {"stage": 2}}
    assert made["model"]["activation_checkpointing"] is True
    assert "reference" not in made  # a copy of the model, as ours is
    assert any(note.startswith("data.sources") for note in notes)  # there are none


def test_what_no_trainer_of_ours_does_is_said(tmp_path: Path) -> None:
    theirs = written(tmp_path, "type: moba\ncode: train.py\ntemperature: 2\nmodel: {name_or_path: a}\n")
    text, notes = convert(theirs)
    assert any(note.startswith("type: 'moba' is no trainer here") for note in notes)
    assert any(note.startswith("temperature: left out") for note in notes)
    assert "temperature: 2" not in text
    with pytest.raises(RecipeError, match="it has no `model`"):
        convert(written(tmp_path, "a: 1\n"))


def test_the_command_writes_a_file_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = written(tmp_path, SFT), tmp_path / "ours.yaml"
    assert main(["convert", str(theirs), "-o", str(ours)]) == 0
    assert "notes at its head" in capsys.readouterr().out
    assert main(["check", str(ours)]) == 0
    assert main(["convert", str(theirs)]) == 0
    assert "type: sft" in capsys.readouterr().out


def test_a_line_of_the_docs_and_other_short_forms_mean_what_they_say(tmp_path: Path) -> None:
    text, _ = convert(written(tmp_path, """\
model: org/model
data: {sources: org/chats}
checkpoint: {type: deepspeed, auto_resume: true}
optimizer: fused_adam
scheduler: cosine
tokenizer: org/other
"""))  # fmt: skip
    made = yaml12.parse(text, lambda line: (line, "")).data
    assert [block["type"] for block in made["checkpoint"]] == ["resume"]
    assert made["data"]["sources"] == [{"name_or_path": "org/chats"}]
    assert (made["scheduler"]["type"], made["tokenizer"]) == ("cosine", {"name_or_path": "org/other"})
    text, _ = convert(written(tmp_path, "model: a\ndata: {sources: [a/b]}\ncheckpoint: huggingface\n"))
    made = yaml12.parse(text, lambda line: (line, "")).data
    assert [block["type"] for block in made["checkpoint"]] == ["huggingface"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data: {sources: [1]}", "data.sources.0: expected a mapping, got 1"),
        ("logger: 5", "logger: expected a mapping, got 5"),
        ("wandb: true", "wandb: expected a mapping, got True"),
        ("deepspeed: ds.json", "deepspeed: expected a mapping, got 'ds.json'"),
        ("data: {train_eval_split: 0.9}", "data.train_eval_split: expected two shares, got 0.9"),
        ("data: {train_eval_split: [a, b]}", "data.train_eval_split: expected a number, got 'a'"),
        ("scheduler: {type: wds, num_warmup_steps: many}", "scheduler.num_warmup_steps: expected a number, got 'many'"),
        ("ref_model: 5", "ref_model: expected a mapping, got 5"),
        ("checkpoint: [[]]", "checkpoint.0: expected a mapping, got []"),
    ],
)  # fmt: skip
def test_what_cannot_be_one_of_their_recipes_is_a_message(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        convert(written(tmp_path, f"model: a\n{line}\n"))
    assert str(error.value).endswith(f"theirs.yml: {message}")
