"""Penalties on the logits of each pixel: arithmetic, loops, identities, ignored pixels."""

import copy
import pickle
from functools import partial

import pytest
import reference_penalties as reference
import torch
from cases import each_dimension, make_case
from torch.nn import functional as F

from densecal.targets import label_smoothing_target, one_hot_target
from densecal.terms import AdaptiveConditionalMargin, CrossEntropy, LogitMargin, LogitPenalty, MaxSuppression, NegativeEntropy

PENALTIES = {
    "mbls": (partial(LogitMargin, margin=1.5), partial(reference.margin, m=1.5)),
    "mbls-squared": (partial(LogitMargin, margin=1.5, squared=True), partial(reference.margin, m=1.5, power=2)),
    "acls": (partial(AdaptiveConditionalMargin, margin=1.0, weight_others=0.5), partial(reference.acls, m=1.0, first=1.0, second=0.5)),
    "maxsup": (MaxSuppression, reference.maxsup),
    "entropy": (NegativeEntropy, reference.negative_entropy),
    "logit_penalty": (LogitPenalty, reference.half_square),
}
each_penalty = pytest.mark.parametrize("name", PENALTIES)


def hard(case):
    return one_hot_target(case.label_map, 3, spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


def regions(case):
    labels = torch.where(case.valid.unsqueeze(1), (case.soft_labels > 0.3).long(), -100)
    return one_hot_target(labels, 3, activation="sigmoid", spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)


@each_penalty
@each_dimension
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_penalty_matches_the_loops(name, spatial, activation):
    case = make_case(spatial)
    make, formula = PENALTIES[name]
    sigmoid = activation == "sigmoid"
    expected = reference.mean_over_pixels(case.logits, case.valid, formula, sigmoid=sigmoid)
    assert expected != 0
    assert make()(case.logits, regions(case) if sigmoid else hard(case)).item() == pytest.approx(expected, rel=1e-12)


def test_penalties_by_hand():
    logits, target = torch.tensor([[[3.0], [1.0], [-1.0]]]), one_hot_target(torch.tensor([[1]]), 3)
    assert LogitMargin(margin=1.0)(logits, target).item() == pytest.approx((0 + 1 + 3) / 3)
    assert LogitMargin(margin=1.0, squared=True)(logits, target).item() == pytest.approx((0 + 1 + 9) / 3)
    assert AdaptiveConditionalMargin(margin=1.0)(logits, target).item() == pytest.approx(2**2 + 0.1 * (1 + 9) / 2)
    assert MaxSuppression()(logits, target).item() == pytest.approx(3 - 1)
    assert LogitPenalty()(logits, target).item() == pytest.approx((9 + 1 + 1) / 2)
    assert NegativeEntropy()(torch.zeros(1, 4, 1), one_hot_target(torch.tensor([[0]]), 4)).item() == pytest.approx(-1.3862944)


@each_penalty
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_is_right_and_zero_at_ignored_pixels(name, activation):
    case = make_case((2, 3), seed=3)
    term, target = PENALTIES[name][0](), (hard if activation == "softmax" else regions)(case)
    logits = case.logits.requires_grad_()
    if name != "acls":  # its stop gradient is no derivative of its value
        assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert not case.valid.all()
    assert logits.grad is not None
    assert logits.grad.any()
    at_ignored = logits.grad.movedim(1, -1)[~case.valid]
    assert torch.equal(at_ignored, torch.zeros_like(at_ignored))


def test_gradient_of_the_others_hinge_leaves_the_largest_alone():
    # Distances 4 and 6 exceed the margin 1 by 3 and 5: -2 * 3 / 2 and -2 * 5 / 2 on the others, nothing on the largest.
    logits = torch.tensor([[[5.0], [1.0], [-1.0]]], requires_grad=True)
    AdaptiveConditionalMargin(weight_largest=0.0, weight_others=1.0, margin=1.0)(logits, one_hot_target(torch.tensor([[1]]), 3)).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [0.0, -3.0, -5.0]


def test_acls_gradient_with_a_constant_for_the_stopped_maximum():
    case = make_case((2, 3), ignored=0.0)
    largest = case.logits.amax(1, keepdim=True)

    def formula(z):
        others = F.relu(largest - z - 1.0).square().sum(1) / 2
        return (F.relu(z.amax(1) - 1.0).square() + 0.5 * others).mean()

    a, b = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
    formula(a).backward()
    AdaptiveConditionalMargin(margin=1.0, weight_others=0.5)(b, hard(case)).backward()
    torch.testing.assert_close(a.grad, b.grad)


@each_penalty
def test_class_order_and_soft_labels_do_not_matter(name):
    case = make_case((5, 7))
    term = PENALTIES[name][0]()
    expected = term(case.logits, hard(case))
    torch.testing.assert_close(term(case.logits[:, [2, 0, 1]], hard(case)), expected)
    torch.testing.assert_close(term(case.logits, one_hot_target(case.soft_labels, 3, dtype=torch.float64)), expected)


@each_penalty
def test_volume_repeated_along_depth_gives_the_image(name):
    case = make_case((5, 7))
    term = PENALTIES[name][0]()
    volume = one_hot_target(case.label_map.unsqueeze(1).expand(-1, 4, -1, -1), 3, spatial_dims=3, dtype=torch.float64)
    torch.testing.assert_close(term(case.logits.unsqueeze(2).expand(-1, -1, 4, -1, -1), volume), term(case.logits, hard(case)))


@each_penalty
def test_sigmoid_is_a_softmax_over_there_and_not_there(name):
    case = make_case((5, 7))
    term, z = PENALTIES[name][0](), case.logits[:, :1]
    one = torch.where(case.valid, case.label_map.clamp(0, 1), -100)
    there = one_hot_target(one.unsqueeze(1), 1, activation="sigmoid", dtype=torch.float64)
    pair = one_hot_target(one, 2, dtype=torch.float64)
    torch.testing.assert_close(term(z, there), term(torch.cat([-z / 2, z / 2], 1), pair))


def test_shift_of_all_logits_is_free_where_it_should_be():
    case = make_case((5, 7))
    for name in ("mbls", "mbls-squared", "maxsup", "entropy"):
        term = PENALTIES[name][0]()
        torch.testing.assert_close(term(case.logits + 3.0, hard(case)), term(case.logits, hard(case)))


def test_margin_zero_is_the_distance_itself_and_a_wide_one_is_free():
    case = make_case((5, 7))
    target = hard(case)
    # mean_c (max - z_c) = max - mean z
    torch.testing.assert_close(LogitMargin(margin=0.0)(case.logits, target), MaxSuppression()(case.logits, target))
    assert LogitMargin(margin=100.0)(case.logits, target).item() == 0.0
    assert AdaptiveConditionalMargin(margin=100.0)(case.logits, target).item() == 0.0


def test_max_suppression_is_label_smoothing_where_the_label_is_the_largest():
    case = make_case((5, 7), ignored=0.0)
    right = one_hot_target(case.logits.argmax(1), 3, dtype=torch.float64)
    smoothed = label_smoothing_target(case.logits.argmax(1), 3, smoothing=0.1, dtype=torch.float64)
    ce = CrossEntropy()
    torch.testing.assert_close(ce(case.logits, smoothed) - ce(case.logits, right), 0.1 * MaxSuppression()(case.logits, right))


def test_tied_maxima_count_once():
    logits, target = torch.full((1, 3, 1), 2.0, requires_grad=True), one_hot_target(torch.tensor([[0]]), 3)
    value = AdaptiveConditionalMargin(margin=1.0)(logits, target)
    value.backward()
    assert value.item() == 1.0
    assert logits.grad is not None
    assert logits.grad.sum().item() == pytest.approx(2.0)


@each_penalty
def test_reductions_copies_and_no_valid_pixel(name):
    case = make_case((5, 7))
    make = PENALTIES[name][0]
    parts = {r: make(reduction=r)(case.logits, hard(case)) for r in ("mean", "sum", "none")}
    assert parts["none"].shape == case.label_map.shape
    assert not parts["none"][~case.valid].any()
    torch.testing.assert_close(parts["none"].sum(), parts["sum"])
    torch.testing.assert_close(parts["sum"] / case.valid.sum(), parts["mean"])
    for twin in (copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        assert torch.equal(twin(case.logits, hard(case)), parts["mean"])
    empty, logits = make_case((5, 7), ignored=1.1), case.logits.requires_grad_()
    value = make()(logits, hard(empty))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitMargin(margin=-1.0), "Expected `margin` to be 0 or greater"),
        (lambda: LogitMargin(reduction="avg"), "Expected `reduction` to be one of"),
        (lambda: AdaptiveConditionalMargin(weight_others=-1.0), "Expected `weight_others` to be 0 or greater"),
        (lambda: AdaptiveConditionalMargin(margin=-1.0), "Expected `margin` to be 0 or greater"),
        (lambda: NegativeEntropy(reduction="avg"), "Expected `reduction` to be one of"),
        (lambda: MaxSuppression(reduction="avg"), "Expected `reduction` to be one of"),
        (lambda: LogitPenalty(reduction="avg"), "Expected `reduction` to be one of"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
