"""Bins of a prediction against a label map: a loop over pixels, edges, ties, layouts, blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import each_dimension

from densecal.ops import calibration_bins as module
from densecal.ops.binning import accumulate_bins, bin_edges
from densecal.ops.calibration_bins import calibration_bins


def loop(values, labels, *, num_bins, kind="top_label", from_logits=False, ignore_index, mask=None, threshold=0.0):
    """Pixel by pixel, in Python's floats: counts, sums of confidence and of what was right as lists ``[image][row][bin]``."""
    n, c = values.shape[:2]
    rows = 1 if kind == "top_label" else c
    sums = [[[[0.0] * num_bins for _ in range(rows)] for _ in range(n)] for _ in range(3)]
    flat, labels = values.flatten(2).tolist(), labels.flatten(1).tolist()
    mask = [[True] * len(labels[0])] * n if mask is None else mask.flatten(1).tolist()
    for i, j in itertools.product(range(n), range(len(labels[0]))):
        if labels[i][j] == ignore_index or not mask[i][j]:
            continue
        p = [flat[i][k][j] for k in range(c)]
        if from_logits:
            exponentials = [math.exp(z - max(p)) for z in p]
            p = [e / sum(exponentials) for e in exponentials]
        seen = [(0, max(p), p.index(max(p)) == labels[i][j])] if kind == "top_label" else [(k, p[k], labels[i][j] == k) for k in range(c)]
        for row, confidence, right in seen:
            if not threshold or confidence > threshold:
                b = min(max(math.ceil(confidence * num_bins) - 1, 0), num_bins - 1)
                for total, number in zip(sums, (1, confidence, right), strict=True):
                    total[i][row][b] += number
    return sums


def prediction(spatial, *, num_classes=4, batch=2, dtype=torch.float64, logits=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(batch, num_classes, *spatial, generator=generator, dtype=torch.float64)
    labels = torch.where(
        torch.rand(batch, *spatial, generator=generator) < 0.7, z.argmax(1), torch.randint(0, num_classes, (batch, *spatial), generator=generator)
    )
    return (z if logits else z.softmax(1)).to(dtype), labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, 255)


def same(bins, sums):
    count, confidence, correct = (torch.tensor(total, dtype=torch.float64) for total in sums)
    assert torch.equal(bins.count, count.long())
    torch.testing.assert_close(bins.confidence, confidence, rtol=1e-12, atol=1e-12)
    assert torch.equal(bins.correct, correct)


@each_dimension
@pytest.mark.parametrize("kind", module.CALIBRATION_KINDS)
@pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])
@pytest.mark.parametrize("options", [{}, {"mask": True, "threshold": 0.4}], ids=["all", "mask-threshold"])
def test_equals_a_loop(spatial, kind, from_logits, options):
    values, labels = prediction(spatial, logits=from_logits)
    options = options | ({"mask": torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.6} if "mask" in options else {})
    options |= {"num_bins": 7, "kind": kind, "from_logits": from_logits, "ignore_index": 255}
    same(calibration_bins(values, labels, **options), loop(values, labels, **options))


@pytest.mark.parametrize("kind", module.CALIBRATION_KINDS)
@pytest.mark.parametrize("num_bins", [1, 10, 15, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_edge_belongs_below_and_one_to_the_last_bin(kind, num_bins, dtype):
    edges = bin_edges(num_bins, dtype=dtype)[1:]  # of the first class; the label is the second where that is larger
    probs = torch.stack([edges, 1 - edges]).unsqueeze(0)
    bins = calibration_bins(probs, (edges < 0.5).long().unsqueeze(0), num_bins=num_bins, kind=kind, ignore_index=255)
    if kind == "classwise":
        assert bins.count[0, 0].tolist() == [1] * num_bins
    else:
        confidence = probs.amax(1)
        assert torch.equal(bins.count[0], accumulate_bins(confidence, torch.ones_like(confidence, dtype=torch.bool), num_bins=num_bins).count)
        assert bins.count[0, 0, -1] >= 1


@pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])
def test_the_first_of_tied_classes_wins(from_logits):
    p = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    values = (p.log() if from_logits else p).T.unsqueeze(0)  # a logit of minus infinity is a probability of 0
    for label, right in enumerate(([1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1])):
        bins = calibration_bins(values, torch.full((1, 4), label), num_bins=5, from_logits=from_logits, ignore_index=255)
        assert bins.count.sum() == 4
        assert bins.correct.sum() == sum(right)


