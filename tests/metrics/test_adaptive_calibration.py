"""Adaptive calibration error against arithmetic, a loop over pixels cut into pieces, and other packages."""

from fractions import Fraction

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import AdaptiveCalibrationError, adaptive_calibration_error
from densecal.metrics.adaptive_calibration import adaptive_bound_from_bins, adaptive_from_bins
from densecal.ops.binning import Bins
from densecal.ops.fine_bins import accumulate_fine_bins, distinct_bins, fine_bin_index

KINDS = ("top_label", "classwise")


def loop_adaptive(entries, num_bins):
    """Hand out sorted (confidence, correct) to bins of n/B each; of tied ones every bin gets the same share."""
    if not entries:
        return None
    room = Fraction(len(entries), num_bins)
    bins = [[0.0, 0.0] for _ in range(num_bins)]
    b, free = 0, room
    for value in sorted({c for c, _ in entries}):
        group = [q for c, q in entries if c == value]
        left = Fraction(len(group))
        while left > 0:
            taken = min(left, free)
            bins[b][0] += float(taken) * value
            bins[b][1] += float(taken) * sum(group) / len(group)
            left, free = left - taken, free - taken
            if free == 0:
                b, free = b + 1, room
    return sum(abs(q - c) for c, q in bins) / len(entries)


def loop_over_classes(probs, shares, valid, kind, num_bins, threshold=0.0):
    n, c, p = probs.shape
    values = []
    for k in range(c) if kind == "classwise" else [None]:
        entries = []
        for i in range(n):
            for j in range(p):
                cls = int(probs[i, :, j].argmax()) if k is None else k
                if valid[i, j] and probs[i, cls, j] >= threshold:
                    entries.append((float(probs[i, cls, j]), float(shares[i, cls, j])))
        values.append(loop_adaptive(entries, num_bins))
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined)


def two_classes(top, dtype=torch.float64):
    top = torch.tensor(top, dtype=dtype)
    return torch.stack([top, 1 - top]).unsqueeze(0)


def test_adaptive_calibration_error_by_hand():
    # Two bins of three: 0.55, 0.6, 0.65 with one right; 0.8, 0.85, 0.99 with all right.
    probs = two_classes([0.8, 0.55, 0.65, 0.85, 0.6, 0.99])
    label = torch.tensor([[0, 1, 0, 0, 1, 0]])
    expected = 1 / 2 * abs(1 / 3 - (0.55 + 0.6 + 0.65) / 3) + 1 / 2 * abs(1 - (0.8 + 0.85 + 0.99) / 3)
    assert adaptive_calibration_error(probs, label, num_bins=2).item() == pytest.approx(expected)


def test_adaptive_calibration_error_shares_ties():
    # 0.6 wrong; 0.8 three times, one of them right; two bins of two: the first gets one of the three and a third of what was right.
    probs = two_classes([0.8, 0.6, 0.8, 0.8])
    expected = 1 / 4 * abs(1 / 3 - (0.6 + 0.8)) + 1 / 4 * abs(2 / 3 - 2 * 0.8)
    for label in ([[0, 1, 1, 1]], [[1, 1, 0, 1]], [[1, 1, 1, 0]]):
        assert adaptive_calibration_error(probs, torch.tensor(label), num_bins=2).item() == pytest.approx(expected)


