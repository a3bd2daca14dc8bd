"""Each optimizer against its paper's steps written out, the same under every strategy, and going on bit by bit."""

import importlib.util
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_two_ranks, recipe
from toy import losses, metrics, network, trainer

import posttrain
from posttrain.blocks.optimizer import AdamW, ParameterGroup, averaged
from posttrain.blocks.optimizers import blocks, elementwise, matrices
from posttrain.blocks.optimizers.rounding import random_bits, rounded
from posttrain.blocks.scheduler import Constant
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.hooks import after
from posttrain.tools import tracing

EXPERTS = {"config": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}}
WIDE = {"config": {"hidden_size": 96, "intermediate_size": 160}}
MUON, ADAFACTOR = blocks.Muon(lr=1e-3, weight_decay=0.1, computed_in="float32"), blocks.Adafactor(weight_decay=0.1)
GROUPS = [ParameterGroup(match="*embed*", lr=1e-4), ParameterGroup(match="*norm*", weight_decay=0.5, name="norms")]
CASES: dict[str, dict[str, Any]] = {
    "adamw in groups": {"optimizer": AdamW(lr=1e-3, weight_decay=0.1, groups=GROUPS, layer_decay=0.5)},
    "lion": {"optimizer": blocks.Lion(lr=1e-4)},
    "sgd": {"optimizer": blocks.SGD(lr=0.1, momentum=0.9)},
    "torch": {"optimizer": blocks.TorchOptimizer(name="RAdam", lr=1e-3)},
    "adafactor": {"optimizer": ADAFACTOR},
    "adafactor of experts": {"optimizer": ADAFACTOR, "model": EXPERTS},
    "muon": {"optimizer": MUON},
    "muon of experts": {"optimizer": MUON, "model": EXPERTS},
    "adamw-bf16": {"optimizer": blocks.AdamWBF16(lr=1e-3)},
    "schedule-free": {"optimizer": blocks.ScheduleFree(lr=1e-3), "scheduler": Constant(), "eval_rows": 5, "eval_every": 2},
}  # fmt: skip
if importlib.util.find_spec("bitsandbytes"):
    CASES["adamw-8bit"] = {"optimizer": blocks.AdamW8bit(lr=1e-3), "model": WIDE}
STRATEGIES: dict[str, Any] = {"ddp": posttrain.DDP(), "fsdp": posttrain.FSDP()}
if importlib.util.find_spec("deepspeed"):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    STRATEGIES |= {"zero-1": posttrain.DeepSpeed(config={"zero_optimization": {"stage": 1}})}
    STRATEGIES |= {"zero-3": posttrain.DeepSpeed(config={"zero_optimization": zero})}
PAIRS = [
    (case, name)
    for case, keys in CASES.items()
    for name in STRATEGIES
    if name in ("ddp", "fsdp") or not hasattr(keys["optimizer"], "not_flat")
]


# -- steps ------------------------------------------------------------------------------


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], count: int = 5) -> list[torch.Tensor]:
    """Take some steps with gradients that are the same for every caller, and return the parameters."""
    chance = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=chance).to(parameter.dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def grouped(held: list[torch.nn.Parameter], lr: float = 1e-2, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    return [{"params": held, "lr": lr, "weight_decay": weight_decay}]


def test_lion_is_algorithm_2_of_its_paper() -> None:
    ours, theirs = parameters((3, 4)), parameters((3, 4))
    found = steps(elementwise.Lion(grouped(ours), betas=(0.9, 0.99)), ours)
    p, m, chance = theirs[0].detach().clone(), torch.zeros(3, 4), torch.Generator().manual_seed(1)
    for _ in range(5):
        g = torch.randn((3, 4), generator=chance)
        update = (0.9 * m + 0.1 * g).sign()
        p = p - 1e-2 * (update + 0.1 * p)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(found[0], p)


def test_adafactor_is_that_of_torch() -> None:
    ours, theirs = parameters((3, 4), (5,), (2, 3, 4)), parameters((3, 4), (5,), (2, 3, 4))
    keys = {"beta2_decay": -0.8, "clip": 1.0, "least": 1e-3}
    found = steps(matrices.Adafactor(grouped(ours), **keys), ours)
    wanted = steps(torch.optim.Adafactor(grouped(theirs)), theirs)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_muon_is_that_of_torch_and_steps_each_expert_alone() -> None:
    ours, theirs = parameters((6, 4), (4, 6)), parameters((6, 4), (4, 6))
    keys: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "steps": 5, "eps": 1e-7, "computed_in": "bfloat16"}
    found = steps(matrices.Muon(grouped(ours), **keys), ours)
    wanted = steps(torch.optim.Muon(grouped(theirs), adjust_lr_fn="match_rms_adamw"), theirs)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=2e-3)  # both are computed in bfloat16
    (stack,) = parameters((3, 6, 4))
    alone = [torch.nn.Parameter(expert.detach().clone()) for expert in stack]
    keys["computed_in"] = "float32"
    for number, one in enumerate(alone):
        chance, optimizer = torch.Generator().manual_seed(1), matrices.Muon(grouped([one]), **keys)
        for _ in range(5):
            one.grad = torch.randn((3, 6, 4), generator=chance)[number]
            optimizer.step()
    (together,) = steps(matrices.Muon(grouped([stack]), **keys), [stack])
    torch.testing.assert_close(together, torch.stack([one.detach() for one in alone]))


