"""The arithmetic of reinforcement learning, against values that are written out by hand."""

import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain import policy_loss
from posttrain.blocks.losses import policy  # noqa: F401 - registers the losses
from posttrain.blocks.losses.entropy import log_probs_and_entropy, of_logits
from posttrain.blocks.losses.surrogate import LOSSES, Replies, Surrogate, bounded, correction, divergence_from
from posttrain.blocks.rollouts.advantages import advantages
from posttrain.errors import RegistryError, TrainingError

REPLIES = [[0.5, -0.3], [0.02], [-0.9, 0.0, 0.35]]
"""Of three replies: new - old, in nats, of each token."""
GAINS = [1.5, -0.75, -2.0]
"""Their advantages."""
LONGEST = 4
ALONE: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"))


def laid(old_of: float = -1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Replies]:
    """The three replies as losses see them."""
    moved = torch.tensor([x for reply in REPLIES for x in reply], dtype=torch.float64)
    lengths = torch.tensor([len(reply) for reply in REPLIES])
    index = torch.arange(3).repeat_interleave(lengths)
    old = torch.full_like(moved, old_of)
    gains = torch.tensor(GAINS, dtype=torch.float64)[index]
    return (old + moved).requires_grad_(), old, gains, Replies(index, lengths.double(), LONGEST)


def clip(ratio: float, gain: float, low: float, high: float, delta: float = math.inf) -> float:
    bounded = min(ratio, delta) if gain < 0 else ratio
    return -min(bounded * gain, min(max(ratio, 1 - low), 1 + high) * gain)


def tokens(low: float, high: float, delta: float = math.inf) -> list[list[float]]:
    return [
        [clip(math.exp(x), gain, low, high, delta) for x in reply] for reply, gain in zip(REPLIES, GAINS, strict=True)
    ]


