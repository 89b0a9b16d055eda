"""Smooth calibration error against the integral of its formula, and the authors' package."""

import math

import numpy as np
import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import SmoothCalibrationError, smooth_calibration_error
from densecal.metrics.smooth_calibration import smooth_bound_from_bins, smooth_from_bins
from densecal.ops.binning import Bins
from densecal.ops.fine_bins import accumulate_fine_bins, distinct_bins

KINDS = ("top_label", "classwise")


def integral(entries, sigma, points=4000):
    """The definition: reflected Gaussian at every entry, midpoint rule; reflections two periods beyond either end."""
    t = (np.arange(points) + 0.5) / points
    total = np.zeros(points)
    for p, q in entries:
        for m in range(-2, 3):
            for image in (2 * m + p, 2 * m - p):
                total += (q - p) * np.exp(-((t - image) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return float(np.abs(total / len(entries)).mean())


def entries_of(probs, shares, valid, kind):
    n, c, p = probs.shape
    for k in range(c) if kind == "classwise" else [None]:
        entries = []
        for i in range(n):
            for j in range(p):
                cls = int(probs[i, :, j].argmax()) if k is None else k
                if valid[i, j]:
                    entries.append((float(probs[i, cls, j]), float(shares[i, cls, j])))
        yield entries


def binary(count, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    top = (torch.rand(count, generator=generator, dtype=torch.float64) / 2 + 0.5) ** (1 / sharpness)
    right = torch.rand(count, generator=generator) < top**2
    return top, right


def as_pixels(top, right):
    return torch.stack([top, 1 - top]).unsqueeze(0), (~right).long().unsqueeze(0)


def test_smooth_calibration_error_by_hand():
    # One confidence: the blur keeps the mass of its residual, so the error is |accuracy - confidence| at any width.
    probs, label = as_pixels(torch.full((4,), 0.9, dtype=torch.float64), torch.tensor([True, False, True, False]))
    for bandwidth in (None, 0.01, 0.3):
        assert smooth_calibration_error(probs, label, bandwidth=bandwidth).item() == pytest.approx(0.9 - 1 / 2, abs=1e-9)
    # Residuals 0.4 at 0.6 and -0.9 at 0.9 cancel as the blur grows, down to the mean residual.
    probs, label = as_pixels(torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([True, False]))
    assert smooth_calibration_error(probs, label, bandwidth=0.005).item() == pytest.approx((0.4 + 0.9) / 2, abs=1e-6)
    assert smooth_calibration_error(probs, label, bandwidth=20.0).item() == pytest.approx(abs(0.4 - 0.9) / 2, abs=1e-6)


@each_dimension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_smooth_calibration_error_equals_the_integral(spatial, kind, soft):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    label = case.soft_labels if soft else case.label_map
    rows = list(entries_of(probs.flatten(2), shares.flatten(2), case.valid.flatten(1), kind))
    fixed = sum(integral(entries, 0.05) for entries in rows) / len(rows)
    assert smooth_calibration_error(probs, label, kind=kind, bandwidth=0.05).item() == pytest.approx(fixed, abs=2e-6)
    if kind == "top_label":
        value = smooth_calibration_error(probs, label).item()
        assert integral(rows[0], value) == pytest.approx(value, abs=2e-6)  # the fixed point


@pytest.mark.parametrize("count", [200, 5000])
def test_smooth_calibration_error_equals_relplot(count):
    # relplot cuts the kernel at 0.5, adds 1e-4 to densities, works on coarser grids and searches the width to 1e-3.
    import relplot

    top, right = binary(count)
    f, y = top.numpy(), right.double().numpy()
    for bandwidth in (0.02, 0.05, 0.1):
        ours = smooth_calibration_error(*as_pixels(top, right), bandwidth=bandwidth).item()
        assert ours == pytest.approx(relplot.smECE_sigma(f, y, bandwidth), rel=0.01, abs=1e-4)
    assert smooth_calibration_error(*as_pixels(top, right)).item() == pytest.approx(relplot.smECE(f, y), abs=1e-3)


def test_smooth_calibration_error_equals_torch_uncertainty():
    # A port of relplot, with its tolerances.
    from torch_uncertainty.metrics import SmoothCalibrationError as Theirs

    top, right = binary(2000, seed=3)
    probs, label = as_pixels(top, right)
    theirs = Theirs(kernel_type="reflected")
    theirs.update(probs[0].T.float(), label[0])
    assert smooth_calibration_error(probs, label).item() == pytest.approx(theirs.compute().item(), abs=1e-3)


def test_smooth_calibration_error_falls_with_the_bandwidth():
    bins = distinct_bins(*binary(500))
    values = [smooth_from_bins(bins, bandwidth=sigma).item() for sigma in (0.002, 0.005, 0.01, 0.05, 0.2, 1.0)]
    assert values == sorted(values, reverse=True)


def test_smooth_calibration_error_of_the_certain_and_right_is_0():
    probs = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert smooth_calibration_error(probs, torch.tensor([[0, 0]])) == 0
    assert smooth_calibration_error(probs, torch.tensor([[1, 1]])).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("max_exact", [0, 40, 1000], ids=["bins", "mixed", "exact"])
def test_smooth_calibration_error_batch_by_batch(kind, soft, max_exact):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    metric = SmoothCalibrationError(kind=kind, num_classes=3, max_exact=max_exact)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    exact = smooth_calibration_error(probs, label, kind=kind)
    if max_exact == 1000:
        torch.testing.assert_close(metric.compute(), exact, rtol=1e-9, atol=0)
        assert metric.error_bound == 0
    else:
        assert (metric.compute() - exact).abs() <= metric.error_bound + 1e-5
        at_once = SmoothCalibrationError(kind=kind, num_classes=3, max_exact=0)
        torch.testing.assert_close(metric.compute(), at_once(probs, label), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bandwidth", [None, 0.01])
def test_smooth_calibration_error_bound_holds_and_is_small(bandwidth):
    top, right = binary(100_000, sharpness=8)
    bins = accumulate_fine_bins(top, right)
    bound = smooth_bound_from_bins(bins, bandwidth=bandwidth)
    error = (smooth_from_bins(bins, bandwidth=bandwidth) - smooth_from_bins(distinct_bins(top, right), bandwidth=bandwidth)).abs()
    assert error <= bound < 0.02
    assert error < 1e-5


def test_smooth_calibration_error_nothing_valid_is_nan():
    for max_exact in (0, 100):
        metric = SmoothCalibrationError(max_exact=max_exact)
        metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
        assert metric.compute().isnan()
        assert metric.count == 0
    assert smooth_from_bins(Bins.empty(1, 10)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_smooth_calibration_error_precision(dtype):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    expected = smooth_calibration_error(probs, case.label_map)
    torch.testing.assert_close(smooth_calibration_error(probs.to(dtype), case.label_map), expected, atol=4e-3, rtol=0)


def test_smooth_calibration_error_ignored_pixels_have_no_influence():
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    expected = smooth_calibration_error(probs, case.label_map)
    assert torch.equal(smooth_calibration_error(other, case.label_map), expected)
    assert torch.equal(smooth_calibration_error(other, case.label_map.clamp(min=0), mask=case.valid), expected)


def test_smooth_calibration_error_one_region_equals_its_channel():
    case = make_case((5, 7), num_classes=2)
    probs = case.logits.softmax(1)
    as_region = smooth_calibration_error(probs[:, 1:], case.label_map.unsqueeze(1), activation="sigmoid")
    torch.testing.assert_close(as_region, smooth_calibration_error(probs, case.label_map), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "top"}, "Expected `kind` to be one of"),
        ({"bandwidth": 0.0}, "Expected `bandwidth`"),
    ],
    ids=["kind", "bandwidth"],
)
def test_smooth_calibration_error_errors(change, message):
    with pytest.raises(ValueError, match=message):
        SmoothCalibrationError(**change)
    with pytest.raises(ValueError, match=message):
        smooth_calibration_error(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]), **change)


def test_smooth_calibration_error_needs_num_classes():
    with pytest.raises(ValueError, match="Expected `num_classes`"):
        create_metric("smooth_calibration_error", kind="classwise")
