"""The loop: the same result however a step is cut, and the order of what it does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_run
from toy import losses, metrics, trainer

import posttrain.hooks as hooks
from posttrain.batch import Batch
from posttrain.blocks.callbacks import EarlyStop
from posttrain.blocks.checkpoints.checkpoint import Resume
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.scheduler import Linear
from posttrain.errors import RecipeError, TrainingError
from posttrain.trainers.sft import SFTTrainer


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_cutting_a_step_into_micro_batches_changes_nothing(
    tmp_path: Path, packing: bool, micro: int, accumulate: int
) -> None:
    whole = trainer(tmp_path / "1x8", packing=packing, micro_batch_size=1, gradient_accumulation_steps=8).train()
    cut = trainer(
        tmp_path / "cut", packing=packing, micro_batch_size=micro, gradient_accumulation_steps=accumulate
    ).train()
    assert_same_run(whole, cut)


def test_packed_rows_train_like_their_documents_alone(tmp_path: Path) -> None:
    """All documents in every step: then packed and padded steps see the same ones."""
    packed = trainer(tmp_path / "packed", rows=40, micro_batch_size=1, gradient_accumulation_steps=1)
    rows = packed.data.build(None, 1, 0, 1, 42).train.rows(1)
    packed = trainer(tmp_path / "packed", rows=40, micro_batch_size=rows).train()
    padded = trainer(tmp_path / "padded", rows=40, micro_batch_size=10, gradient_accumulation_steps=4, packing=False)
    assert_same_run(packed, padded.train())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_gives_the_same_training(tmp_path: Path, attention: str) -> None:
    ours = trainer(tmp_path / "ours").train()
    theirs = trainer(tmp_path / "theirs", model={"attn_implementation": attention}).train()
    assert_same_run(ours, theirs)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain").train()
    assert_same_run(plain, trainer(tmp_path / "recomputed", model={"activation_checkpointing": True}).train())


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own ways
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", max_steps=3).train()
    assert_same_run(plain, trainer(tmp_path / "compiled", max_steps=3, model={"compile": "aot_eager"}).train())


def test_a_step_equals_plain_pytorch(tmp_path: Path) -> None:
    """The first step's loss and gradient norm against a loop written out here."""
    made = trainer(tmp_path, max_steps=1, micro_batch_size=2, gradient_accumulation_steps=3)
    seen: list[Batch] = []

    @hooks.before("trainer.step")
    def keep(trainer: SFTTrainer, batches: list[Batch]) -> None:
        seen.extend(batches)
        made.reference = {k: v.clone() for k, v in trainer.run.model.module.hf.state_dict().items()}  # type: ignore[attr-defined]

    run = made.train(callbacks=[keep])
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in made.model.config.items() if k != "model_type"}))
    model.load_state_dict(made.reference)  # type: ignore[attr-defined]
    total, count = torch.zeros(()), 0
    for batch in seen:
        begin = 0
        ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        for length in batch["seqlens"].tolist():
            part = slice(begin, begin + length)
            logits = model(input_ids=ids[None, part]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[part][1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels[part][1:] != -100).sum())
            begin += length
    loss = total / count
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert run.last["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert run.last["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert run.last["supervised_tokens"] == count


def test_metrics_logged_in_the_loss_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    @hooks.after("trainer.loss")
    def share_of_even_targets(trainer: SFTTrainer, loss: torch.Tensor) -> None:
        trainer.run.log(even=(trainer.batch["targets"] % 2 == 0).float().mean())  # type: ignore[attr-defined]

    @hooks.before("trainer.loss")
    def remember(trainer: SFTTrainer, batch: Batch) -> None:
        trainer.batch = batch  # type: ignore[attr-defined]

    curves = []
    for micro, accumulate in ((4, 1), (1, 4)):
        folder = tmp_path / f"{micro}"
        cut = trainer(folder, micro_batch_size=micro, gradient_accumulation_steps=accumulate, eval_rows=7, eval_every=4)
        cut.train(callbacks=[remember, share_of_even_targets])
        curves.append([(m["even"], m.get("eval_loss", 0), m.get("eval_even", 0)) for m in metrics(folder)])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_the_order_in_a_step_is_fetch_step_count_evaluate_log_save(tmp_path: Path) -> None:
    happened: list[str] = []

    def note(name: str) -> Any:
        def marked(owner: Any, *args: Any, **kwargs: Any) -> None:
            happened.append(name)

        return marked

    targets = {"step": "trainer.step", "count": "trainer.count", "eval": "trainer.evaluate", "save": "trainer.save"}
    callbacks = [hooks.before(target)(note(name)) for name, target in targets.items()]

    made = trainer(tmp_path, max_steps=2, eval_rows=5, eval_every=1)
    made.train(callbacks=callbacks)
    assert happened == ["step", "count", "eval", "save"] * 2 + ["save"]


def test_horizon_and_intervals_count_optimizer_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=None, epochs=2, packing=False, rows=20, micro_batch_size=2,
                  gradient_accumulation_steps=4, eval_rows=5, eval_every=2).train()  # fmt: skip
    assert run.max_steps == run.step == 5  # 40 rows, 8 a step
    assert [m["step"] for m in metrics(tmp_path) if "eval_loss" in m] == [2, 4, 5]
    assert run.epoch == 2


