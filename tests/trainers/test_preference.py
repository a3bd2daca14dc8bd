"""The losses of pairs: values written out by hand, slopes by finite differences, and what depends on what."""

import math
from typing import Any

import pytest
import torch

from posttrain.blocks.losses import preference  # noqa: F401 - registers the losses
from posttrain.blocks.losses.objective import LOSSES, Objective, accuracy, preference_loss
from posttrain.errors import RegistryError

POLICY = torch.tensor([[-10.0, -14.0], [-7.5, -6.0], [-3.0, -9.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -13.0], [-8.0, -7.0], [-2.5, -8.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5.0, 7.0], [3.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
BETA, EPSILON = 0.3, 0.2
PAIRS = [tuple(map(float, (*p, *r, *n))) for p, r, n in zip(POLICY, REFERENCE, LENGTHS, strict=True)]
"""Policy's chosen and rejected, the reference's, and their lengths."""


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


# Each line is the published definition for one pair, with the standard library alone.
BY_HAND: dict[str, Any] = {
    "sigmoid": lambda c, r, rc, rr, nc, nr: -math.log(sigma(BETA * ((c - rc) - (r - rr)))),
    "robust": lambda c, r, rc, rr, nc, nr: (
        (
            -(1 - EPSILON) * math.log(sigma(BETA * ((c - rc) - (r - rr))))
            + EPSILON * math.log(sigma(-BETA * ((c - rc) - (r - rr))))
        )
        / (1 - 2 * EPSILON)
    ),
    "hinge": lambda c, r, rc, rr, nc, nr: max(0.0, 1 - BETA * ((c - rc) - (r - rr))),
    "ipo": lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, rc, rr, nc, nr: sum(
        sigma(x) * (math.log(sigma(x)) - math.log(target))
        for x, target in ((BETA * ((c - rc) - (r - rr)), 1 - EPSILON), (-BETA * ((c - rc) - (r - rr)), EPSILON))
    ),
    "nca_pair": lambda c, r, rc, rr, nc, nr: (
        -math.log(sigma(BETA * (c - rc)))
        - 0.5 * math.log(sigma(-BETA * (c - rc)))
        - 0.5 * math.log(sigma(-BETA * (r - rr)))
    ),
    "bco_pair": lambda c, r, rc, rr, nc, nr: -math.log(sigma(BETA * (c - rc))) - math.log(sigma(-BETA * (r - rr))),
    "sppo_hard": lambda c, r, rc, rr, nc, nr: ((c - rc) - 0.5 / BETA) ** 2 + ((r - rr) + 0.5 / BETA) ** 2,
    "apo_zero": lambda c, r, rc, rr, nc, nr: 1 - sigma(BETA * (c - rc)) + sigma(BETA * (r - rr)),
    "apo_down": lambda c, r, rc, rr, nc, nr: sigma(BETA * (c - rc)) + 1 - sigma(BETA * ((c - rc) - (r - rr))),
    "discopop": lambda c, r, rc, rr, nc, nr: (
        (1 - sigma(BETA * ((c - rc) - (r - rr)) / 0.05)) * -math.log(sigma(BETA * ((c - rc) - (r - rr))))
        + sigma(BETA * ((c - rc) - (r - rr)) / 0.05) * math.exp(-BETA * ((c - rc) - (r - rr)))
    ),
    "sigmoid_norm": lambda c, r, rc, rr, nc, nr: -math.log(sigma(BETA * ((c - rc) / nc - (r - rr) / nr))),
    "sft": lambda c, r, rc, rr, nc, nr: -c / (10 / 3),  # the mean length of the chosen replies
    "orpo": lambda c, r, rc, rr, nc, nr: -c / nc - BETA * math.log(sigma(log_odds(c / nc) - log_odds(r / nr))),
    "simpo": lambda c, r, rc, rr, nc, nr: -math.log(sigma(BETA * (c / nc - r / nr) - 1.0)),
}


def of(name: str, policy: torch.Tensor = POLICY, **options: Any) -> torch.Tensor:
    taken = LOSSES[name].options
    given = {"beta": BETA} if "beta" in taken else {}
    if name in ("robust", "exo_pair"):
        given["label_smoothing"] = EPSILON
    return LOSSES[name].function(policy, REFERENCE, LENGTHS, **{**given, **options})


@pytest.mark.parametrize("name", BY_HAND)
def test_each_loss_is_its_published_definition(name: str) -> None:
    expected = [BY_HAND[name](*pair) for pair in PAIRS]
    assert of(name).tolist() == pytest.approx(expected, rel=1e-12)


def test_every_loss_that_ships_is_written_out_here() -> None:
    assert {name for name, loss in LOSSES.items() if "posttrain" in loss.function.__module__} == {*BY_HAND, "aot"}


def test_aot_compares_sorted_margins() -> None:
    """Margins of the policy 4, -1.5, 6; of the reference 2, -1, 5.5; so quantile by quantile -0.5, 2 and 0.5."""
    expected = [-math.log(sigma(BETA * x)) for x in (2.0, -0.5, 0.5)]
    assert of("aot").tolist() == pytest.approx(expected, rel=1e-12)


def test_label_smoothing_mixes_both_labels() -> None:
    flipped = POLICY.flip(1), REFERENCE.flip(1)
    theirs = LOSSES["sigmoid"].function(*flipped, LENGTHS, beta=BETA)
    mixed = (1 - EPSILON) * of("sigmoid") + EPSILON * theirs
    torch.testing.assert_close(of("sigmoid", label_smoothing=EPSILON), mixed)


def test_ipo_as_its_equation_is_written_sums_log_probabilities() -> None:
    expected = [((c - rc) - (r - rr) - 1 / (2 * BETA)) ** 2 for c, r, rc, rr, _, _ in PAIRS]
    assert of("ipo", average=False).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_those_of_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(lambda policy: of(name, policy), POLICY.clone().requires_grad_())


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "sft"])
def test_a_pairs_loss_does_not_depend_on_other_pairs(name: str) -> None:
    taken = LOSSES[name].options
    given = {"beta": BETA} if "beta" in taken else {}
    alone = [
        LOSSES[name].function(POLICY[i : i + 1], REFERENCE[i : i + 1], LENGTHS[i : i + 1], **given) for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), LOSSES[name].function(POLICY, REFERENCE, LENGTHS, **given))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_losses_without_a_reference_do_not_look_at_one(name: str) -> None:
    other = LOSSES[name].function(POLICY, torch.full_like(REFERENCE, math.nan), LENGTHS)
    torch.testing.assert_close(other, LOSSES[name].function(POLICY, REFERENCE, LENGTHS))


