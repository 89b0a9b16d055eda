"""The fused bins against their twin of plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from kernels import DEVICE, needs_kernels
from torch import Tensor

from densecal.metrics import CalibrationError, calibration_error
from densecal.ops import calibration_bins as twin
from densecal.ops.backend import NotCovered
from densecal.ops.binning import Bins, bin_edges

pytestmark = needs_kernels

EVERY_KIND = pytest.mark.parametrize("kind", twin.CALIBRATION_KINDS)
PROBS_OR_LOGITS = pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])


def fused(*args, **options) -> Bins:
    from densecal.ops.triton import calibration_bins as module

    return module.calibration_bins(*args, **options)


def prediction(spatial=(5, 7), *, num_classes=4, batch=2, dtype=torch.float32, logits=True, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(batch, num_classes, *spatial, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(batch, *spatial, generator=generator) < 0.7, z.argmax(1), 0)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, 255)
    return (z if logits else z.softmax(1)).to(DEVICE, dtype), labels.to(DEVICE)


def hold(found: Bins, expected: Bins, *, tolerance: float) -> None:
    """Bin for bin: no input here has a confidence within rounding of an edge."""
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.correct, expected.correct)
    assert found.confidence.dtype == torch.float64
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=tolerance, atol=tolerance)


@EVERY_KIND
@PROBS_OR_LOGITS
@pytest.mark.parametrize(
    ("spatial", "dtype"), [((41,), torch.float64), ((5, 7), torch.float32), ((5, 7), torch.bfloat16), ((3, 4, 5), torch.float16)], ids=str
)
def test_equals_the_twin(kind, from_logits, spatial, dtype):
    values, labels = prediction(spatial, dtype=dtype, logits=from_logits)
    options = {"num_bins": 15, "kind": kind, "from_logits": from_logits, "ignore_index": 255}
    hold(fused(values, labels, **options), twin.calibration_bins(values, labels, **options), tolerance=1e-12 if dtype == torch.float64 else 1e-6)


@EVERY_KIND
@PROBS_OR_LOGITS
@pytest.mark.parametrize("num_bins", [1, 16, 40])
def test_options(kind, from_logits, num_bins):
    values, labels = prediction(logits=from_logits)
    mask = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)
    options = {"num_bins": num_bins, "kind": kind, "from_logits": from_logits, "ignore_index": 255, "mask": mask, "threshold": 0.3}
    hold(fused(values, labels, **options), twin.calibration_bins(values, labels, **options), tolerance=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.uint16, torch.float32], ids=str)
def test_layouts_and_types_of_labels(layout, label_dtype):
    values, labels = prediction()
    options = {"num_bins": 15, "from_logits": True, "ignore_index": 255, "mask": labels.mT.contiguous().mT != 2}
    expected = twin.calibration_bins(values, labels, **options)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    else:
        values = torch.stack([values, values], -1).transpose(-2, 2).contiguous().transpose(-2, 2)[..., 1]  # no axis beside its neighbour
        labels = labels.mT.contiguous().mT
    hold(fused(values, labels.to(label_dtype), **options), expected, tolerance=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("num_bins", [10, 15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_edges_agree_bin_for_bin(kind, num_bins, dtype):
    """On an edge, on the numbers beside it, on 0 and on 1."""
    edges = bin_edges(num_bins, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    beside = [torch.nextafter(edges, torch.full_like(edges, side)).clamp(0, 1) for side in (-1.0, 2.0)]
    p = torch.cat([edges, *beside]).to(dtype)
    probs = torch.stack([p, 1 - p]).unsqueeze(0).to(DEVICE)
    labels = torch.zeros(1, len(p), dtype=torch.long, device=DEVICE)
    options = {"num_bins": num_bins, "kind": kind, "ignore_index": 255}
    found = fused(probs, labels, **options)
    hold(found, twin.calibration_bins(probs, labels, **options), tolerance=1e-6)
    assert found.count[0, 0, -1] >= 2  # 0 and 1 as a top label, or 1 and the number below it


def test_logits_near_an_edge_may_fall_to_its_other_side():
    """Of 28 confidences within 4 steps of an edge, at most a quarter is moved by rounding; nothing is lost."""
    k = torch.arange(8, 15, dtype=torch.float64)
    p = (k / 15).repeat_interleave(4) + torch.linspace(-4, 4, 28, dtype=torch.float64) * 2**-24
    logits = torch.stack([(p / (1 - p)).log(), torch.zeros_like(p)]).unsqueeze(0).float().to(DEVICE)
    labels = torch.zeros(1, len(p), dtype=torch.long, device=DEVICE)
    options = {"num_bins": 15, "ignore_index": 255, "from_logits": True}
    found, expected = fused(logits, labels, **options), twin.calibration_bins(logits, labels, **options)
    moved = (found.count.cumsum(-1) - expected.count.cumsum(-1)).abs().sum()  # each passes one edge
    assert moved <= len(p) // 4
    assert found.count.sum() == expected.count.sum() == len(p)
    torch.testing.assert_close(found.confidence.sum(), expected.confidence.sum(), rtol=1e-6, atol=0)


def test_logits_elsewhere_stay_in_their_bins():
    """Of 15 000 random pixels over several programs at most one is moved."""
    values, labels = prediction((7_500,), num_classes=3)
    options = {"num_bins": 15, "from_logits": True, "ignore_index": 255}
    found, expected = fused(values, labels, **options), twin.calibration_bins(values, labels, **options)
    assert (found.count - expected.count).abs().sum() <= 2
    assert found.correct.sum() == expected.correct.sum()


@PROBS_OR_LOGITS
def test_the_first_of_tied_classes_wins(from_logits):
    p = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    values = (p.log() if from_logits else p).T.unsqueeze(0).to(DEVICE)
    for label, right in enumerate(([1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1])):
        bins = fused(values, torch.full((1, 4), label, device=DEVICE), num_bins=5, from_logits=from_logits, ignore_index=255)
        assert bins.count.sum() == 4
        assert bins.correct.sum() == sum(right)


@EVERY_KIND
@pytest.mark.parametrize(("from_logits", "bad"), [(False, math.nan), (True, math.nan), (True, math.inf)], ids=str)
def test_what_does_not_count_may_be_anything_and_what_counts_is_not_hidden(kind, from_logits, bad):
    values, labels = prediction(logits=from_logits)
    ignored = (labels == 255).unsqueeze(1)
    options = {"num_bins": 5, "kind": kind, "from_logits": from_logits, "ignore_index": 255}
    expected = fused(values, labels, **options)
    found = fused(values.masked_fill(ignored, bad), labels, **options)
    assert torch.equal(found.confidence, expected.confidence)
    assert torch.equal(found.correct, expected.correct)
    values[~ignored.expand_as(values)] = bad
    found = fused(values, labels, **options)
    assert torch.equal(
        found.count,
        fused(torch.full_like(values, 0.5), labels, **options).count.sum(-1, keepdim=True) * torch.eye(5, device=DEVICE, dtype=torch.long)[-1],
    )
    assert not found.confidence[..., -1].isfinite().any()


def test_a_label_that_is_no_class_is_not_hidden():
    values, labels = prediction()
    labels[0, 0, 0] = 9
    assert fused(values, labels, num_bins=5, ignore_index=255).correct.isnan().sum() == 1


def test_the_same_bits_twice_and_whatever_the_batch():
    values, labels = prediction((17, 40), dtype=torch.bfloat16)
    options = {"num_bins": 15, "kind": "classwise", "from_logits": True, "ignore_index": 255}
    first, second = fused(values, labels, **options), fused(values, labels, **options)
    one = fused(values[1:], labels[1:], **options)
    assert torch.equal(first.confidence, second.confidence)
    assert torch.equal(first.confidence[1:], one.confidence)


def test_offsets_of_64_bits(monkeypatch):
    from densecal.ops.triton import layout

    monkeypatch.setattr(layout, "_FARTHEST", 0)
    values, labels = prediction()
    hold(
        fused(values, labels, num_bins=15, from_logits=True, ignore_index=255),
        twin.calibration_bins(values, labels, num_bins=15, from_logits=True, ignore_index=255),
        tolerance=1e-6,
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_nothing_is_no_entries(shape):
    bins = fused(torch.zeros(shape, device=DEVICE), torch.zeros(shape[0], shape[2], dtype=torch.long, device=DEVICE), num_bins=5, ignore_index=255)
    assert bins.count.shape == (shape[0], 1, 5)
    assert not bins.count.any()


def test_what_is_not_covered_says_why():
    values, labels = prediction()
    with pytest.raises(NotCovered, match="ignore_index=4294967296 does not fit 32 bits"):
        fused(values, labels, num_bins=5, ignore_index=2**32)


@EVERY_KIND
@pytest.mark.parametrize("pooling", ["dataset", "image"])
@PROBS_OR_LOGITS
def test_metric(kind, pooling, from_logits):
    values, labels = prediction(logits=from_logits)
    options = {"kind": kind, "pooling": pooling, "from_logits": from_logits, "ignore_index": 255}
    metric = CalibrationError(num_classes=4, backend="triton", **options).to(DEVICE)
    metric.update(values[:1], labels[:1])
    metric.update(values[1:], labels[1:])
    expected = calibration_error(values, labels, backend="torch", **options)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-6, atol=1e-6)
    assert metric.count == (labels != 255).sum()


def test_metric_says_what_is_wrong_where_labels_count():
    logits, labels = prediction()
    logits[1, 2, 0, 0] = math.nan
    labels[1, 0, 0] = 255
    options = {"backend": "triton", "from_logits": True, "ignore_index": 255}
    calibration_error(logits, labels, **options)
    labels[1, 0, 0] = 0
    with pytest.raises(ValueError, match="Expected finite logits where labels count"):
        calibration_error(logits, labels, **options)
    labels[1, 0, 0] = 4
    with pytest.raises(ValueError, match=r"Expected labels in 0 to 3 or ignore_index=255, but got \[4\]"):
        calibration_error(logits, labels, **options)
