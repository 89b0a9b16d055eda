"""Uncertainty-error overlap per case and threshold."""

import itertools
import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import UncertaintyErrorOverlap, uncertainty_error_overlap

KINDS = ("entropy", "confidence")


def loop_overlap(probs, label, valid, uncertainty, thresholds):
    """Dice of two sets of pixels, for one case: probs (C, P), label and valid (P,)."""
    c, p = probs.shape
    row = []
    for tau in thresholds:
        uncertain, wrong = set(), set()
        for j in range(p):
            if not valid[j]:
                continue
            q = probs[:, j].tolist()
            u = 1 - max(q) if uncertainty == "confidence" else -sum(a * math.log(a) for a in q if a > 0) / math.log(c)
            if u > tau:
                uncertain.add(j)
            if int(probs[:, j].argmax()) != int(label[j]):
                wrong.add(j)
        size = len(uncertain) + len(wrong)
        row.append(2 * len(uncertain & wrong) / size if size else math.nan)
    return row


def test_uncertainty_error_overlap_by_hand():
    # 1 - max is 0.1, 0.3, 0.4, 0.2; wrong are the second and the last.
    probs = torch.tensor([[[0.9, 0.7, 0.6, 0.2], [0.1, 0.3, 0.4, 0.8]]], dtype=torch.float64)
    overlap = uncertainty_error_overlap(probs, torch.tensor([[0, 1, 0, 0]]), uncertainty="confidence", thresholds=[0.0, 0.15, 0.25, 0.35, 0.45])
    expected = [2 * 2 / (4 + 2), 2 * 2 / (3 + 2), 2 * 1 / (2 + 2), 0 / (1 + 2), 0 / (0 + 2)]
    torch.testing.assert_close(overlap, torch.tensor([expected], dtype=torch.float64))


def test_uncertainty_error_overlap_threshold_is_not_exceeded_by_itself():
    probs = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]], dtype=torch.float64)
    overlap = uncertainty_error_overlap(probs, torch.tensor([[1, 1]]), uncertainty="confidence", thresholds=[0.25])
    assert overlap.item() == pytest.approx(2 * 1 / (1 + 2))


@each_dimension
@pytest.mark.parametrize("uncertainty", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_uncertainty_error_overlap_equals_a_loop(spatial, uncertainty, soft):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    thresholds = [0.05, 0.3, 0.5, 0.9]
    label = case.soft_labels if soft else case.label_map
    classes = case.soft_labels.argmax(1) if soft else case.label_map
    expected = [loop_overlap(probs[i].flatten(1), classes[i].flatten(), case.valid[i].flatten(), uncertainty, thresholds) for i in range(len(probs))]
    overlap = uncertainty_error_overlap(probs, label, uncertainty=uncertainty, thresholds=thresholds)
    torch.testing.assert_close(overlap, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("uncertainty", KINDS)
def test_uncertainty_error_overlap_metric_means_over_cases_that_have_a_value(uncertainty):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.label_map
    probs[4] = torch.nn.functional.one_hot(label[4].clamp(min=0), 3).movedim(-1, 0)  # certain and right: no value anywhere
    overlap = uncertainty_error_overlap(probs, label, uncertainty=uncertainty)
    assert overlap[4].isnan().all()
    metric = UncertaintyErrorOverlap(uncertainty=uncertainty)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    result = metric.compute()
    torch.testing.assert_close(result.overlap, overlap.nanmean(0))
    assert torch.equal(result.num_cases, (~overlap.isnan()).sum(0))
    assert result.best_overlap == result.overlap.max()
    assert result.best_threshold == result.threshold[result.overlap.argmax()]
    torch.testing.assert_close(result.threshold, torch.arange(1, 20, dtype=torch.float64) / 20)


def test_uncertainty_error_overlap_ignored_pixels_have_no_influence():
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    for uncertainty in KINDS:
        expected = uncertainty_error_overlap(probs, case.label_map, uncertainty=uncertainty)
        assert torch.equal(uncertainty_error_overlap(other, case.label_map, uncertainty=uncertainty), expected)
        masked = uncertainty_error_overlap(other, case.label_map.clamp(min=0), uncertainty=uncertainty, mask=case.valid)
        assert torch.equal(masked, expected)


def test_uncertainty_error_overlap_nothing_valid_is_nan():
    metric = UncertaintyErrorOverlap()
    metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
    result = metric.compute()
    assert result.overlap.isnan().all()
    assert result.best_threshold.isnan()
    assert result.best_overlap.isnan()
    assert result.num_cases.sum() == 0


def test_uncertainty_error_overlap_one_region_equals_two_classes():
    case = make_case((5, 7), num_classes=2)
    probs = case.logits.softmax(1)
    as_region = uncertainty_error_overlap(probs[:, 1:], case.label_map.unsqueeze(1), activation="sigmoid")
    torch.testing.assert_close(as_region, uncertainty_error_overlap(probs, case.label_map), equal_nan=True)


def test_uncertainty_error_overlap_counts_regions_of_a_case_together():
    # Two regions of two pixels: uncertain are one each, wrong the first of the first region.
    probs = torch.tensor([[[0.4, 0.9], [0.1, 0.55]]], dtype=torch.float64)
    there = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    overlap = uncertainty_error_overlap(probs, there, uncertainty="confidence", thresholds=[0.3], activation="sigmoid")
    assert overlap.item() == pytest.approx(2 * 1 / (2 + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uncertainty_error_overlap_precision(dtype):
    case = make_case((9, 11))
    probs = case.logits.softmax(1)
    expected = uncertainty_error_overlap(probs, case.label_map, thresholds=[0.3, 0.6])
    torch.testing.assert_close(uncertainty_error_overlap(probs.to(dtype), case.label_map, thresholds=[0.3, 0.6]), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *itertools.product(
            [{"thresholds": []}, {"thresholds": [0.5, 0.5]}, {"thresholds": [0.5, 1.0]}, {"thresholds": [-0.1]}], ["Expected rising `thresholds`"]
        ),
        ({"uncertainty": "variance"}, "Expected `uncertainty` to be one of"),
    ],
    ids=["none", "equal", "one", "negative", "unknown"],
)
def test_uncertainty_error_overlap_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_metric("uncertainty_error_overlap", **options)
    with pytest.raises(ValueError, match=message):
        uncertainty_error_overlap(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("uncertainty", KINDS)
def test_uncertainty_error_overlap_on_a_gpu_without_a_sync(uncertainty):
    case = make_case((5, 7), dtype=torch.float32)
    probs = case.logits.softmax(1)
    metric = UncertaintyErrorOverlap(uncertainty=uncertainty, validate_args=False).cuda()
    inputs = probs.cuda(), case.label_map.cuda()
    metric.update(*inputs)
    metric.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = uncertainty_error_overlap(probs, case.label_map, uncertainty=uncertainty).nanmean(0)
    torch.testing.assert_close(metric.compute().overlap.cpu(), expected, equal_nan=True)
