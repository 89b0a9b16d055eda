"""Calibration errors against arithmetic and loops; test_peers.py has other packages."""

import itertools
import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import (
    CalibrationError,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    MaximumCalibrationError,
    calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)
from densecal.ops.backend import why_not_triton
from densecal.ops.binning import MEASURES

KINDS = ("top_label", "classwise")


def loop_cells(probs, shares, valid, k, num_bins, threshold=0.0):
    """(confidence, share) per bin, pixel by pixel: of class k, or of the predicted class for None. probs and shares (N, C, P), valid (N, P)."""
    n, _, p = probs.shape
    cells = [[] for _ in range(num_bins)]
    for i, j in itertools.product(range(n), range(p)):
        cls = int(probs[i, :, j].argmax()) if k is None else k
        confidence = float(probs[i, cls, j])
        if valid[i, j] and not (threshold and confidence <= threshold):
            b = min(max(math.ceil(confidence * num_bins) - 1, 0), num_bins - 1)
            cells[b].append((confidence, float(shares[i, cls, j])))
    return cells


def loop_measure(cells, measure):
    """The measures' formulas, bin by bin: (n, accuracy, confidence)."""
    bins = [(len(cell), sum(a for _, a in cell) / len(cell), sum(c for c, _ in cell) / len(cell)) for cell in cells if cell]
    if measure.startswith("debiased"):
        bins = [b for b in bins if b[0] > 1]
    total = sum(n for n, _, _ in bins)
    if not total:
        return math.nan
    if measure == "maximum":
        return max(abs(a - c) for _, a, c in bins)
    if measure == "average":
        return sum(abs(a - c) for _, a, c in bins) / len(bins)
    if measure.startswith("debiased"):
        square = sum(n / total * ((a - c) ** 2 - a * (1 - a) / (n - 1)) for n, a, c in bins)
        return square if measure == "debiased_mean_square" else math.sqrt(max(square, 0.0))
    if measure == "root_mean_square":
        return math.sqrt(sum(n / total * (a - c) ** 2 for n, a, c in bins))
    terms = {
        "expected": lambda a, c: abs(a - c),
        "signed": lambda a, c: c - a,
        "overconfidence": lambda a, c: max(c - a, 0.0),
        "underconfidence": lambda a, c: max(a - c, 0.0),
        "overconfidence_error": lambda a, c: c * max(c - a, 0.0),
    }
    return sum(n / total * terms[measure](a, c) for n, a, c in bins)


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def loop_error(probs, shares, valid, kind="top_label", num_bins=15, *, measure="expected", pooling="dataset", threshold=0.0, background=None):
    """The definition in words, over images, classes and bins."""
    rows = [k for k in range(probs.shape[1]) if k != background] if kind == "classwise" else [None]
    images = [slice(None)] if pooling == "dataset" else [slice(i, i + 1) for i in range(len(probs))]
    return mean(mean(loop_measure(loop_cells(probs[i], shares[i], valid[i], k, num_bins, threshold), measure) for k in rows) for i in images)


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


