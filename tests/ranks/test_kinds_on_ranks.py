"""One model of each kind on two ranks: attention sinks, a hybrid, experts with the loss of their routers, latent attention.

Under DDP and FSDP2 they learn what one process learns, and go on from a checkpoint of the other strategy. All runs share
one launch.
"""

from pathlib import Path
from typing import Any

import attrs
import pytest
from ranks import on_two_ranks
from strategies import STRATEGIES
from toy import metrics, trainer
from transformers import AutoConfig

from posttrain import HFModel
from posttrain.blocks.models.documents.tiny import tiny

KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "qwen3_next": {"router_aux_loss": 0.3},
    "lfm2": {},
    "mixtral": {"router_aux_loss": 0.3, "router_z_loss": 0.1},
    "deepseek_v3": {"router_bias_rate": 0.01},
}
"""Type -> keys of the model."""
CHANGES = {"lfm2": {"layer_types": ["conv", "full_attention"] * 16}}
STEPS, CUT = 4, 2


def run_of(kind: str, folder: Path, **keys: Any) -> Any:
    """Train a type's twin: four rows a step."""
    config = tiny(AutoConfig.for_model(kind, **CHANGES.get(kind, {})), vocabulary=97)
    config.get_text_config().initializer_range = 0.06
    said = {"model_type": kind, **{name: value for name, value in config.to_dict().items() if name != "model_type"}}
    block = HFModel(name_or_path="toy", random_init=True, config=said, **KINDS[kind])
    made = trainer(folder, max_steps=STEPS, eval_rows=5, eval_every=2, max_grad_norm=1.0, **keys)
    return attrs.evolve(made, model=block).train()


def on_ranks(folder: Path) -> None:
    """Train every type under both strategies, whole and in two parts of which each has another strategy."""
    cuts = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "devices": 2}
    for kind in KINDS:
        for name, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
            run_of(kind, folder / f"{kind} {name}", strategy=STRATEGIES[name], **cuts)
            there = folder / f"{kind} {name} cut"
            run_of(kind, there, strategy=STRATEGIES[name], stop_after=CUT, **cuts)
            assert run_of(kind, there, strategy=STRATEGIES[then], **cuts).first_step == CUT


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks trained."""
    folder = tmp_path_factory.mktemp("kinds")
    on_two_ranks(folder, "test_kinds_on_ranks", "on_ranks(folder)")
    return folder / "two"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_learns_on_two_ranks_what_it_does_on_one_and_goes_on(
    kind: str, two: Path, tmp_path: Path
) -> None:
    run = run_of(kind, tmp_path)
    expected = metrics(tmp_path)
    assert ("router" in run.last) == ("router_aux_loss" in KINDS[kind])
    for name in ("ddp", "fsdp", "ddp cut", "fsdp cut"):
        found = metrics(two / f"{kind} {name}")
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=2e-5, rel=5e-4), name