def over_tokens(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / 6


def over_replies(losses: list[list[float]]) -> float:
    return statistics.fmean(statistics.fmean(reply) for reply in losses)


def soft(x: float, gain: float) -> float:
    tau = 1.0 if gain > 0 else 1.05
    return -gain * 4 / tau / (1 + math.exp(-tau * (math.exp(x) - 1)))


def whole(low: float, high: float) -> float:
    return statistics.fmean(
        clip(math.exp(statistics.fmean(reply)), gain, low, high) for reply, gain in zip(REPLIES, GAINS, strict=True)
    )


BY_HAND: dict[str, Callable[[], float]] = {
    "grpo": lambda: over_replies(tokens(0.2, 0.2)),
    "dr_grpo": lambda: sum(map(sum, tokens(0.2, 0.2))) / 3 / LONGEST,
    "dapo": lambda: over_tokens(tokens(0.2, 0.28)),
    "bnpo": lambda: over_tokens(tokens(0.2, 0.2)),
    "ppo": lambda: over_tokens(tokens(0.2, 0.2)),
    "reinforce_plus_plus": lambda: over_tokens(tokens(0.2, 0.2)),
    "gspo": lambda: whole(3e-4, 4e-4),
    "cispo": lambda: over_tokens(
        [[-min(math.exp(x), 5) * gain * (x - 1) for x in reply] for reply, gain in zip(REPLIES, GAINS, strict=True)]
    ),
    "sapo": lambda: over_replies([[soft(x, gain) for x in reply] for reply, gain in zip(REPLIES, GAINS, strict=True)]),
    "reinforce": lambda: statistics.fmean(
        -gain * sum(x - 1 for x in reply) for reply, gain in zip(REPLIES, GAINS, strict=True)
    ),
    "rloo": lambda: statistics.fmean(
        -gain * sum(x - 1 for x in reply) for reply, gain in zip(REPLIES, GAINS, strict=True)
    ),
}


def test_every_loss_is_written_out_here() -> None:
    assert BY_HAND.keys() == {name for name, loss in LOSSES.items() if "posttrain" in loss.function.__module__}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_is_what_its_paper_says(name: str) -> None:
    assert Surrogate(name, {})(*laid()).mean().item() == pytest.approx(BY_HAND[name](), rel=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_has_the_gradient_of_its_value(name: str) -> None:
    """Except where a part of it is held constant on purpose, as in CISPO."""
    new, old, gains, replies = laid()
    if name == "cispo":
        (slope,) = torch.autograd.grad(Surrogate(name, {})(new, old, gains, replies).sum(), new)
        assert torch.allclose(slope, -(new - old).exp().clamp(max=5) * gains)
    else:
        assert torch.autograd.gradcheck(lambda x: Surrogate(name, {})(x, old, gains, replies), new)


def test_on_policy_every_loss_has_the_policy_gradient() -> None:
    """Where nothing has moved, the slope of a token is minus its advantage, over what the loss is a mean over."""
    _, old, gains, replies = laid()
    each = {"grpo": replies.lengths[replies.index] * 3, "gspo": replies.lengths[replies.index] * 3,
            "sapo": replies.lengths[replies.index] * 3, "dr_grpo": torch.tensor(3.0 * LONGEST),
            "reinforce": torch.tensor(3.0), "rloo": torch.tensor(3.0)}  # fmt: skip
    for name in BY_HAND:
        new = old.clone().requires_grad_()
        (slope,) = torch.autograd.grad(Surrogate(name, {})(new, old, gains, replies).mean(), new)
        assert torch.allclose(slope, -gains / each.get(name, torch.tensor(6.0))), name


def test_two_sided_clipping_bounds_what_a_bad_reply_can_weigh() -> None:
    new, old, gains, replies = laid()
    found = Surrogate("dapo", {"delta": 1.3})(new, old, gains, replies)
    assert found.tolist() == pytest.approx([x for reply in tokens(0.2, 0.28, 1.3) for x in reply])
    assert found.max() == 1.3 * 2.0  # else exp(0.35) * 2


def test_what_is_clipped_is_told() -> None:
    new, old, _, replies = laid()
    assert Surrogate("dapo", {}).clipped(new, old, replies).tolist() == [True, True, False, True, False, True]
    assert not Surrogate("reinforce", {}).clipped(new, old, replies).any()
    wide = Surrogate("gspo", {"clip_low": 0.05, "clip_high": 0.05})  # of replies: means of 0.1, 0.02 and -0.18
    assert wide.clipped(new, old, replies).tolist() == [True, True, False, True, True, True]


def test_a_loss_of_ones_own_is_used_and_its_shape_checked() -> None:
    @policy_loss("test-plain", over="replies", advantage="group")
    def plain(new: Any, old: Any, advantages: Any, replies: Replies, *, power: float = 1.0) -> Any:
        return replies.sums(-advantages * (new - old).exp() ** power)

    assert Surrogate("test-plain", {"power": 2.0})(*laid()).shape == (3,)
    assert not list(Surrogate("test-plain", {"power": 2.0, "clip_low": None}).problems())
    (problem,) = Surrogate("test-plain", {"powers": 2.0}).problems()
    assert problem == ("powers", "test-plain takes no 'powers'; did you mean 'power'? (it takes: power)")

    @policy_loss("test-wrong", over="replies")
    def wrong(new: Any, old: Any, advantages: Any, replies: Replies) -> Any:
        return -advantages * new

    with pytest.raises(TrainingError, match=r"'test-wrong' is a mean over replies, so it must return \[3\] numbers"):
        Surrogate("test-wrong", {})(*laid())
    with pytest.raises(RegistryError, match="'dapo' exists already"):
        policy_loss("dapo")(wrong)
    for name in ("test-plain", "test-wrong"):
        del LOSSES[name]


# -- the divergence from a reference, and corrections ---------------------------------


def test_divergences_are_what_schulman_writes() -> None:
    new, reference = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.0, -0.5]).double()
    old = torch.tensor([-1.1, -1.9, -0.5]).double()
    r = [math.exp(b - a) for a, b in zip(new.tolist(), reference.tolist(), strict=True)]
    k3 = [x - 1 - math.log(x) for x in r]
    by_hand = {
        "k1": [-math.log(x) for x in r], "k2": [math.log(x) ** 2 / 2 for x in r], "k3": k3,
        "unbiased": [math.exp(a - b) * x for a, b, x in zip(new.tolist(), old.tolist(), k3, strict=True)],
    }  # fmt: skip
    for kind, wanted in by_hand.items():
        assert divergence_from(reference, new, old, kind).tolist() == pytest.approx(wanted), kind  # type: ignore[arg-type]