def flat(case, *, soft):
    """probs, shares and valid for the loops, and the label for the functions."""
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), case.logits.shape[1]).movedim(-1, 1)
    return (case.logits.softmax(1).flatten(2), shares.flatten(2), case.valid.flatten(1)), case.soft_labels if soft else case.label_map


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["dataset", "image"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_calibration_error_every_definition_equals_a_loop(measure, kind, pooling, soft):
    case = make_case((5, 7), batch=3, seed=1)
    inputs, label = flat(case, soft=soft)
    options = {"measure": measure, "kind": kind, "num_bins": 5, "pooling": pooling}
    expected = pytest.approx(loop_error(*inputs, **options), abs=1e-12)
    assert calibration_error(case.logits.softmax(1), label, **options).item() == expected
    metric = CalibrationError(num_classes=3, **options)
    for i in range(3):
        metric.update(case.logits[i : i + 1].softmax(1), label[i : i + 1])
    assert metric.compute().item() == expected
    assert metric.count == case.valid.sum()


@each_dimension
@pytest.mark.parametrize("pooling", ["dataset", "image"])
@pytest.mark.parametrize("options", [{"background": 1}, {"threshold": 0.1}, {"threshold": 0.9, "background": 0}], ids=str)
def test_calibration_error_classwise_options_equal_a_loop(spatial, pooling, options):
    case = make_case(spatial, batch=3)
    inputs, label = flat(case, soft=False)
    options = options | {"kind": "classwise", "num_bins": 5, "pooling": pooling}
    value = calibration_error(case.logits.softmax(1), label, **options)
    assert value.item() == pytest.approx(loop_error(*inputs, **options), abs=1e-12, nan_ok=True)


def test_calibration_error_threshold_of_the_top_label():
    case = make_case((5, 7))
    inputs, label = flat(case, soft=False)
    value = calibration_error(case.logits.softmax(1), label, threshold=0.7)
    assert value.item() == pytest.approx(loop_error(*inputs, threshold=0.7), abs=1e-12)
    sure = calibration_error(case.logits.softmax(1), label, mask=case.valid & (case.logits.softmax(1).amax(1) > 0.7))
    torch.testing.assert_close(value, sure)


def test_calibration_error_threshold_leaves_a_class_without_entries_out():
    probs = torch.tensor([[[0.9, 0.8], [0.1, 0.2]]], dtype=torch.float64)
    value = calibration_error(probs, torch.tensor([[0, 0]]), kind="classwise", threshold=0.5, num_bins=2)
    assert value.item() == pytest.approx(1 - (0.9 + 0.8) / 2)
    per_class = calibration_error(probs, torch.tensor([[0, 0]]), kind="classwise", threshold=0.5, num_bins=2, average="none")
    assert per_class.isnan().tolist() == [False, True]


@pytest.mark.parametrize("pooling", ["dataset", "image"])
def test_calibration_error_per_class_and_per_image(pooling):
    case = make_case((5, 7), batch=3)
    inputs, label = flat(case, soft=False)
    probs = case.logits.softmax(1)
    options = {"kind": "classwise", "pooling": pooling, "measure": "average"}
    per_class = calibration_error(probs, label, average="none", **options)
    expected = [loop_measure(loop_cells(*inputs, k, 15), "average") for k in range(3)]
    if pooling == "image":
        expected = [mean(loop_measure(loop_cells(*(x[i : i + 1] for x in inputs), k, 15), "average") for i in range(3)) for k in range(3)]
    assert per_class.tolist() == pytest.approx(expected)
    metric = CalibrationError(num_classes=3, **options)
    metric.update(probs[:2], label[:2])
    metric.update(probs[2:], label[2:])
    if pooling == "image":
        each = [calibration_error(probs[i : i + 1], label[i : i + 1], kind="classwise", measure="average").item() for i in range(3)]
        assert metric.per_image.tolist() == pytest.approx(each)
        torch.testing.assert_close(metric.compute(), metric.per_image.mean())
    torch.testing.assert_close(metric.bins.calibration_error(), classwise_calibration_error(probs, label, average="none"))


def test_calibration_error_an_image_with_nothing_is_left_out_and_seen():
    case = make_case((5, 7), ignored=0.0)
    label = case.label_map.clone()
    label[1] = -100
    metric = CalibrationError(pooling="image")
    metric.update(case.logits.softmax(1), label)
    assert metric.per_image.isnan().tolist() == [False, True]
    torch.testing.assert_close(metric.compute(), expected_calibration_error(case.logits[:1].softmax(1), label[:1]))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("pooling", ["dataset", "image"])
def test_calibration_error_one_sigmoid_channel_is_two_softmax_channels(measure, pooling):
    case = make_case((5, 7), num_classes=2, batch=3)
    two = case.logits.softmax(1)
    one = two[:, 1:]
    options = {"measure": measure, "pooling": pooling}
    expected = calibration_error(two, case.label_map, **options)
    torch.testing.assert_close(calibration_error(one, case.label_map, activation="sigmoid", **options), expected)
    # Classwise the one channel has one row of bins: that of the second class.
    expected = calibration_error(two, case.label_map, kind="classwise", average="none", **options)[1:]
    value = calibration_error(one, case.label_map, kind="classwise", average="none", activation="sigmoid", **options)
    torch.testing.assert_close(value, expected)


def test_calibration_error_regions_each_have_their_bins():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    label = (torch.rand(2, 3, 5, 7, generator=generator) < probs).long()
    per_region = calibration_error(probs, label, kind="classwise", average="none", activation="sigmoid")
    for r in range(3):
        one = calibration_error(probs[:, r : r + 1], label[:, r : r + 1], kind="classwise", activation="sigmoid")
        torch.testing.assert_close(per_region[r], one)
    metric = CalibrationError(activation="sigmoid", kind="classwise", num_classes=3)
    metric.update(probs, label)
    torch.testing.assert_close(metric.compute(), per_region.mean())


def test_presets_are_thin():
    case = make_case((5, 7))
    probs, label = case.logits.softmax(1), case.label_map
    for function, metric, options in (
        (expected_calibration_error, ExpectedCalibrationError(), {}),
        (maximum_calibration_error, MaximumCalibrationError(), {"measure": "maximum"}),
        (classwise_calibration_error, ClasswiseCalibrationError(3), {"kind": "classwise"}),
    ):
        expected = calibration_error(probs, label, **options)
        metric.update(probs, label)
        assert torch.equal(function(probs, label), expected)
        assert torch.equal(metric.compute(), expected)
    assert maximum_calibration_error(probs, label) > expected_calibration_error(probs, label)


@each_dimension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_expected_calibration_error_equals_a_loop(spatial, kind, soft):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    expected = loop_error(probs.flatten(2), shares.flatten(2), case.valid.flatten(1), kind, 7)
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
        ({"measure": "ACE"}, ValueError, "Expected `measure` to be one of"),
        ({"pooling": "batch"}, ValueError, "Expected `pooling` to be one of"),
        ({"average": "micro", "kind": "classwise"}, ValueError, "Expected `average` to be one of"),
        ({"activation": "tanh"}, ValueError, "Expected `activation` to be one of"),
        ({"threshold": 1.0}, ValueError, "Expected `threshold` in"),
        ({"background": 0}, ValueError, "only with kind='classwise'"),
        ({"average": "none"}, ValueError, "only with kind='classwise'"),
        ({"average": "none", "background": 0, "kind": "classwise"}, ValueError, "no mean to leave a class out of"),
        ({"background": 2, "kind": "classwise"}, ValueError, "one of several classes 0 to 1, but got 2"),
    ],
    ids=lambda value: None,
)
def test_expected_calibration_error_errors(change, error, message):
    arguments = {"probs": torch.full((1, 2, 3), 0.5), "label": torch.tensor([[0, 1, 1]])} | change
    with pytest.raises(error, match=message):
        calibration_error(**arguments)