def test_newton_schulz_makes_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(matrices.orthogonal(torch.randn(2, 8, 5), 5, 1e-7))
    assert values.shape == (2, 5)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3


def test_schedule_free_is_algorithm_1_of_its_paper() -> None:
    """y, z and x kept as three tensors, with a warm-up; x is what `averages` says."""
    (held,) = parameters((3, 4))
    optimizer = elementwise.ScheduleFree(grouped([held]), betas=(0.9, 0.999), eps=1e-8)
    z, x, v = held.detach().clone(), held.detach().clone(), torch.zeros(3, 4)
    chance, weights, largest = torch.Generator().manual_seed(2), 0.0, 0.0
    for step in range(1, 7):
        lr = 1e-2 * min(1.0, step / 3)
        optimizer.param_groups[0]["lr"] = lr
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(held.detach(), y)
        g = torch.randn((3, 4), generator=chance)
        held.grad = g.clone()
        optimizer.step()
        v = 0.999 * v + 0.001 * g * g
        z = z - lr * (g / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.1 * y)
        largest = max(largest, lr)
        weights += largest**2
        share = largest**2 / weights
        x = (1 - share) * x + share * z
    (found,) = [average for _, average in optimizer.averages()]
    torch.testing.assert_close(found, x)


@pytest.mark.skipif("adamw-8bit" not in CASES, reason="needs bitsandbytes")
def test_eight_bits_follow_adamw_and_keep_what_their_map_says() -> None:
    """After each step the moments are those of AdamW from the kept ones, within half a step of the map."""
    from posttrain.runtime.bnb import dynamic_map

    (held,) = parameters((20, 300))  # rows that do not fill their last block
    optimizer = elementwise.AdamW8bit(grouped([held]), betas=(0.9, 0.999), eps=1e-8)
    state, chance = optimizer.state[held], torch.Generator().manual_seed(1)
    keys = {f"exp_avg{part}": signed for part, signed in (("", True), ("_sq", False))}
    for step in range(1, 4):
        kept = {name: optimizer.read(state, name, signed, slice(None))[:, :300] for name, signed in keys.items()}
        g, before = torch.randn((20, 300), generator=chance), held.detach().clone()
        held.grad = g
        optimizer.step()
        mean, square = 0.9 * kept["exp_avg"] + 0.1 * g, 0.999 * kept["exp_avg_sq"] + 0.001 * g * g
        scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
        wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * mean / (1 - 0.9**step) / scale
        torch.testing.assert_close(held.detach(), wanted)
        for name, exact, signed in (("exp_avg", mean, True), ("exp_avg_sq", square, False)):
            map_ = dynamic_map("cpu", signed)
            gap = float(map_.sort().values.diff().max()) / 2
            found = optimizer.read(state, name, signed, slice(None))[:, :300]
            assert float((found - exact).abs().max()) <= 1.01 * gap * float(exact.abs().max())
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert (
        tracing.size_of(x for x in state.values() if isinstance(x, torch.Tensor)) < 0.3 * 8 * 20 * 512
    )  # rows are filled up to 512


def test_rounding_at_random_keeps_the_mean_and_what_is_a_bfloat16() -> None:
    values = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    found = rounded(values, 0, key=3)
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert float(found.double().mean()) == pytest.approx(1 + 2**-9, abs=4 * 2**-7 * math.sqrt(0.25 * 0.75 / 100_000))
    exact = torch.tensor([0.0, -1.5, float("inf"), -float("inf"), 3e38]).to(torch.bfloat16)
    assert torch.equal(rounded(exact.float(), 0, key=1), exact)
    assert rounded(torch.tensor([float("nan")]), 0, key=1).isnan().all()


