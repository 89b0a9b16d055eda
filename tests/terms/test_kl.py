"""Kullback-Leibler divergence: arithmetic, loops, identities."""

import math

import pytest
import reference_terms as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CrossEntropyLoss, KLLoss
from densecal.targets import one_hot_target, svls_target
from densecal.terms import KLDivergence

WEIGHTS = [0.5, 1.0, 3.0]
each_activation = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def soft(case, activation="softmax"):
    return one_hot_target(case.soft_labels, 3, activation=activation, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


def test_by_hand():
    # q = (3/4, 1/4), z / T = (log 4, 0) / 2, so p = (2/3, 1/3).
    logits = torch.tensor([[[math.log(4.0)], [0.0]]])
    expected = 4 * (0.75 * math.log(0.75 * 3 / 2) + 0.25 * math.log(0.25 * 3))
    assert KLLoss(temperature=2.0)(logits, torch.tensor([[[0.75], [0.25]]])).item() == pytest.approx(expected, rel=1e-5)
    # A label is sure of itself, 0 log 0 = 0: what is left is cross-entropy.
    assert KLLoss()(logits, torch.tensor([[1]])).item() == pytest.approx(math.log(5.0))


@each_dimension
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_matches_the_loops(spatial, temperature):
    case = make_case(spatial)
    dims = len(spatial)
    hard = [make(case.label_map, 3, spatial_dims=dims, dtype=torch.float64) for make in (one_hot_target, svls_target)]
    for target in (*hard, soft(case)):
        expected = reference.over_pixels(case.logits, target.probs, case.valid, reference.kl(temperature), WEIGHTS)
        value = KLDivergence(temperature=temperature, class_weights=WEIGHTS, reduction="sum")(case.logits, target)
        assert value.item() == pytest.approx(expected, rel=1e-6)
    target = soft(case, "sigmoid")
    expected = reference.over_pixels(case.logits, target.probs, case.valid, reference.over_channels(reference.kl(temperature)))
    value = KLDivergence(temperature=temperature)(case.logits, target)
    assert value.item() == pytest.approx(expected / (3 * case.valid.sum().item()), rel=1e-6)


@each_activation
def test_gradient_at_temperature_one_is_that_of_cross_entropy(activation):
    case = make_case((5, 7))
    gradients = []
    for loss in (KLLoss(activation=activation, class_weights=WEIGHTS), CrossEntropyLoss(activation=activation, class_weights=WEIGHTS)):
        logits = case.logits.clone().requires_grad_()
        loss(logits, case.soft_labels).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_is_zero_at_the_softened_teacher_and_nowhere_else():
    case = make_case((5, 7), ignored=0.0)
    loss = KLLoss(temperature=4.0)
    assert abs(loss(case.logits, (case.logits / 4).softmax(1)).item()) < 1e-12
    assert loss(case.logits, case.logits.softmax(1)).item() > 0.01


@each_activation
def test_gradient_is_right_and_zero_at_ignored_pixels(activation):
    case = make_case((2, 3), seed=3)
    logits = case.logits.requires_grad_()
    target = soft(case, activation)
    term = KLDivergence(temperature=2.0, class_weights=WEIGHTS)
    assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert logits.grad is not None
    assert not case.valid.all()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


def test_options_are_checked():
    with pytest.raises(ValueError, match="Expected `temperature` to be greater than 0"):
        KLLoss(temperature=0.0)
