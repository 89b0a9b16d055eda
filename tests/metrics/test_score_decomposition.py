"""The Brier score and its parts."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import BrierScoreDecomposition, brier_decomposition, brier_score

KINDS = ("top_label", "classwise")


def loop_decomposition(probs, shares, valid, kind, num_bins):
    """Sums over classes of score, calibration and refinement, bin by bin, the latter as a variance."""
    n, c, p = probs.shape
    brier = calibration = refinement = 0.0
    for k in range(c) if kind == "classwise" else [None]:
        cells = [[] for _ in range(num_bins)]
        for i in range(n):
            for j in range(p):
                if valid[i, j]:
                    cls = int(probs[i, :, j].argmax()) if k is None else k
                    confidence = float(probs[i, cls, j])
                    cells[min(max(math.ceil(confidence * num_bins) - 1, 0), num_bins - 1)].append((confidence, float(shares[i, cls, j])))
        total = sum(len(cell) for cell in cells)
        brier += sum((a - q) ** 2 for cell in cells for a, q in cell) / total
        for cell in cells:
            if cell:
                gaps = [a - q for a, q in cell]
                mean = sum(gaps) / len(gaps)
                calibration += len(cell) / total * mean**2
                refinement += sum((gap - mean) ** 2 for gap in gaps) / total
    return brier, calibration, refinement


def test_brier_decomposition_by_hand():
    # Confidence 0.75 four times, three right; 0.95 twice, one right.
    top = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.95, 0.95], dtype=torch.float64)
    parts = brier_decomposition(torch.stack([top, 1 - top]).unsqueeze(0), torch.tensor([[0, 0, 0, 1, 0, 1]]))
    assert parts.calibration.item() == pytest.approx(4 / 6 * 0 + 2 / 6 * (0.95 - 1 / 2) ** 2)
    assert parts.refinement.item() == pytest.approx(4 / 6 * 3 / 4 * 1 / 4 + 2 / 6 * 1 / 2 * 1 / 2)
    assert parts.brier.item() == pytest.approx((3 * 0.25**2 + 0.75**2 + 0.05**2 + 0.95**2) / 6)


@each_dimension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_brier_decomposition_equals_a_loop(spatial, kind, soft):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    expected = loop_decomposition(probs.flatten(2), shares.flatten(2), case.valid.flatten(1), kind, 7)
    parts = brier_decomposition(probs, case.soft_labels if soft else case.label_map, kind=kind, num_bins=7)
    assert [part.item() for part in parts] == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(parts.calibration + parts.refinement, parts.brier)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_brier_decomposition_classwise_is_the_multi_class_score(soft):
    case = make_case((5, 7), num_classes=4)
    label = case.soft_labels if soft else case.label_map
    probs = case.logits.softmax(1)
    torch.testing.assert_close(brier_decomposition(probs, label, kind="classwise").brier, brier_score(probs, label))


def test_brier_decomposition_one_region_equals_two_classes():
    case = make_case((5, 7), num_classes=2)
    probs = case.logits.softmax(1)
    for kind in KINDS:
        as_region = brier_decomposition(probs[:, 1:], case.label_map.unsqueeze(1), kind=kind, activation="sigmoid")
        for ours, theirs in zip(as_region, brier_decomposition(probs, case.label_map, kind=kind), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_brier_decomposition_of_the_truth_has_no_calibration_part():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(1, 4, 200_000, generator=generator).mul(2).softmax(1)
    label = torch.multinomial(probs[0].T, 1, generator=generator).T
    parts = brier_decomposition(probs, label, kind="classwise")
    assert parts.calibration < 1e-3 < 0.1 < parts.refinement


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_brier_decomposition_batch_by_batch_equals_at_once(kind, soft):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    metric = BrierScoreDecomposition(kind=kind, num_classes=3)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    for ours, expected in zip(metric.compute(), brier_decomposition(probs, label, kind=kind), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert metric.count == case.valid.sum()
    forward = BrierScoreDecomposition(kind=kind, num_classes=3)(probs, label)
    torch.testing.assert_close(forward.brier, metric.compute().brier)


@pytest.mark.parametrize("kind", KINDS)
def test_brier_decomposition_ignored_pixels_have_no_influence(kind):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    expected = brier_decomposition(probs, case.label_map, kind=kind)
    assert brier_decomposition(other, case.label_map, kind=kind) == expected
    assert brier_decomposition(other, case.label_map.clamp(min=0), kind=kind, mask=case.valid) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_brier_decomposition_nothing_valid_is_nan(kind):
    metric = BrierScoreDecomposition(kind=kind, num_classes=2)
    metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
    assert all(part.isnan() for part in metric.compute())
    assert metric.count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_brier_decomposition_precision(dtype):
    case = make_case((9, 11))
    probs = case.logits.softmax(1)
    ours, exact = brier_decomposition(probs.to(dtype), case.label_map), brier_decomposition(probs, case.label_map)
    torch.testing.assert_close(ours.brier, exact.brier, atol=5e-3, rtol=0)
    torch.testing.assert_close(ours.calibration, exact.calibration, atol=0.03, rtol=0)  # a rounded confidence may change its bin


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "top"}, "Expected `kind` to be one of"), ({"num_bins": 0}, "Expected `num_bins`"), ({"kind": "classwise"}, "Expected `num_classes`")],
    ids=["kind", "bins", "classes"],
)
def test_brier_decomposition_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_metric("brier_decomposition", **options)


def test_brier_decomposition_function_errors():
    with pytest.raises(ValueError, match="Expected `kind` to be one of"):
        brier_decomposition(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]), kind="top")
    with pytest.raises(ValueError, match="Expected `probs` with 4 classes, but got 2"):
        BrierScoreDecomposition(kind="classwise", num_classes=4).update(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]))