def test_random_bits_are_a_function_of_the_place() -> None:
    whole = random_bits(1000, 0, 7, torch.device("cpu"))
    assert torch.equal(whole[300:600], random_bits(300, 300, 7, torch.device("cpu")))
    assert not torch.equal(whole, random_bits(1000, 0, 8, torch.device("cpu")))
    for bit in range(16):
        assert abs(float(((whole >> bit) & 1).float().mean()) - 0.5) < 0.07


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """A thousand updates of a tenth of the last bit: rounded to the nearest, none of them is seen."""

    def moved(optimizer: Any) -> float:
        held = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        made = optimizer([{"params": [held], "lr": 2**-8 / 10, "weight_decay": 0.0}], betas=(0.0, 0.0), eps=1e-8)
        for _ in range(100):
            held.grad = torch.ones_like(held)
            made.step()
        return float(1 - held.detach().float().mean())

    assert moved(elementwise.AdamWBF16) == pytest.approx(100 * 2**-8 / 10, rel=0.1)
    assert moved(torch.optim.AdamW) == 0


# -- groups -----------------------------------------------------------------------------


def test_groups_have_their_rates_by_pattern(tmp_path: Path) -> None:
    optimizer = AdamW(
        lr=1e-3, weight_decay=0.1, groups=[ParameterGroup(match="*q_proj*", lr=1e-5, name="queries"), *GROUPS]
    )
    run = trainer(tmp_path, optimizer=optimizer, scheduler=Constant(warmup=0), max_steps=2).train()
    found = {name: line for name, line in metrics(tmp_path)[0].items() if name.startswith("lr")}
    assert found == {"lr": 1e-3, "lr/queries": 1e-5, "lr/*embed*": 1e-4, "lr/norms": 1e-3}
    named = {group["name"]: group for group in run.optimizer.param_groups if "name" in group}
    assert len(named["queries"]["params"]) == 2
    assert named["norms"]["weight_decay"] == 0.5
    assert named["queries"]["weight_decay"] == 0.1


def test_without_groups_the_groups_are_as_ever(tmp_path: Path) -> None:
    made: Any = network().build(None)
    ours = AdamW(lr=1e-3, weight_decay=0.1).build(made).param_groups
    assert [(len(g["params"]), g["weight_decay"], "name" in g) for g in ours] == [(16, 0.1, False), (5, 0.0, False)]


