"""Dice at several thresholds: arithmetic, loops, thresholds that shares hit exactly, nothing there."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal.labels import LabelSchema
from densecal.metrics import QUBIQ_THRESHOLDS, QubiqDice, SegmentationEvaluation, dice_score, qubiq_dice
from densecal.targets import rater_mean_target


def loops(probs, shares, valid, thresholds):
    """The formula for one case and class, pixel by pixel."""
    pixels = [(p, q) for p, q, v in zip(probs.flatten().tolist(), shares.flatten().tolist(), valid.flatten().tolist(), strict=True) if v]
    if not any(p >= thresholds[0] or q >= thresholds[0] for p, q in pixels):
        return math.nan
    scores = []
    for t in thresholds:
        predicted, there = sum(p >= t for p, _ in pixels), sum(q >= t for _, q in pixels)
        both = sum(p >= t and q >= t for p, q in pixels)
        scores.append(2 * both / (predicted + there) if predicted + there else 1.0)
    return sum(scores) / len(scores)


def test_by_hand():
    # Three raters, shares 1, 2/3, 1/3, 0. Prediction 1, 0.4, 0.4, 0.
    shares = torch.tensor([1, 2 / 3, 1 / 3, 0.0])
    probs = torch.tensor([1, 0.4, 0.4, 0.0])
    both = [torch.stack([1 - x, x])[None] for x in (probs, shares)]
    # t <= 0.3: 3 and 3, all common. 0.4: 3 and 2. 0.5 and 0.6: 1 and 2. Above: 1 and 1.
    expected = (3 * 1 + 2 * 2 / (3 + 2) + 2 * (2 * 1 / (1 + 2)) + 3 * 1) / 9
    assert qubiq_dice(*both)[0, 1].item() == pytest.approx(expected)


@each_dimension
@pytest.mark.parametrize("thresholds", [QUBIQ_THRESHOLDS, (0.25, 1.0)], ids=["qubiq", "two"])
def test_equals_loops(spatial, thresholds):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    scores = qubiq_dice(probs, case.soft_labels, thresholds=thresholds)
    assert scores.shape == (2, 3)
    for n in range(2):
        for c in range(3):
            expected = loops(probs[n, c], case.soft_labels[n, c], case.valid[n], thresholds)
            assert scores[n, c].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("raters", range(1, 11))
def test_shares_of_raters_reach_the_threshold_that_they_are(raters):
    """k of R raters reach t = k / R though their mean in single precision may be a little less."""
    votes = torch.arange(raters + 1)
    labels = (votes.unsqueeze(0) > torch.arange(raters).unsqueeze(1)).long().unsqueeze(0)  # pixel k has k votes
    shares = rater_mean_target(labels, 2).probs
    for t in range(1, 10):
        reached = torch.where(10 * votes >= t * raters, 1.0, 0.0)
        exact = torch.stack([1 - reached, reached]).unsqueeze(0)
        assert qubiq_dice(exact, shares, thresholds=[t / 10])[0, 1] == 1


def test_hard_labels_and_certain_predictions_give_the_dice():
    case = make_case((5, 7))
    certain = torch.nn.functional.one_hot(case.logits.argmax(1), 3).movedim(-1, 1).double()
    torch.testing.assert_close(qubiq_dice(certain, case.label_map), dice_score(certain, case.label_map), equal_nan=True)


def test_the_reference_itself_is_one():
    case = make_case((5, 7))
    assert torch.equal(qubiq_dice(case.soft_labels.abs().clamp(max=1), case.soft_labels, validate_args=False), torch.ones(2, 3).double())


def test_regions_count_like_two_classes():
    generator = torch.Generator().manual_seed(0)
    probs, shares = torch.rand(2, 1, 5, 7, generator=generator), torch.rand(2, 1, 5, 7, generator=generator)
    one = qubiq_dice(probs, shares, activation="sigmoid")
    two = qubiq_dice(torch.cat([1 - probs, probs], 1), torch.cat([1 - shares, shares], 1))
    torch.testing.assert_close(one[:, 0], two[:, 1])
    overlapping = qubiq_dice(probs.repeat(1, 3, 1, 1), shares.repeat(1, 3, 1, 1), activation="sigmoid")
    torch.testing.assert_close(overlapping, one.repeat(1, 3))


def test_nothing_that_reaches_a_threshold_has_no_value():
    probs = torch.tensor([[[0.95, 0.95], [0.05, 0.05]]])
    scores = qubiq_dice(probs, probs)
    assert scores[0, 0] == 1
    assert scores[0, 1].isnan()
    assert qubiq_dice(probs, torch.full((1, 2, 2), -100.0)).isnan().all()


def test_metric_is_the_mean_over_cases():
    case = make_case((5, 7), batch=4)
    probs = case.logits.softmax(1)
    metric, per_class = QubiqDice(3), QubiqDice(3, average="none", thresholds=[0.5])
    for part in ([0], [1, 2, 3]):
        metric.update(probs[part], case.soft_labels[part])
        per_class.update(probs[part], case.soft_labels[part])
    assert metric.compute().item() == pytest.approx(qubiq_dice(probs, case.soft_labels)[:, 1:].mean().item())
    torch.testing.assert_close(per_class.compute(), qubiq_dice(probs, case.soft_labels, thresholds=[0.5]).nanmean(0))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_evaluation_has_the_scores_of_soft_references(activation):
    case = make_case((5, 7), batch=3)
    probs, shares = (case.logits.softmax(1), case.soft_labels)
    background = 0 if activation == "softmax" else None
    evaluation = SegmentationEvaluation(LabelSchema(("a", "b", "c"), background=background, activation=activation))
    evaluation.update(probs, shares, torch.arange(3))
    result = evaluation.compute()
    scores = qubiq_dice(probs, shares, activation=activation)
    assert [row["qubiq_dice/b"] for row in result.cases] == pytest.approx(scores[:, 1].tolist())
    counted = scores[:, 1:] if activation == "softmax" else scores
    assert result.mean["qubiq_dice"] == pytest.approx(counted.mean().item())
    for row, valid, p, q in zip(result.cases, case.valid, probs, shares, strict=True):
        for c, name in enumerate("abc"):
            total, gap = float((p[c] + q[c])[valid].sum()), float((p[c] - q[c])[valid].abs().sum())
            assert row[f"soft_iou/{name}"] == pytest.approx((total - gap) / (total + gap))
            assert row[f"soft_dice/{name}"] == pytest.approx((total - gap) / total)
    for key in ("qubiq_dice", "soft_iou", "soft_dice"):
        assert result.definitions[key].count(".") >= 1
        assert result.definitions[f"{key}/<class>"]


@pytest.mark.parametrize("thresholds", [[], [0.0, 0.5], [0.5, 0.5], [0.5, 0.2], [0.5, 1.5]], ids=str)
def test_thresholds_are_checked(thresholds):
    with pytest.raises(ValueError, match=r"Expected `thresholds` in \(0, 1\]"):
        QubiqDice(2, thresholds=thresholds)