@each_dimension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_adaptive_calibration_error_equals_a_loop(spatial, kind, soft, threshold):
    case = make_case(spatial)
    probs = (case.logits.softmax(1) * 16).round() / 16  # many ties; sums are off, which is not looked at
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    expected = loop_over_classes(probs.flatten(2), shares.flatten(2), case.valid.flatten(1), kind, 7, threshold)
    label = case.soft_labels if soft else case.label_map
    value = adaptive_calibration_error(probs, label, kind=kind, num_bins=7, threshold=threshold, validate_args=False)
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_adaptive_calibration_error_threshold_leaves_out_what_is_below():
    probs = torch.tensor([[[0.7, 0.9995], [0.2995, 0.0004], [0.0005, 0.0001]]], dtype=torch.float64)
    label = torch.tensor([[0, 1]])
    # Class 0 keeps both, class 1 the 0.2995, class 2 nothing and no say.
    expected = (abs((1 - 0.7) + (0 - 0.9995)) / 2 + abs(0 - 0.2995)) / 2
    assert adaptive_calibration_error(probs, label, kind="classwise", threshold=1e-3, num_bins=1).item() == pytest.approx(expected)
    metric = AdaptiveCalibrationError(kind="classwise", num_classes=3, threshold=1e-3, num_bins=1, max_exact=0)
    assert metric(probs, label).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_bins", [5, 10, 15])
def test_adaptive_calibration_error_equals_torch_uncertainty(num_bins):
    # Same definition where no confidences are tied and bins are equal; it cuts a remainder differently, by whole pixels.
    from torch_uncertainty.metrics import AdaptiveCalibrationError as Theirs

    case = make_case((60,), num_classes=4, batch=5, ignored=0.0)
    probs = case.logits.softmax(1)
    theirs = Theirs("multiclass", num_bins=num_bins, num_classes=4)
    theirs.update(probs.movedim(1, -1).flatten(0, 1), case.label_map.flatten())
    ours = adaptive_calibration_error(probs, case.label_map, num_bins=num_bins)
    torch.testing.assert_close(ours.float(), theirs.compute(), atol=1e-6, rtol=0)


def test_adaptive_calibration_error_differs_from_torch_uncertainty_in_a_remainder():
    # Three pixels, two bins: theirs holds two pixels and one, ours one and a half each.
    from torch_uncertainty.metrics import AdaptiveCalibrationError as Theirs

    probs, label = two_classes([0.6, 0.7, 0.9]), torch.tensor([[1, 0, 0]])
    theirs = Theirs("multiclass", num_bins=2, num_classes=2)
    theirs.update(probs[0].T, label[0])
    assert theirs.compute().item() == pytest.approx((abs(1 - 1.3) + abs(1 - 0.9)) / 3)
    assert adaptive_calibration_error(probs, label, num_bins=2).item() == pytest.approx((abs(0.5 - 0.95) + abs(1.5 - 1.25)) / 3)


def test_adaptive_calibration_error_one_region_equals_its_channel():
    case = make_case((5, 7), num_classes=2)
    probs = case.logits.softmax(1)
    as_region = adaptive_calibration_error(probs[:, 1:], case.label_map.unsqueeze(1), activation="sigmoid")
    torch.testing.assert_close(as_region, adaptive_calibration_error(probs, case.label_map))
    as_class = adaptive_calibration_error(probs[:, 1:], case.label_map.unsqueeze(1), activation="sigmoid", kind="classwise")
    torch.testing.assert_close(as_class, adaptive_calibration_error(probs, case.label_map, kind="classwise", num_bins=15))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("max_exact", [0, 40, 1000], ids=["bins", "mixed", "exact"])