def test_rates_fall_from_layer_to_layer() -> None:
    made: Any = network(config={"num_hidden_layers": 3}).build(None)
    optimizer = AdamW(lr=1.0, layer_decay=0.5).build(made)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in made.named_parameters()}
    assert [found[f"hf.model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert found["hf.model.embed_tokens.weight"] == 0.25
    assert found["hf.lm_head.weight"] == found["hf.model.norm.weight"] == 1.0


def test_muon_leaves_embeddings_head_and_vectors_to_adamw(tmp_path: Path) -> None:
    optimizer = blocks.Muon(lr=1e-3, adamw_lr=1e-4)
    run = trainer(tmp_path, optimizer=optimizer, scheduler=Constant(warmup=0), max_steps=1).train()
    line = metrics(tmp_path)[0]
    assert (line["lr/muon"], line["lr/adamw"]) == (1e-3, 1e-4)
    names = {id(p): name for name, p in run.model.module.named_parameters()}
    held = {names[id(p)] for g in run.optimizer.param_groups if g["name"] == "muon" for p in g["params"]}
    assert all("proj" in name for name in held)
    assert len(held) == 14


REFUSED: list[tuple[list[str], str]] = [
    (["optimizer={type: muon}", "strategy={type: deepspeed}"], "it makes whole matrices orthogonal"),
    (["optimizer={type: adamw-bf16}", "deepspeed={zero_optimization: {stage: 2}}"], "its random bits"),
    (["optimizer={type: schedule-free}"], "takes the place of a schedule: write `{type: constant"),
    (["optimizer={type: sgd, nesterov: true}"], "looks ahead along the momentum"),
    (["optimizer={type: torch, name: LBFGS}"], "it evaluates a step several times"),
    (["optimizer={type: torch, name: Adam, args: {lr: 1}}"], "lr is not said here"),
    (["optimizer={groups: [{match: x, rate: 1}]}"], "rate"),
    (["optimizer={layer_decay: 1.5}"], "layer_decay"),
    (["optimizer={type: adamw_bnb_8bit}"], "is here: `adamw-8bit`"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    keys: list[str], message: str, tiny_model: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe(tmp_path, tiny_model, sums)), *keys]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (AdamW(groups=[ParameterGroup(match="*embedding*")]), r"'\*embedding\*' matches nothing that is trained"),
        (
            AdamW(groups=[ParameterGroup(match="*"), ParameterGroup(match="*embed*")]),
            r"'\*embed\*' matches nothing .* in no group before",
        ),
        (blocks.TorchOptimizer(name="AdamV"), "no class 'AdamV'; did you mean 'Adam"),
        (blocks.TorchOptimizer(name="Adagrad", args={"lr_decai": 1}), "takes no 'lr_decai'; did you mean 'lr_decay'"),
        (blocks.TorchOptimizer(name="Rprop", weight_decay=0.1), "torch.optim.Rprop has none"),
        (blocks.TorchOptimizer(name="RMSprop", args={"alpha": -1}), "does not take these arguments: .*alpha"),
    ],
    ids=str,
)
def test_what_only_the_network_or_torch_can_tell_is_refused_too(optimizer: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        optimizer.build(network().build(None))


# -- runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_by_bit(case: str, tmp_path: Path) -> None:
    keys = {"max_steps": 6, **CASES[case]}
    whole = trainer(tmp_path / "whole", **keys).train()
    trainer(tmp_path / "cut", **keys, stop_after=3).train()
    cut = trainer(tmp_path / "cut", **keys).train()
    assert cut.first_step == 3
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    for one, two in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_evaluated_and_exported_is_the_average(tmp_path: Path) -> None:
    """And training goes on from the weights, to the last bit."""
    from safetensors.torch import load_file

    seen: dict[str, Any] = {}

    @after("trainer.evaluate")
    def note(made: Any, found: Any) -> None:
        seen["weights"] = [p.detach().clone() for p in made.run.model.parameters()]

    keys = {**CASES["schedule-free"], "max_steps": 4}
    run = trainer(tmp_path / "a", **keys).train(callbacks=[note])
    for kept, now in zip(seen["weights"], run.model.parameters(), strict=True):
        assert torch.equal(kept, now)  # the last evaluation left the weights as they were
    name = "model.layers.0.mlp.up_proj.weight"
    exported = load_file(tmp_path / "a" / "huggingface" / "model.safetensors")[name]
    trained = run.model.module.hf.state_dict()[name].clone()
    assert not torch.equal(exported, trained)
    with averaged(run):
        assert torch.equal(exported, run.model.module.hf.state_dict()[name])
    never = trainer(tmp_path / "b", **{**keys, "eval_every": None, "eval_rows": 0}).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert torch.equal(trained, never.model.module.hf.state_dict()[name])


def test_bf16_true_takes_half_the_memory_and_learns_as_well(tmp_path: Path) -> None:
    """`precision: bf16-true` with rounding at random, beside float32 and beside rounding to the nearest."""
    keys: dict[str, Any] = {"max_steps": 60, "overfit_first_batch": True, "rows": 8}
    whole = trainer(tmp_path / "a", **keys, optimizer=AdamW(lr=1e-3)).train()
    low = trainer(tmp_path / "b", **keys, optimizer=blocks.AdamWBF16(lr=1e-3), precision="bf16-true").train()
    state = [x for held in low.optimizer.state.values() for x in held.values() if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in state} == {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    assert losses(tmp_path / "b")[-1] == pytest.approx(losses(tmp_path / "a")[-1], rel=0.02)
    assert whole.step == low.step == 60


def on_ranks(folder: Path) -> None:
    """Train every case under every strategy, two rows a rank; what fsdp has cut, ddp goes on with."""
    for case, name in PAIRS:
        trainer(
            folder / f"{case} {name}", max_steps=6, micro_batch_size=2, strategy=STRATEGIES[name], **CASES[case]
        ).train()
    for case, keys in CASES.items():
        there = folder / f"{case} cut"
        trainer(there, max_steps=6, micro_batch_size=2, strategy=posttrain.FSDP(), stop_after=3, **keys).train()
        if os.environ["RANK"] == "0":
            shutil.copytree(there, folder / f"{case} again")
        trainer(there, max_steps=6, micro_batch_size=2, strategy=posttrain.DDP(), **keys).train()
        trainer(folder / f"{case} again", max_steps=6, micro_batch_size=2, strategy=posttrain.FSDP(), **keys).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks(folder, "test_optimizers", "on_ranks(folder)", timeout=600)
    return folder / "two"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    found = {}
    for case, keys in CASES.items():
        folder = tmp_path_factory.mktemp("alone")
        trainer(folder, max_steps=6, **keys).train()
        found[case] = metrics(folder)
    return found


@pytest.mark.timeout(700)  # the first one waits for them all
@pytest.mark.parametrize(("case", "name"), [*PAIRS, *((case, how) for case in CASES for how in ("cut", "again"))])
def test_two_ranks_take_the_same_steps_as_one(case: str, name: str, runs: Path, alone: Any) -> None:
    found = metrics(runs / f"{case} {name}")
    assert len(found) == len(alone[case])
    for one, two in zip(found, alone[case], strict=True):
        assert one == pytest.approx(two, abs=2e-5, rel=2e-5)