def test_losses_are_finite_where_probabilities_are_extreme() -> None:
    policy = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], requires_grad=True)
    reference, lengths = torch.tensor([[-1e4, 0.0], [0.0, -1e4]]), torch.ones(2, 2)
    for name in set(LOSSES) - {"discopop"}:  # its exponential overflows by definition
        losses = LOSSES[name].function(policy, reference, lengths)
        (slopes,) = torch.autograd.grad(losses.sum(), policy)
        assert losses.isfinite().all(), name
        assert slopes.isfinite().all(), name


def test_an_objective_is_the_weighted_sum_of_its_losses() -> None:
    mixed = Objective({"sigmoid": 1.0, "sft": 0.2}, {"beta": BETA})(POLICY, REFERENCE, LENGTHS)
    torch.testing.assert_close(mixed, of("sigmoid") + 0.2 * of("sft"))


def test_options_go_to_the_losses_that_take_them_and_others_are_named() -> None:
    assert not list(Objective({"sigmoid": 1, "discopop": 1}, {"tau": 0.1}).problems())
    ((key, message),) = Objective({"sigmoid": 1}, {"label_smothing": 0.1}).problems()
    assert key == "loss_args"
    expected = "sigmoid takes no 'label_smothing'; did you mean 'label_smoothing'? (it takes: beta, label_smoothing)"
    assert message == expected
    ((key, message),) = Objective({"hinge": 1}, {"label_smoothing": 0.1}).problems()
    assert key == "label_smoothing"
    ((key, message),) = Objective({"sigmod": 1}, {}).problems()
    assert message.startswith("there is no 'sigmod'; did you mean 'sigmoid'?")
    for weights, options in (({"exo_pair": 1}, {"label_smoothing": 0}), ({}, {}), ({"sigmoid": -1}, {})):
        assert len(list(Objective(weights, options).problems())) == 1


def test_rewards_are_sums_or_means_as_the_loss_has_them() -> None:
    gain = POLICY - REFERENCE
    for name, expected in (
        ("sigmoid", gain), ("sigmoid_norm", gain / LENGTHS), ("simpo", POLICY / LENGTHS), ("sft", POLICY),
    ):  # fmt: skip
        options = {"beta": BETA} if "beta" in LOSSES[name].options else {}
        scale = BETA if options else 1.0
        torch.testing.assert_close(Objective({name: 1}, options).rewards(POLICY, REFERENCE, LENGTHS), scale * expected)


def test_a_tie_is_half_a_win() -> None:
    assert accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])).item() == 0.625


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RegistryError, match="'sigmoid' exists already"):

        @preference_loss("sigmoid")
        def other(policy: Any, reference: Any, lengths: Any) -> Any:
            return policy
