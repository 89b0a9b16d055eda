"""Expected calibration error against arithmetic, loops and other packages."""

import itertools
import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import ExpectedCalibrationError, expected_calibration_error

KINDS = ("top_label", "classwise")


def loop_ece(probs, shares, valid, kind, num_bins):
    """The formula, pixel by pixel. probs and shares (N, C, P), valid (N, P)."""
    n, c, p = probs.shape
    errors = []
    for k in range(c) if kind == "classwise" else [None]:
        cells = [[] for _ in range(num_bins)]
        for i, j in itertools.product(range(n), range(p)):
            if not valid[i, j]:
                continue
            cls = int(probs[i, :, j].argmax()) if k is None else k
            confidence = float(probs[i, cls, j])
            b = min(max(math.ceil(confidence * num_bins) - 1, 0), num_bins - 1)
            cells[b].append((confidence, float(shares[i, cls, j])))
        total = sum(len(cell) for cell in cells)
        errors.append(
            sum(len(cell) / total * abs(sum(a for a, _ in cell) / len(cell) - sum(s for _, s in cell) / len(cell)) for cell in cells if cell)
        )
    return sum(errors) / len(errors)


def test_expected_calibration_error_top_label_by_hand():
    # Five pixels, two classes, three bins: confidences 0.6, 0.65 in (1/3, 2/3]; 0.7, 0.76, 0.75 in (2/3, 1]. Right: first, third and last.
    top = torch.tensor([0.6, 0.65, 0.7, 0.76, 0.75], dtype=torch.float64)
    probs = torch.stack([top, 1 - top]).unsqueeze(0)
    label = torch.tensor([[0, 1, 0, 1, 0]])
    expected = 2 / 5 * abs(1 / 2 - (0.6 + 0.65) / 2) + 3 / 5 * abs(2 / 3 - (0.7 + 0.76 + 0.75) / 3)
    assert expected_calibration_error(probs, label, num_bins=3).item() == pytest.approx(expected)


def test_expected_calibration_error_classwise_by_hand():
    # Two pixels, two bins. Class 0: 0.4 (not there), 0.9 (there); class 1: 0.6 (there), 0.1 (not there).
    probs = torch.tensor([[[0.4, 0.9], [0.6, 0.1]]], dtype=torch.float64)
    class_0 = 1 / 2 * abs(0 - 0.4) + 1 / 2 * abs(1 - 0.9)
    class_1 = 1 / 2 * abs(1 - 0.6) + 1 / 2 * abs(0 - 0.1)
    value = expected_calibration_error(probs, torch.tensor([[1, 0]]), kind="classwise", num_bins=2)
    assert value.item() == pytest.approx((class_0 + class_1) / 2)


@each_dimension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_expected_calibration_error_equals_a_loop(spatial, kind, soft):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    expected = loop_ece(probs.flatten(2), shares.flatten(2), case.valid.flatten(1), kind, 7)
    label = case.soft_labels if soft else case.label_map
    assert expected_calibration_error(probs, label, kind=kind, num_bins=7).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_expected_calibration_error_batch_by_batch_equals_at_once(kind, soft):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    metric = ExpectedCalibrationError(kind=kind, num_classes=3)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    torch.testing.assert_close(metric.compute(), expected_calibration_error(probs, label, kind=kind), rtol=1e-13, atol=0)
    assert metric.count == case.valid.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_expected_calibration_error_ignored_pixels_have_no_influence(kind):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    for label in (case.label_map, case.soft_labels):
        expected = expected_calibration_error(probs, label, kind=kind)
        assert torch.equal(expected_calibration_error(other, label, kind=kind), expected)
        as_mask = expected_calibration_error(probs, label.clamp(min=0), kind=kind, mask=case.valid)
        assert torch.equal(as_mask, expected)


