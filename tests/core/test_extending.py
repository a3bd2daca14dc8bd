"""What users add: hooks, blocks, plugins; and what the package promises about itself."""

from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.errors import HookError, RegistryError
from posttrain.hooks import after, before, bound
from posttrain.registry import block, lookup

ROOT = Path(posttrain.__file__).parent


class Base:
    def loss(self, batch: int) -> int:
        return batch + 1

    def step(self, batches: list[int]) -> int:
        return sum(self.loss(batch) for batch in batches)

    def quiet(self) -> None:
        """Return None."""


class Sub(Base):
    def loss(self, batch: int) -> int:
        return super().loss(batch) * 10

    def step(self, batches: list[int]) -> int:
        return super().step(batches)


def tracing(seen: list[str], name: str = "") -> list[Any]:
    @before("trainer.loss")
    def enter(trainer: Any, batch: int) -> None:
        seen.append(f"before{name}")

    @after("trainer.loss")
    def leave(trainer: Any, loss: int) -> None:
        seen.append(f"after{name}")

    return [enter, leave]


def test_hooks_fire_once_around_an_override_that_calls_super() -> None:
    trainer, seen = Sub(), list[str]()
    with bound(trainer, tracing(seen)):
        assert trainer.loss(1) == 20
    assert seen == ["before", "after"]
    assert trainer.loss(1) == 20
    assert seen == ["before", "after"]
    assert not vars(trainer)


def test_hooks_fire_inside_an_overridden_step() -> None:
    trainer, seen = Sub(), list[str]()
    with bound(trainer, tracing(seen)):
        assert trainer.step([1, 2]) == 50
    assert seen == ["before", "after"] * 2


def test_hooks_of_several_callbacks_run_in_their_order() -> None:
    seen: list[str] = []
    trainer = Sub()
    with bound(trainer, [*tracing(seen, "1"), *tracing(seen, "2")]):
        trainer.loss(1)
    assert seen == ["before1", "before2", "after1", "after2"]


def test_a_hook_can_replace_arguments_and_results_and_none_keeps_them() -> None:
    @before("trainer.loss")
    def more(trainer: Any, batch: int) -> tuple[int]:
        return (batch + 1,)

    @after("trainer.loss")
    def negative(trainer: Any, loss: int) -> int:
        return -loss

    @after("trainer.quiet")
    def nothing(trainer: Any, result: None) -> None:
        assert result is None

    trainer = Sub()
    with bound(trainer, [more, negative, nothing]):
        assert trainer.loss(1) == -30
        assert trainer.quiet() is None  # type: ignore[func-returns-value]


def test_a_hook_that_returns_no_tuple_is_told_so() -> None:
    @before("trainer.loss")
    def wrong(trainer: Any, batch: int) -> int:
        return batch

    trainer = Sub()
    with bound(trainer, [wrong]), pytest.raises(HookError, match=r"wrong runs before loss\(\).*tuple.*returned int"):
        trainer.loss(1)


def test_a_misspelt_target_is_an_error() -> None:
    @after("trainer.lost")
    def hook(trainer: Any, loss: int) -> None: ...

    with pytest.raises(HookError, match=r"no method 'trainer.lost'.*did you mean 'trainer.loss'"), bound(Sub(), [hook]):
        pass
    with pytest.raises(HookError, match="no method marked"), bound(Sub(), [print]):
        pass


def test_hooks_reach_blocks_and_lists_of_blocks(tmp_path: Path) -> None:
    from toy import trainer

    seen: list[str] = []

    @block("callback", "watch-blocks")
    class Watch:
        word: str

        @after("optimizer.build")
        def built(self, optimizer: Any, result: Any) -> None:
            seen.append(f"{self.word} {type(result).__name__}")

        @before("checkpoint.save")
        def saving(self, checkpoint: Any, run: Any, at_end: bool) -> None:
            seen.append(type(checkpoint).__name__)

    trainer(tmp_path, max_steps=1, callbacks=[Watch(word="built")]).train()
    assert seen == ["built AdamW", "Resume", "HuggingFace", "Resume", "HuggingFace"]


def test_a_name_is_given_once_but_a_cell_can_run_again() -> None:
    def define() -> type:
        @block("optimizer", "twice")
        class A:
            def build(self, model: Any) -> Any: ...

        return A

    define()
    again = define()
    assert lookup("optimizer", "twice") is again
    with pytest.raises(RegistryError, match=r"already registered by .*A .*test_extending.py:"):

        @block("optimizer", "twice")
        class B:
            def build(self, model: Any) -> Any: ...


def test_a_block_that_does_not_fit_is_refused_when_it_is_defined() -> None:
    with pytest.raises(RegistryError, match=r"is not a optimizer: build\(self, model\) does not fit build\(self\)"):

        @block("optimizer", "unfit")
        class C:
            def build(self) -> Any: ...

    with pytest.raises(RegistryError, match="it has no method build"):

        @block("scheduler", "unfit")
        class D:
            def make(self) -> Any: ...

    with pytest.raises(RegistryError, match="did you mean 'scheduler'"):
        block("schedular", "x")


def test_plugins_are_found_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plug.py").write_text(
        "from posttrain import block\n@block('logger', 'plugged')\nclass L:\n    def build(self, run): ...\n"
    )
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.logger]\nplugged = plug:L\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lookup("logger", "plugged").__name__ == "L"


def test_a_trainer_of_ones_own_gets_token_log_probabilities(tmp_path: Path) -> None:
    """A method in a few lines: focal loss, which counts a token the less the surer the model is."""
    from toy import ToyData, ToyTokenizer, losses, trainer

    @block("trainer", "focal-again")
    class Focal(posttrain.SFTTrainer):
        gamma: float = 2.0

        def loss(self, batch: posttrain.Batch) -> Any:
            log_probs = self.run.model(batch, "log_probs")
            return -((1 - log_probs.exp()) ** self.gamma * log_probs).sum() / batch["weight"]

    like = trainer(tmp_path / "plain", max_steps=4)
    keys = {"tokenizer": ToyTokenizer(), "accelerator": "cpu", "logger": like.logger, "max_steps": 4, "log_every": 1}
    for name, cut in (
        ("one", {"micro_batch_size": 4}),
        ("four", {"micro_batch_size": 1, "gradient_accumulation_steps": 4}),
    ):
        Focal(model=like.model, data=ToyData(), output_dir=tmp_path / name, **keys, **cut).train()  # type: ignore[arg-type]
    like.train()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), abs=1e-6)
    assert losses(tmp_path / "one")[0] < losses(tmp_path / "plain")[0]