def test_a_callback_can_end_the_run_early(tmp_path: Path) -> None:
    @hooks.after("trainer.step")
    def enough(trainer: SFTTrainer, loss: torch.Tensor) -> None:
        if trainer.run.step == 2:  # the third step
            trainer.run.stop = "good enough"

    run = trainer(tmp_path, max_steps=8).train(callbacks=[enough])
    assert (run.step, run.status) == (3, "finished")
    assert (tmp_path / "huggingface").is_dir()


def test_early_stop_waits_for_a_metric_that_has_stopped_falling_and_survives_a_restart(tmp_path: Path) -> None:
    keys = {"eval_rows": 5, "eval_every": 1, "optimizer": AdamW(lr=1e-9), "max_steps": 20}
    stop = EarlyStop(patience=3)
    whole = trainer(tmp_path / "whole", callbacks=[stop], **keys).train()
    assert "has not fallen below" in (whole.stop or "")
    trainer(tmp_path / "cut", callbacks=[stop], stop_after=whole.step - 1, **keys).train()
    again = trainer(tmp_path / "cut", callbacks=[stop], **keys).train()
    assert (again.first_step, again.step) == (whole.step - 1, whole.step)


def test_overfitting_the_first_batch_drives_its_loss_down(tmp_path: Path) -> None:
    run = trainer(tmp_path, overfit_first_batch=True, max_steps=60, optimizer=AdamW(lr=2e-2)).train()
    assert run.last["loss"] < 0.1 < 3 < losses(tmp_path)[0]


def test_another_seed_gives_another_order_and_another_model(tmp_path: Path) -> None:
    trainer(tmp_path / "a", seed=1, max_steps=2).train()
    trainer(tmp_path / "b", seed=2, max_steps=2).train()
    trainer(tmp_path / "c", seed=1, max_steps=2).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "c") != losses(tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    @hooks.after("trainer.loss")
    def poison(trainer: SFTTrainer, loss: torch.Tensor) -> torch.Tensor | None:
        return loss * float("nan") if trainer.run.step == 2 else None

    with pytest.raises(TrainingError, match="step 3: loss is nan"):
        trainer(tmp_path, checkpoint=[Resume(every=1)], log_every=100).train(callbacks=[poison])
    assert (tmp_path / "step-00000002").exists()
    assert not (tmp_path / "step-00000003").exists()


def test_a_step_without_anything_to_learn_from_is_an_error(tmp_path: Path) -> None:
    @hooks.before("trainer.step")
    def blank(trainer: SFTTrainer, batches: list[Batch]) -> tuple[list[Batch]]:
        return ([{**batch, "weight": 0} for batch in batches],)

    with pytest.raises(TrainingError, match="step 1: none of its 4 rows has anything to learn from"):
        trainer(tmp_path).train(callbacks=[blank])


def test_what_an_evaluation_logs_outside_of_its_batches_is_taken_as_it_is(tmp_path: Path) -> None:
    @hooks.after("trainer.together")
    def log(trainer: SFTTrainer, batches: Any) -> None:
        trainer.run.log(beside=3.0)

    made = trainer(tmp_path, max_steps=1, eval_rows=4, eval_every=1).train(callbacks=[log])
    assert made.last["eval_beside"] == made.last["beside"] == 3.0


def test_a_hook_that_replaces_arguments_keeps_those_that_it_leaves_out(tmp_path: Path) -> None:
    """`count` gets learning rates by name, and its loss too."""

    @hooks.before("trainer.count")
    def doubled(trainer: SFTTrainer, batches: Any, position: Any, loss: Any, **rates: float) -> tuple[Any, ...]:
        return batches, position, 2 * loss

    plain = trainer(tmp_path / "plain", max_steps=1).train()
    made = trainer(tmp_path / "doubled", max_steps=1).train(callbacks=[doubled])
    assert made.last["loss"] == pytest.approx(2 * plain.last["loss"])
    assert made.last["lr"] == plain.last["lr"]


def test_evaluating_without_data_for_it_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="eval_every"):
        trainer(tmp_path, eval_every=2).train()


def test_two_runs_in_one_process_do_not_touch_each_other(tmp_path: Path) -> None:
    made = trainer(tmp_path / "a", max_steps=2, resume="never")
    made.train()
    first = losses(tmp_path / "a")
    made.train()
    assert losses(tmp_path / "a") == first
    assert "loss" not in vars(made)


def test_half_an_epoch_takes_half_of_the_steps(tmp_path: Path) -> None:
    for epochs, steps in ((0.5, 3), (1.0, 5), (1.5, 8), (2.0, 10), (0.01, 1)):
        made = trainer(tmp_path, max_steps=None, epochs=epochs, packing=False, rows=20)
        assert made.horizon(made.data.build(None, 4, 0, 1, 42).train, 4) == steps


def test_warming_up_is_said_as_a_share_or_in_steps() -> None:
    share, steps = (Linear(warmup=warmup).factor(200) for warmup in (0.1, 20))
    assert [share(n) for n in range(200)] == [steps(n) for n in range(200)]
    assert steps(19) < steps(20) == 1.0
    with pytest.raises(ValueError, match="a share below 1, or a whole number of steps, got 1.5"):
        Linear(warmup=1.5)