def test_expected_calibration_error_validate_args_off_does_not_look_at_probs():
    expected_calibration_error(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]), validate_args=False)


def test_expected_calibration_error_metric_errors():
    with pytest.raises(ValueError, match="Expected `num_classes` for kind='classwise'"):
        ExpectedCalibrationError(kind="classwise")
    with pytest.raises(ValueError, match="Expected pooling='image' for values per image"):
        _ = ExpectedCalibrationError().per_image
    with pytest.raises(ValueError, match="Expected `probs` with 4 classes, but got 3"):
        ExpectedCalibrationError(num_classes=4).update(torch.full((1, 3, 2), 1 / 3), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_calibration_error_of_logits_is_that_of_their_probabilities(kind, activation, soft):
    case = make_case((5, 7), batch=2)
    if activation == "softmax":
        probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    else:
        probs, label = case.logits.sigmoid(), case.soft_labels if soft else (case.logits > 0.3).long()
    options = {"kind": kind, "activation": activation, "num_bins": 5, "threshold": 0.2}
    expected = calibration_error(probs, label, **options)
    torch.testing.assert_close(calibration_error(case.logits, label, from_logits=True, **options), expected)
    metric = CalibrationError(num_classes=3, from_logits=True, **options)
    metric.update(case.logits, label)
    torch.testing.assert_close(metric.compute(), expected)


def test_calibration_error_of_half_logits_is_not_rounded_to_half():
    logits = torch.tensor([[[9.0], [0.0]]])  # confidence 0.99988, in half precision 1
    value = expected_calibration_error(logits.half(), torch.tensor([[1]]), from_logits=True)
    assert value.item() == pytest.approx(1 / (1 + math.exp(-9)), abs=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_calibration_error_of_logits_that_are_not_finite_is_an_error_where_they_count(bad):
    logits = torch.zeros(1, 2, 3)
    logits[0, 1, 0] = bad
    expected_calibration_error(logits, torch.tensor([[-100, 0, 1]]), from_logits=True)
    with pytest.raises(ValueError, match="Expected finite logits where labels count"):
        expected_calibration_error(logits, torch.tensor([[0, 0, 1]]), from_logits=True)
    assert expected_calibration_error(logits, torch.tensor([[0, 0, 1]]), from_logits=True, validate_args=False).isnan()


def test_calibration_error_by_triton_says_what_it_does_not_do():
    case = make_case((5, 7), dtype=torch.float32)
    probs = case.logits.softmax(1)
    for label, activation, message in (
        (case.soft_labels, "softmax", "soft labels"),
        ((probs > 0.3).long(), "sigmoid", "regions, activation='sigmoid'"),
    ):
        with pytest.raises(ValueError, match=f"for backend='triton', but there is none for {message}"):
            calibration_error(probs, label, activation=activation, backend="triton")
    if why_not_triton(probs.device) is not None:
        with pytest.raises(ValueError, match=r"for backend='triton', but .*[Tt]riton"):
            calibration_error(probs, case.label_map, backend="triton")
    with pytest.raises(ValueError, match=r"`backend` to be one of \('auto', 'torch', 'triton'\)"):
        CalibrationError(backend="cuda")


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