def test_only_the_unbiased_estimate_has_value_and_gradient_of_the_divergence() -> None:
    """Over all tokens of a small vocabulary, weighed by their probabilities: expectations without sampling."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    new, reference, other = (
        x.log_softmax(-1) for x in (logits, *torch.randn(2, 5, dtype=torch.float64, generator=generator))
    )
    forward, backward = (new.exp() * (new - reference)).sum(), (reference.exp() * (reference - new)).sum()
    value = forward.item()
    right, zero = slope_of(forward, logits), torch.zeros(5, dtype=torch.float64)
    for old, on_policy in ((new.detach(), True), (other, False)):
        for kind, valued, slope in (
            ("unbiased", True, right), ("k1", True, zero), ("k2", False, right), ("k3", True, slope_of(backward, logits))
        ):  # fmt: skip
            estimate = (old.exp() * divergence_from(reference, new, old, kind)).sum()  # type: ignore[arg-type]
            found = slope_of(estimate, logits)
            if on_policy or kind == "unbiased":
                assert (estimate.item() == pytest.approx(value)) is valued, kind
                assert torch.allclose(found, slope, atol=1e-12), kind
            else:
                assert not torch.allclose(found, right, atol=1e-3), kind


def slope_of(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_corrections_weigh_by_the_truncated_ratio_of_trainer_to_sampler() -> None:
    gap = torch.tensor([x for reply in REPLIES for x in reply], dtype=torch.float64)
    *_, replies = laid()
    sampled = torch.full_like(gap, -1.0)
    found = {kind: correction(sampled + gap, sampled, replies, kind, 1.3) for kind in ("token", "sequence", "mask")}  # type: ignore[arg-type]
    assert found["token"].tolist() == pytest.approx([min(math.exp(x), 1.3) for reply in REPLIES for x in reply])
    sums = [min(math.exp(sum(reply)), 1.3) for reply in REPLIES for _ in reply]
    assert found["sequence"].tolist() == pytest.approx(sums)
    kept = [math.exp(x) if 1 / 1.3 <= math.exp(x) <= 1.3 else 0.0 for reply in REPLIES for x in reply]
    assert found["mask"].tolist() == pytest.approx(kept)
    assert correction(gap, sampled, replies, "none", 2.0).tolist() == [1.0] * 6
    for kind, weights in found.items():
        plain = (replies.sums(gap)[replies.index] if kind == "sequence" else gap).exp()
        changed = (weights - plain).abs() > 1e-12
        assert bounded(gap, replies, kind, 1.3).tolist() == changed.tolist(), kind  # type: ignore[arg-type]


def test_a_correction_makes_a_stale_sampler_harmless() -> None:
    """The gradient of the expected reward, over all tokens of a vocabulary that another policy draws from."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    sampler = torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(-1)
    rewards, new = torch.randn(6, dtype=torch.float64, generator=generator), logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(-(new.exp() * rewards).sum(), logits, retain_graph=True)
    replies = Replies(torch.arange(6), torch.ones(6, dtype=torch.float64), 1)

    def expected(weights: torch.Tensor) -> torch.Tensor:
        losses = Surrogate("rloo", {})(new, new.detach(), rewards * weights, replies)
        return torch.autograd.grad((sampler.exp() * losses).sum(), logits, retain_graph=True)[0]

    for kind in ("token", "sequence"):
        weights = correction(new.detach(), sampler, replies, kind, 1e9)  # type: ignore[arg-type]
        assert torch.allclose(expected(weights), exact), kind
    assert not torch.allclose(expected(torch.ones_like(rewards)), exact, atol=0.05)


# -- advantages -----------------------------------------------------------------------


def test_advantages_are_what_their_papers_say() -> None:
    rewards = [[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0]]
    every = [x for group in rewards for x in group]
    mean, spread = statistics.fmean(every), statistics.stdev(every)
    by_hand: dict[str, list[list[float]]] = {
        "group": [[x - statistics.fmean(g) for x in g] for g in rewards],
        "group_std": [[(x - statistics.fmean(g)) / (statistics.stdev(g) + 1e-4) for x in g] for g in rewards],
        "batch_std": [[(x - statistics.fmean(g)) / (spread + 1e-4) for x in g] for g in rewards],
        "leave_one_out": [[x - (sum(g) - x) / 3 for x in g] for g in rewards],
        "batch": [[(x - mean) / (spread + 1e-4) for x in g] for g in rewards],
    }
    for kind, wanted in by_hand.items():
        found = advantages(torch.tensor(rewards, dtype=torch.float64), kind, ALONE)  # type: ignore[arg-type]
        for one, other in zip(found.tolist(), wanted, strict=True):
            assert one == pytest.approx(other, abs=1e-12), kind


@pytest.mark.parametrize("kind", ["group", "group_std", "batch_std", "leave_one_out", "batch"])
def test_a_reply_whose_reward_failed_is_as_if_it_had_not_been_said(kind: Any) -> None:
    nan = math.nan
    with_it = advantages(torch.tensor([[1.0, nan, 0.0, 2.0], [0.0, 1.0, 4.0, nan]]).double(), kind, ALONE)
    without = advantages(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 4.0]]).double(), kind, ALONE)
    assert with_it[0, 1] == 0.0
    assert with_it[0, [0, 2, 3]].tolist() == pytest.approx(without[0].tolist())
    assert with_it[1].tolist() == pytest.approx([*without[1].tolist(), 0.0])


def test_a_flat_group_teaches_nothing_whatever_rounding_does() -> None:
    same = torch.full((1, 7), 0.1 + 0.2, dtype=torch.float64)
    for kind in ("group", "group_std", "batch_std", "leave_one_out"):
        assert advantages(same, kind, ALONE).abs().max() == 0.0, kind  # type: ignore[arg-type]


# -- log-probabilities and entropy ----------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunked", [False, True])
def test_log_probabilities_and_entropy_are_those_of_plain_torch(
    temperature: float, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr("posttrain.blocks.losses.entropy.chunk_rows", lambda weight: 3)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((10, 6), (17, 6), (17,))
    )
    targets, upstream = torch.randint(17, (10,), generator=generator), torch.randn(10, 2, generator=generator)
    ours = log_probs_and_entropy(hidden, weight, bias, targets, temperature)
    plain = of_logits(hidden @ weight.T + bias, targets, temperature)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, plain, strict=True))
    for used in ((0,), (1,), (0, 1)):
        slopes, wanted = (
            torch.autograd.grad(
                sum((found[i] * upstream[:, i]).sum() for i in used), (hidden, weight, bias), retain_graph=True
            )
            for found in (ours, plain)
        )
        for one, other in zip(slopes, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