def test_many_ties_equal_a_search():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randint(0, 3, (2, 5, 4001), generator=generator).float(), torch.randint(0, 5, (2, 4001), generator=generator)
    bins = calibration_bins(logits, labels, num_bins=15, from_logits=True, ignore_index=255)
    right = torch.stack(
        [(image.T.argsort(dim=1, descending=True, stable=True)[:, 0] == label).sum() for image, label in zip(logits, labels, strict=True)]
    )
    assert torch.equal(bins.correct.sum((1, 2)).long(), right)


@pytest.mark.parametrize("kind", module.CALIBRATION_KINDS)
@pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])
def test_blocks_layouts_and_types_do_not_matter(kind, from_logits, monkeypatch):
    values, labels = prediction((13, 11), dtype=torch.float32, logits=from_logits)
    options = {"num_bins": 15, "kind": kind, "from_logits": from_logits, "ignore_index": 255}
    whole = calibration_bins(values, labels, **options)
    mostly = calibration_bins(values, labels.masked_fill(labels == 255, 0), **options)  # nothing is ignored

    def hold(*arguments, expected=whole):
        bins = calibration_bins(*arguments, **options)
        assert torch.equal(bins.count, expected.count)
        assert torch.equal(bins.correct, expected.correct)
        torch.testing.assert_close(bins.confidence, expected.confidence, rtol=1e-12 if not from_logits else 1e-7, atol=0)

    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.float32):
        hold(values, labels.to(dtype))
    hold(values.contiguous(memory_format=torch.channels_last), labels)
    hold(values.transpose(2, 3).contiguous().transpose(2, 3), labels.mT.contiguous().mT)
    monkeypatch.setattr(module, "_PIXELS", 8)
    hold(values, labels)
    hold(values, labels.masked_fill(labels == 255, 0), expected=mostly)
    half = values.bfloat16()
    whole = calibration_bins(half.float(), labels, **options)
    hold(half, labels, expected=whole)


@pytest.mark.parametrize("kind", module.CALIBRATION_KINDS)
def test_logits_are_binned_as_their_softmax_but_for_rounding_at_edges(kind):
    """Softmax rounds to 24 bits: a confidence within that of an edge may fall to its other side. Here at most 2 of 600 000 pixels do."""
    logits, labels = prediction((100_000,), num_classes=3, dtype=torch.float32)
    options = {"num_bins": 15, "kind": kind, "ignore_index": 255}
    bins, expected = calibration_bins(logits, labels, from_logits=True, **options), calibration_bins(logits.softmax(1), labels, **options)
    assert (bins.count - expected.count).abs().sum() <= 4
    torch.testing.assert_close(bins.confidence.sum(-1), expected.confidence.sum(-1), rtol=1e-7, atol=0)
    assert torch.equal(bins.correct.sum(-1), expected.correct.sum(-1))


@pytest.mark.parametrize("from_logits", [False, True], ids=["probs", "logits"])
def test_what_does_not_count_may_be_anything_and_what_counts_is_not_hidden(from_logits):
    values, labels = prediction((5, 7), logits=from_logits)
    ignored = (labels == 255).unsqueeze(1)
    options = {"num_bins": 5, "from_logits": from_logits, "ignore_index": 255}
    expected = calibration_bins(values, labels, **options)
    for other in (torch.nan, torch.inf):
        bins = calibration_bins(values.masked_fill(ignored, other), labels, **options)
        assert torch.equal(bins.confidence, expected.confidence)
        assert torch.equal(bins.correct, expected.correct)
    assert calibration_bins(values.masked_fill(~ignored, torch.nan), labels, **options).confidence.isnan().any()


def test_blocks_are_looked_at():
    probs, labels = prediction((9, 5), logits=False)
    seen = []
    calibration_bins(probs, labels, num_bins=5, ignore_index=255, look=lambda block, largest: seen.append((block, largest)))
    assert torch.equal(torch.cat([block for block, _ in seen], 2), probs.flatten(2))
    assert torch.equal(torch.cat([largest for _, largest in seen], 1), probs.flatten(2).amax(1))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_nothing_is_no_entries(shape):
    bins = calibration_bins(torch.zeros(shape), torch.zeros(shape[0], shape[2], dtype=torch.long), num_bins=5, ignore_index=255)
    assert bins.count.shape == (shape[0], 1, 5)
    assert not bins.count.any()


@pytest.mark.parametrize(
    ("options", "message"), [({"num_bins": 0}, "num_bins"), ({"kind": "both"}, r"`kind` to be one of \('top_label', 'classwise'\)")]
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        calibration_bins(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), **{"num_bins": 5, "ignore_index": 255} | options)