def test_adaptive_calibration_error_batch_by_batch(kind, soft, max_exact):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    metric = AdaptiveCalibrationError(kind=kind, num_classes=3, max_exact=max_exact)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    exact = adaptive_calibration_error(probs, label, kind=kind)
    assert metric.count == case.valid.sum()
    if max_exact == 1000:
        torch.testing.assert_close(metric.compute(), exact, rtol=1e-13, atol=0)
        assert metric.error_bound == 0
    else:
        assert (metric.compute() - exact).abs() <= metric.error_bound
        at_once = AdaptiveCalibrationError(kind=kind, num_classes=3, max_exact=0)
        torch.testing.assert_close(metric.compute(), at_once(probs, label), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_adaptive_calibration_error_bound_holds_for_the_worst_order(reverse):
    # All pixels in three fine bins, 70 % of each right, first or last: on the whole calibrated, and as far off as an order within bins can be.
    confidence = 0.7 + 0.004 * torch.arange(1000, dtype=torch.float64) / 1000
    index = fine_bin_index(confidence)
    correct = torch.zeros(1000, dtype=torch.bool)
    for b in index.unique():
        members = (index == b).nonzero()[:, 0]
        size = int(0.7 * len(members))
        correct[members[-size:] if reverse else members[:size]] = True
    bins = accumulate_fine_bins(confidence, correct)
    exact = distinct_bins(confidence, correct)
    errors = []
    for num_bins in (2, 3, 7, 10):
        errors.append((adaptive_from_bins(bins, num_bins) - adaptive_from_bins(exact, num_bins)).abs())
        assert errors[-1] <= adaptive_bound_from_bins(bins, num_bins)
    assert max(errors) > 0.05


def test_adaptive_calibration_error_bound_is_small_for_a_network():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(1, 4, 200_000, generator=generator).mul(4).softmax(1)
    label = torch.multinomial(probs[0].sqrt().T, 1, generator=generator).T
    metric = AdaptiveCalibrationError()
    value = metric(probs, label)
    assert not metric.entries
    error = (value - adaptive_calibration_error(probs, label)).abs()
    assert error <= metric.error_bound < 0.02
    assert error < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_calibration_error_nothing_valid_is_nan(kind):
    for max_exact in (0, 100):
        metric = AdaptiveCalibrationError(kind=kind, num_classes=2, max_exact=max_exact)
        metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
        assert metric.compute().isnan()
        assert metric.count == 0
    empty = Bins.empty(1, 10)
    assert adaptive_from_bins(empty, 5).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adaptive_calibration_error_precision(dtype):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    torch.testing.assert_close(
        adaptive_calibration_error(probs.to(dtype), case.label_map), adaptive_calibration_error(probs, case.label_map), atol=0.03, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_calibration_error_ignored_pixels_have_no_influence(kind):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    expected = adaptive_calibration_error(probs, case.label_map, kind=kind)
    assert torch.equal(adaptive_calibration_error(other, case.label_map, kind=kind), expected)
    assert torch.equal(adaptive_calibration_error(other, case.label_map.clamp(min=0), kind=kind, mask=case.valid), expected)
    for max_exact in (0, 1000):
        metric = AdaptiveCalibrationError(kind=kind, num_classes=3, max_exact=max_exact)
        metric.update(other, case.label_map)
        assert (metric.compute() - expected).abs() <= metric.error_bound + 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "top"}, "Expected `kind` to be one of"),
        ({"num_bins": 0}, "Expected `num_bins`"),
        ({"threshold": 1.5}, "Expected `threshold` in"),
        ({"kind": "classwise"}, "Expected `num_classes`"),
        ({"max_exact": -1}, "Expected `max_exact`"),
    ],
    ids=lambda value: None,
)
def test_adaptive_calibration_error_errors(change, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCalibrationError(**change)
    if "num_classes" not in message and "max_exact" not in message:
        with pytest.raises(ValueError, match=message):
            adaptive_calibration_error(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]), **change)


def test_adaptive_from_bins_errors():
    with pytest.raises(ValueError, match="Expected one row of bins"):
        adaptive_from_bins(Bins.empty(2, 5), 3)
    with pytest.raises(ValueError, match="bins of `accumulate_fine_bins`"):
        adaptive_bound_from_bins(Bins.empty(1, 5), 3)
    with pytest.raises(ValueError, match="Expected `probs` with 4 classes, but got 3"):
        AdaptiveCalibrationError(kind="classwise", num_classes=4).update(torch.full((1, 3, 2), 1 / 3), torch.zeros(1, 2, dtype=torch.long))


def test_create_metric_by_name():
    assert isinstance(create_metric("adaptive_calibration_error", kind="classwise", num_classes=3), AdaptiveCalibrationError)
