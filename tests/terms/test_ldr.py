"""Label-distributionally robust loss: arithmetic, loops, its two limits, precision."""

import math

import pytest
import reference_terms as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CrossEntropyLoss, LDRLoss
from densecal.targets import one_hot_target, svls_target
from densecal.terms import LDRKL

WEIGHTS = [0.5, 1.0, 3.0]
each_activation = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def targets(case, activation="softmax"):
    options = {"spatial_dims": case.label_map.ndim - 1, "dtype": torch.float64}
    soft = one_hot_target(case.soft_labels, 3, activation=activation, **options)
    return [soft] if activation == "sigmoid" else [one_hot_target(case.label_map, 3, **options), svls_target(case.label_map, 3, **options), soft]


def test_by_hand():
    # z = (1, 0), label 1, c = 1: gaps 2 and 0. lambda = 2: 2 log((e + 1) / 2).
    logits, label_map = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[1]])
    assert LDRLoss(temperature=2.0)(logits, label_map).item() == pytest.approx(2 * math.log((math.e + 1) / 2))
    # Soft label (1/4, 3/4): label 0 has gaps 0 and 0, that is 0.
    assert LDRLoss(temperature=2.0)(logits, torch.tensor([[[0.25], [0.75]]])).item() == pytest.approx(0.75 * 2 * math.log((math.e + 1) / 2))


@each_dimension
@each_activation
@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "margin": 1.0}, {"temperature": 0.2, "margin": 2.0}, {"temperature": 1.5, "margin": 0.5, "adapt": 0.8}],
    ids=["default", "cold", "adaptive"],
)
def test_matches_the_loops(spatial, activation, options):
    case = make_case(spatial)
    of_pixel = reference.ldr_kl(**options)
    if activation == "sigmoid":
        of_pixel = reference.over_channels(of_pixel)
    for target in targets(case, activation):
        expected = reference.over_pixels(case.logits, target.probs, case.valid, of_pixel, WEIGHTS)
        assert LDRKL(class_weights=WEIGHTS, reduction="sum", **options)(case.logits, target).item() == pytest.approx(expected, rel=1e-6)


@each_activation
def test_without_margin_it_is_cross_entropy_less_log_c(activation):
    case = make_case((5, 7))
    constant = math.log(3 if activation == "softmax" else 2)
    value = LDRLoss(margin=0.0, activation=activation)(case.logits, case.soft_labels)
    torch.testing.assert_close(value, CrossEntropyLoss(activation=activation)(case.logits, case.soft_labels) - constant)


@pytest.mark.parametrize("adapt", [None, 1.0])
def test_cold_it_is_the_hinge(adapt):
    case = make_case((5, 7), ignored=0.0)
    own = torch.nn.functional.one_hot(case.label_map, 3).movedim(-1, 1)
    hinge = (case.logits - (case.logits * own).sum(1, keepdim=True) + 2.0 * (1 - own)).amax(1)
    for temperature in (1e-2, 1e-4):
        value = LDRLoss(temperature=temperature, margin=2.0, adapt=adapt, reduction="none")(case.logits, case.label_map)
        torch.testing.assert_close(value, hinge, rtol=0, atol=1.001 * temperature * math.log(3))


def test_adaptive_form_is_fixed_for_large_a():
    case = make_case((5, 7))
    torch.testing.assert_close(LDRLoss(adapt=1e12)(case.logits, case.label_map), LDRLoss()(case.logits, case.label_map))


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_single_precision_is_enough_where_the_prediction_is_sure(temperature):
    logits = torch.tensor([[[9.0, 30.0], [0.0, 1.0], [-3.0, 1.0]]], dtype=torch.float64)
    for label in range(3):
        q = torch.zeros(1, 3, 2, dtype=torch.float64)
        q[:, label] = 1.0
        exact, single = (LDRLoss(temperature=temperature, reduction="none")(logits.to(d), q.to(d)) for d in (torch.float64, torch.float32))
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_class_permutation_leaves_the_value():
    case = make_case((5, 7))
    order = torch.tensor([2, 0, 1])
    relabelled = torch.where(case.valid, order.argsort()[case.label_map.clamp_min(0)], -100)
    for loss in (LDRLoss(), LDRLoss(adapt=1.0)):
        torch.testing.assert_close(loss(case.logits[:, order], relabelled), loss(case.logits, case.label_map))


@each_activation
def test_gradient_is_right_and_zero_at_ignored_pixels(activation):
    case = make_case((2, 3), seed=3)
    assert not case.valid.all()
    for target in targets(case, activation):
        logits = case.logits.clone().requires_grad_()
        term = LDRKL(temperature=0.7, class_weights=WEIGHTS)
        assert torch.autograd.gradcheck(lambda z, term=term, target=target: term(z, target), logits)
        for term in (LDRKL(), LDRKL(adapt=1.0)):
            (gradient,) = torch.autograd.grad(term(logits, target), logits)
            assert gradient.any()
            assert not gradient.movedim(1, -1)[~case.valid].any()


def test_no_gradient_flows_through_the_adapted_temperature():
    logits = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    p = math.exp(2.0) / (1 + math.exp(2.0))  # gaps 2 and 0 at label 1
    divergence = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    own = 1 - divergence / math.log(2.0)
    (gradient,) = torch.autograd.grad(LDRLoss(adapt=1.0)(logits, torch.tensor([[1]])), logits)
    # d/dz_0 of own * log(exp((z_0 - z_1 + 1) / own) + 1) with own held.
    expected = 1 / (1 + math.exp(-2.0 / own))
    assert gradient.flatten().tolist() == pytest.approx([expected, -expected])


def test_options_are_checked():
    for options, message in [
        ({"temperature": 0.0}, "Expected `temperature` to be greater than 0"),
        ({"margin": -1.0}, "Expected `margin` to be 0 or greater"),
        ({"adapt": 0.0}, "Expected `adapt` to be greater than 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LDRLoss(**options)
