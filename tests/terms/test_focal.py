"""Focal and dual focal: arithmetic, loops, identities."""

import math

import pytest
import reference_terms as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CrossEntropyLoss, DualFocalLoss, FocalLoss
from densecal.targets import one_hot_target, svls_target
from densecal.terms import DualFocal, Focal

WEIGHTS = [0.5, 1.0, 3.0]
TERMS = {"focal": Focal, "dual": DualFocal}
each_term = pytest.mark.parametrize("name", TERMS)


def targets(case, activation="softmax"):
    dims = case.label_map.ndim - 1
    soft = one_hot_target(case.soft_labels, 3, activation=activation, spatial_dims=dims, dtype=torch.float64)
    if activation == "sigmoid":
        return {"soft": soft}
    options = {"spatial_dims": dims, "dtype": torch.float64}
    return {"hard": one_hot_target(case.label_map, 3, **options), "svls": svls_target(case.label_map, 3, **options), "soft": soft}


def test_by_hand():
    # p = (0.5, 0.3, 0.2), label 0: distance 0.5, with the runner-up 0.8; label 2: distance 0.8, no class is less probable.
    logits = torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 3, 1).expand(1, 3, 2)
    label_map = torch.tensor([[0, 2]])
    first, second = -math.log(0.5), -math.log(0.2)
    assert FocalLoss()(logits, label_map).item() == pytest.approx((0.5**2 * first + 0.8**2 * second) / 2)
    assert DualFocalLoss()(logits, label_map).item() == pytest.approx((0.8**2 * first + 0.8**2 * second) / 2)


@each_dimension
@each_term
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_matches_the_loops(spatial, name, gamma):
    case = make_case(spatial)
    of_pixel = reference.focal(gamma, dual=name == "dual")
    for target in targets(case).values():
        expected = reference.over_pixels(case.logits, target.probs, case.valid, of_pixel, WEIGHTS)
        value = TERMS[name](gamma=gamma, class_weights=WEIGHTS, reduction="sum")(case.logits, target)
        assert value.item() == pytest.approx(expected, rel=1e-6)
    target = targets(case, "sigmoid")["soft"]
    expected = reference.over_pixels(case.logits, target.probs, case.valid, reference.over_channels(of_pixel), WEIGHTS)
    value = TERMS[name](gamma=gamma, class_weights=WEIGHTS, reduction="sum")(case.logits, target)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    mean = TERMS[name](gamma=gamma, class_weights=WEIGHTS)(case.logits, target)
    assert mean.item() == pytest.approx(expected / (3 * case.valid.sum().item()), rel=1e-6)


def test_equal_probabilities_are_no_runner_up():
    # p = (0.3, 0.3, 0.3, 0.1): below each of the equal ones comes 0.1.
    logits = torch.tensor([0.3, 0.3, 0.3, 0.1], dtype=torch.float64).log().reshape(1, 4, 1)
    values = [DualFocalLoss()(logits, torch.tensor([[label]])).item() for label in range(4)]
    assert values == pytest.approx([0.8**2 * -math.log(0.3)] * 3 + [0.9**2 * -math.log(0.1)])


@each_term
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gamma_zero_is_cross_entropy(name, activation):
    case = make_case((5, 7))
    loss = {"focal": FocalLoss, "dual": DualFocalLoss}[name]
    options = {"activation": activation, "class_weights": WEIGHTS}
    for target in (case.soft_labels, *([case.label_map] if activation == "softmax" else [])):
        torch.testing.assert_close(loss(gamma=0.0, **options)(case.logits, target), CrossEntropyLoss(**options)(case.logits, target))


@each_term
def test_class_permutation_leaves_the_value(name):
    case = make_case((5, 7))
    order = torch.tensor([2, 0, 1])
    relabelled = torch.where(case.valid, order.argsort()[case.label_map.clamp_min(0)], -100)
    loss = {"focal": FocalLoss, "dual": DualFocalLoss}[name]()
    torch.testing.assert_close(loss(case.logits[:, order], relabelled), loss(case.logits, case.label_map))


@each_term
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_is_right_and_zero_at_ignored_pixels(name, activation):
    case = make_case((2, 3), seed=3)
    assert not case.valid.all()
    for target in targets(case, activation).values():
        logits = case.logits.clone().requires_grad_()
        term = TERMS[name](gamma=1.5, class_weights=WEIGHTS)
        assert torch.autograd.gradcheck(lambda z, term=term, target=target: term(z, target), logits)
        term(logits, target).backward()
        assert logits.grad is not None
        assert not logits.grad.movedim(1, -1)[~case.valid].any()


@each_term
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certainty_is_finite(name, gamma):
    logits = torch.tensor([[[200.0], [-200.0]]], requires_grad=True)
    for label in (0, 1):
        value = TERMS[name](gamma=gamma)(logits, one_hot_target(torch.tensor([[label]]), 2))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_options_are_checked():
    with pytest.raises(ValueError, match="Expected `gamma` to be 0 or greater"):
        FocalLoss(gamma=-1.0)
    with pytest.raises(ValueError, match="Expected `reduction` to be one of"):
        Focal(reduction="avg")