def test_expected_calibration_error_soft_reference_all_zero_is_ignored():
    case = make_case((5, 7))
    zeroed = torch.where(case.valid.unsqueeze(1), case.soft_labels, 0.0)
    assert torch.equal(
        expected_calibration_error(case.logits.softmax(1), zeroed), expected_calibration_error(case.logits.softmax(1), case.soft_labels)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_expected_calibration_error_one_hot_reference_equals_labels(kind):
    case = make_case((5, 7), ignored=0.0)
    one_hot = torch.nn.functional.one_hot(case.label_map, 3).movedim(-1, 1).double()
    probs = case.logits.softmax(1)
    torch.testing.assert_close(expected_calibration_error(probs, one_hot, kind=kind), expected_calibration_error(probs, case.label_map, kind=kind))


def test_expected_calibration_error_does_not_know_shapes():
    case = make_case((3, 4, 5))
    probs = case.logits.softmax(1)
    expected = expected_calibration_error(probs, case.label_map)
    assert torch.equal(expected_calibration_error(probs.flatten(3), case.label_map.flatten(2)), expected)
    assert torch.equal(expected_calibration_error(probs.flatten(2), case.label_map.flatten(1)), expected)
    assert torch.equal(expected_calibration_error(probs, case.label_map.unsqueeze(1)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_calibration_error_nothing_valid_is_nan(kind):
    metric = ExpectedCalibrationError(kind=kind, num_classes=2)
    metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
    assert metric.compute().isnan()
    assert metric.count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_expected_calibration_error_half_precision(dtype):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    torch.testing.assert_close(
        expected_calibration_error(probs.to(dtype), case.label_map), expected_calibration_error(probs, case.label_map), atol=0.05, rtol=0
    )


def test_expected_calibration_error_perfect_for_labels_drawn_from_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(1, 4, 200_000, generator=generator).mul(2).softmax(1)
    label = torch.multinomial(probs[0].T, 1, generator=generator).T
    for kind in KINDS:
        assert expected_calibration_error(probs, label, kind=kind) < 0.01


@pytest.mark.parametrize("num_bins", [5, 10, 15])
@pytest.mark.parametrize("spatial", [(7, 9), (5, 6, 7)], ids=["2d", "3d"])
def test_expected_calibration_error_equals_torchmetrics(num_bins, spatial):
    # Same definition as long as no confidence is exactly 1, which torchmetrics gives a bin of its own.
    from torchmetrics.classification import MulticlassCalibrationError

    case = make_case(spatial, num_classes=4, batch=3, dtype=torch.float32)
    probs = case.logits.softmax(1)
    theirs = MulticlassCalibrationError(4, n_bins=num_bins, norm="l1", ignore_index=-100)
    theirs.update(probs.movedim(1, -1).flatten(0, -2), case.label_map.flatten())
    ours = expected_calibration_error(probs, case.label_map, num_bins=num_bins)
    torch.testing.assert_close(ours.float(), theirs.compute(), atol=1e-6, rtol=0)


def test_expected_calibration_error_classwise_equals_monai():
    # MONAI bins (l, u] too (its edges lie one float32 step higher); "expected", per image and class, the mean over classes and images of one image.
    from monai.metrics import CalibrationErrorMetric

    case = make_case((9, 11), num_classes=4, batch=1, ignored=0.0, dtype=torch.float32)
    probs = case.logits.softmax(1)
    theirs = CalibrationErrorMetric(num_bins=15, include_background=True, calibration_reduction="expected", metric_reduction="mean")
    theirs(y_pred=probs, y=torch.nn.functional.one_hot(case.label_map, 4).movedim(-1, 1))
    torch.testing.assert_close(
        expected_calibration_error(probs, case.label_map, kind="classwise").float(), theirs.aggregate().squeeze(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probs": torch.zeros(1, 2, 3)}, ValueError, "that sum to 1"),
        ({"probs": torch.tensor([[[2.0, 0, 0], [-1.0, 1, 1]]])}, ValueError, "in \\[0, 1\\]"),
        ({"probs": torch.full((1, 2, 3), torch.nan)}, ValueError, "look for NaN"),
        ({"probs": torch.ones(1, 2, 3, dtype=torch.long)}, TypeError, "Expected floating `probs`"),
        ({"probs": torch.full((1, 2), 0.5)}, ValueError, "1 to 3 spatial dimensions"),
        ({"label": torch.tensor([[0, 1, 2]])}, ValueError, "Expected labels in 0 to 1"),
        ({"label": torch.zeros(1, 4, dtype=torch.long)}, ValueError, "spatial shapes agree"),
        ({"mask": torch.ones(1, 3)}, TypeError, "Expected `mask` of dtype bool"),
        ({"mask": torch.ones(1, 1, 3, dtype=torch.bool)}, ValueError, "Expected `mask` of shape"),
        ({"kind": "top"}, ValueError, "Expected `kind` to be one of"),
        ({"num_bins": 0}, ValueError, "Expected `num_bins`"),
    ],
    ids=lambda value: None,
)
def test_expected_calibration_error_errors(change, error, message):
    arguments = {"probs": torch.full((1, 2, 3), 0.5), "label": torch.tensor([[0, 1, 1]])} | change
    with pytest.raises(error, match=message):
        expected_calibration_error(**arguments)


def test_expected_calibration_error_validate_args_off_does_not_look_at_probs():
    expected_calibration_error(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]), validate_args=False)


def test_expected_calibration_error_metric_errors():
    with pytest.raises(ValueError, match="Expected `num_classes` for kind='classwise'"):
        ExpectedCalibrationError(kind="classwise")
    with pytest.raises(ValueError, match="Expected `probs` with 4 classes, but got 3"):
        ExpectedCalibrationError(num_classes=4).update(torch.full((1, 3, 2), 1 / 3), torch.zeros(1, 2, dtype=torch.long))


def test_create_metric_by_name():
    assert isinstance(create_metric("ece", kind="classwise", num_classes=3), ExpectedCalibrationError)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_expected_calibration_error_on_a_gpu_without_a_sync(kind):
    case = make_case((5, 7), dtype=torch.float32)
    probs = case.logits.softmax(1)
    metric = ExpectedCalibrationError(kind=kind, num_classes=3, validate_args=False).cuda()
    inputs = probs.cuda(), case.label_map.cuda()
    metric.update(*inputs)
    metric.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(metric.compute().cpu(), expected_calibration_error(probs, case.label_map, kind=kind))
