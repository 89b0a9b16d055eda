"""Negative log-likelihood and Brier score."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal.metrics import BrierScore, NegativeLogLikelihood, brier_score, negative_log_likelihood

PAIRS = [(negative_log_likelihood, NegativeLogLikelihood), (brier_score, BrierScore)]
each_rule = pytest.mark.parametrize(("function", "metric_class"), PAIRS, ids=["nll", "brier"])


def test_negative_log_likelihood_by_hand():
    probs = torch.tensor([[[0.8, 0.3, 0.5], [0.2, 0.7, 0.5]]], dtype=torch.float64)
    value = negative_log_likelihood(probs, torch.tensor([[0, 0, -100]]))
    assert value.item() == pytest.approx((-math.log(0.8) - math.log(0.3)) / 2)


def test_brier_score_by_hand():
    probs = torch.tensor([[[0.8, 0.3, 0.5], [0.2, 0.7, 0.5]]], dtype=torch.float64)
    value = brier_score(probs, torch.tensor([[0, 0, -100]]))
    assert value.item() == pytest.approx(((0.2**2 + 0.2**2) + (0.7**2 + 0.7**2)) / 2)


def test_scoring_rules_soft_reference_by_hand():
    probs = torch.tensor([[[0.8], [0.2]]], dtype=torch.float64)
    soft = torch.tensor([[[0.6], [0.4]]], dtype=torch.float64)
    assert negative_log_likelihood(probs, soft).item() == pytest.approx(-0.6 * math.log(0.8) - 0.4 * math.log(0.2))
    assert brier_score(probs, soft).item() == pytest.approx(0.2**2 + 0.2**2)
    assert brier_score(soft, soft) == 0


@each_dimension
def test_negative_log_likelihood_equals_cross_entropy(spatial):
    case = make_case(spatial)
    expected = torch.nn.functional.cross_entropy(case.logits, case.label_map)
    torch.testing.assert_close(negative_log_likelihood(case.logits.softmax(1), case.label_map), expected)


def test_negative_log_likelihood_one_certain_mistake_stays_finite():
    value = negative_log_likelihood(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0]]))
    assert value.item() == pytest.approx(-math.log(1e-12), rel=1e-6)


@each_rule
@each_dimension
def test_scoring_rules_batch_by_batch_equals_at_once(function, metric_class, spatial):
    case = make_case(spatial, batch=4)
    for label in (case.label_map, case.soft_labels):
        metric = metric_class()
        for part, labels in zip(case.logits.softmax(1).split([3, 1]), label.split([3, 1]), strict=True):
            metric.update(part, labels)
        torch.testing.assert_close(metric.compute(), function(case.logits.softmax(1), label), rtol=1e-13, atol=0)
        assert metric.count == case.valid.sum()


@each_rule
def test_scoring_rules_ignored_pixels_have_no_influence(function, metric_class):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    for label in (case.label_map, case.soft_labels):
        assert torch.equal(function(probs.masked_fill(~case.valid.unsqueeze(1), torch.nan), label), function(probs, label))


@each_rule
def test_scoring_rules_nothing_valid_is_nan(function, metric_class):
    metric = metric_class()
    metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
    assert metric.compute().isnan()
    assert metric.count == 0


@each_rule
@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_scoring_rules_one_sigmoid_channel_is_two_softmax_channels(function, metric_class, spatial, soft):
    case = make_case(spatial, num_classes=2)
    two = case.logits.softmax(1)
    one, label = two[:, 1:], case.soft_labels[:, 1:] if soft else case.label_map
    expected = function(two, case.soft_labels if soft else label)
    torch.testing.assert_close(function(one, label, activation="sigmoid"), expected)
    metric = metric_class(activation="sigmoid")
    metric.update(one, label)
    torch.testing.assert_close(metric.compute(), expected)


def test_scoring_rules_regions_by_hand():
    # One pixel, two regions: 0.9 and there, 0.3 and not there.
    probs, label = torch.tensor([[[0.9], [0.3]]], dtype=torch.float64), torch.tensor([[[1], [0]]])
    value = negative_log_likelihood(probs, label, activation="sigmoid")
    assert value.item() == pytest.approx((-math.log(0.9) - math.log(0.7)) / 2)
    binary = torch.nn.functional.binary_cross_entropy(probs, label.double())
    torch.testing.assert_close(value, binary)
    assert brier_score(probs, label, activation="sigmoid").item() == pytest.approx((2 * 0.1**2 + 2 * 0.3**2) / 2)


def test_scoring_rules_unknown_activation():
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        BrierScore(activation="tanh")
