"""The histogram that keeps the order of confidences."""

import pytest
import torch

from densecal.ops import binning
from densecal.ops.fine_bins import NUM_FINE_BINS, accumulate_fine_bins, distinct_bins, fine_bin_edges, fine_bin_index


def crowded(count, seed=0, dtype=torch.float32):
    """Numbers in [0, 1] at every distance from both ends, and the ends."""
    generator = torch.Generator().manual_seed(seed)
    near = 2.0 ** -(1 + 29 * torch.rand(count, generator=generator, dtype=torch.float64))
    flip = torch.rand(count, generator=generator) < 0.5
    numbers = torch.where(flip, 1 - near, near).to(dtype)
    numbers[:4] = torch.tensor([0.0, 1.0, 0.5, -0.0], dtype=dtype)
    return numbers


def test_fine_bin_edges_by_hand():
    edges = fine_bin_edges()
    assert len(edges) == NUM_FINE_BINS + 1
    # From 1/4 to 1/2 in 128 steps, and mirrored from 1/2 to 3/4.
    middle = NUM_FINE_BINS // 2
    torch.testing.assert_close(edges[middle - 128 : middle + 129], 0.25 + torch.arange(257, dtype=torch.float64) / 512, rtol=0, atol=0)
    assert edges[:3].tolist() == [0, 0, 2**-24]
    assert edges[-3:].tolist() == [1 - 2**-24, 1, 1]
    assert torch.equal(edges, 1 - edges.flip(0))
    assert (edges.diff()[1:-1] > 0).all()


def test_fine_bin_edges_width_is_as_promised():
    edges = fine_bin_edges()
    nearest = torch.minimum(torch.minimum(edges, 1 - edges)[:-1], torch.minimum(edges, 1 - edges)[1:])
    assert (edges.diff() <= torch.clamp(nearest / 2**7, min=2**-24)).all()
    assert edges.diff().max() == 2**-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fine_bin_index_equals_a_search_among_the_edges(dtype):
    numbers = crowded(20_000, dtype=dtype)
    edges = fine_bin_edges()
    index = fine_bin_index(numbers)
    p = numbers.double()
    expected = torch.bucketize(p, edges[1:-1])  # (lower, upper]
    expected[p == 1] = NUM_FINE_BINS - 1
    assert torch.equal(index, expected)


def test_fine_bin_index_on_and_beside_every_edge():
    edges = fine_bin_edges()
    inner, width = edges[2:-2], edges.diff()
    expected = torch.arange(1, NUM_FINE_BINS - 2)
    assert torch.equal(fine_bin_index(inner), expected)
    assert torch.equal(fine_bin_index(inner + 1e-3 * width[2:-1]), expected + 1)
    lower = inner[inner <= 0.5].float()
    assert torch.equal(fine_bin_index(torch.nextafter(lower, torch.ones(()))), expected[: len(lower)] + 1)


def test_fine_bin_index_never_falls_and_splits_every_float32_next_to_1():
    numbers = crowded(20_000).sort().values
    assert (fine_bin_index(numbers).diff() >= 0).all()
    last = 1 - torch.arange(128, dtype=torch.float64).flip(0) / 2**24
    assert fine_bin_index(last.float()).unique().numel() == 128


def test_fine_bin_index_outside_goes_to_the_ends():
    assert fine_bin_index(torch.tensor([-0.5, 1.5])).tolist() == [0, NUM_FINE_BINS - 1]
    assert 0 <= fine_bin_index(torch.tensor([torch.nan])) < NUM_FINE_BINS


@pytest.mark.parametrize("shape", [(3001,), (3, 1001), (2, 3, 501)], ids=str)
def test_accumulate_fine_bins_equals_a_loop(shape, monkeypatch):
    monkeypatch.setattr(binning, "_BLOCK", 100)
    generator = torch.Generator().manual_seed(1)
    numel = torch.Size(shape).numel()
    confidence, correct = crowded(numel).view(shape), torch.rand(shape, generator=generator)
    row = torch.randint(0, 3, shape[-1:], generator=generator)
    valid = torch.rand(shape, generator=generator) < 0.7
    bins = accumulate_fine_bins(torch.where(valid, confidence, torch.nan), correct, row=row, num_rows=3, valid=valid)
    count, total, right = (torch.zeros(3, NUM_FINE_BINS, dtype=torch.float64) for _ in range(3))
    rows = row.expand(shape).flatten().tolist()
    for p, q, r, v in zip(confidence.flatten(), correct.flatten(), rows, valid.flatten(), strict=True):
        if v:
            b = int(fine_bin_index(p))
            count[r, b] += 1
            total[r, b] += p.double()
            right[r, b] += q.double()
    torch.testing.assert_close(bins.count.double(), count)
    torch.testing.assert_close(bins.confidence, total)
    torch.testing.assert_close(bins.correct, right)
    assert bins.count.dtype == torch.int64


def test_accumulate_fine_bins_nothing():
    assert accumulate_fine_bins(torch.zeros(0), torch.zeros(0)).count.sum() == 0
    assert accumulate_fine_bins(torch.zeros(0, 2, 5), torch.zeros(0, 2, 5)).count.sum() == 0
    with pytest.raises(ValueError, match="of the shape of `confidence`"):
        accumulate_fine_bins(torch.zeros(3), torch.zeros(2))


def test_distinct_bins_by_hand():
    confidence = torch.tensor([[0.75, 0.5], [0.75, 0.25]])
    bins = distinct_bins(confidence, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([[True, True], [True, False]]))
    assert bins.count.tolist() == [[1, 2]]
    assert bins.confidence.tolist() == [[0.5, 1.5]]
    assert bins.correct.tolist() == [[0.5, 1.0]]


@pytest.mark.gpu
def test_accumulate_fine_bins_on_a_gpu_equals_cpu_without_a_sync():
    confidence = crowded(100_003)
    correct = torch.rand(100_003, generator=torch.Generator().manual_seed(2)) < confidence
    inputs = confidence.cuda(), correct.cuda()
    accumulate_fine_bins(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = accumulate_fine_bins(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = accumulate_fine_bins(confidence, correct)
    assert torch.equal(on_gpu.count.cpu(), on_cpu.count)
    torch.testing.assert_close(on_gpu.confidence.cpu(), on_cpu.confidence)
    assert torch.equal(on_gpu.correct.cpu(), on_cpu.correct)
