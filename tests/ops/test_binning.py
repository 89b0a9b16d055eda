"""The accumulator that every calibration measure reads."""

import pytest
import torch

from densecal.ops import binning
from densecal.ops.binning import MEASURES, Bins, accumulate_bins, bin_edges, bin_index


def loop_over_entries(confidence, correct, row, num_rows, num_bins, valid):
    """(lower, upper] with edges k/B rounded to the confidence's precision, one entry after the other."""
    edges = [torch.tensor(k / num_bins, dtype=torch.float64).to(confidence.dtype).item() for k in range(num_bins + 1)]
    count = [[0] * num_bins for _ in range(num_rows)]
    total = [[0.0] * num_bins for _ in range(num_rows)]
    right = [[0.0] * num_bins for _ in range(num_rows)]
    for c, r, i, v in zip(confidence.tolist(), correct.double().tolist(), row.tolist(), valid.tolist(), strict=True):
        if not v:
            continue
        b = next((k for k in range(num_bins) if c <= edges[k + 1]), num_bins - 1)
        count[i][b] += 1
        total[i][b] += c
        right[i][b] += r
    return count, total, right


def test_accumulate_bins_by_hand():
    bins = accumulate_bins(torch.tensor([0.55, 0.6, 0.95, 0.85], dtype=torch.float64), torch.tensor([True, False, True, True]), num_bins=10)
    assert bins.count.tolist() == [[0, 0, 0, 0, 0, 2, 0, 0, 1, 1]]
    torch.testing.assert_close(bins.mean_confidence[0, 5], torch.tensor((0.55 + 0.6) / 2, dtype=torch.float64))
    assert bins.accuracy[0, 5] == 1 / 2
    expected = 2 / 4 * abs(1 / 2 - (0.55 + 0.6) / 2) + 1 / 4 * (1 - 0.95) + 1 / 4 * (1 - 0.85)
    torch.testing.assert_close(bins.calibration_error(), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_bins", [1, 2, 7, 10, 15, 20, 100])
def test_bin_index_on_and_beside_every_edge(dtype, num_bins):
    edges = bin_edges(num_bins, dtype=dtype)
    assert bin_index(edges, num_bins).tolist() == [0, *range(num_bins)]  # an edge belongs to the bin below it, 0 to the first
    above = torch.nextafter(edges[:-1], torch.ones_like(edges[:-1])) if dtype.itemsize > 2 else edges[:-1] + (edges[1:] - edges[:-1]) / 2
    assert bin_index(above, num_bins).tolist() == list(range(num_bins))


def test_bin_index_equals_a_search_among_the_edges():
    confidence = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for num_bins in (3, 10, 15, 20, 33):
        edges = bin_edges(num_bins, dtype=torch.float32)
        torch.testing.assert_close(bin_index(confidence, num_bins), torch.bucketize(confidence, edges[1:-1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_accumulate_bins_equals_a_loop(dtype):
    generator = torch.Generator().manual_seed(1)
    confidence = (torch.randint(0, 31, (301,), generator=generator) / 30).to(dtype)  # many on edges
    correct = torch.rand(301, generator=generator)
    row = torch.randint(0, 3, (301,), generator=generator)
    valid = torch.rand(301, generator=generator) < 0.7
    bins = accumulate_bins(confidence, correct, num_bins=15, row=row, num_rows=3, valid=valid)
    count, total, right = loop_over_entries(confidence, correct, row, 3, 15, valid)
    assert bins.count.tolist() == count
    torch.testing.assert_close(bins.confidence, torch.tensor(total, dtype=torch.float64))
    torch.testing.assert_close(bins.correct, torch.tensor(right, dtype=torch.float64))


def test_accumulate_bins_parts_add_up():
    generator = torch.Generator().manual_seed(2)
    confidence, correct = torch.rand(1000, generator=generator), torch.rand(1000, generator=generator) < 0.5
    whole = accumulate_bins(confidence, correct, num_bins=15)
    parts = Bins.empty(1, 15)
    for start in range(0, 1000, 77):
        parts = parts + accumulate_bins(confidence[start : start + 77], correct[start : start + 77], num_bins=15)
    assert torch.equal(whole.count, parts.count)
    torch.testing.assert_close(whole.confidence, parts.confidence, rtol=1e-13, atol=0)
    assert torch.equal(whole.correct, parts.correct)


@pytest.mark.parametrize("shape", [(200_003,), (3, 70_001), (2, 5, 20_011), (140_000, 1)], ids=str)
def test_accumulate_bins_block_by_block_equals_at_once(shape, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    confidence, correct = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) < 0.5
    row = torch.arange(shape[0] if len(shape) > 1 else 1).clamp(max=2).view(-1, *[1] * (len(shape) - 1))
    valid = torch.rand(shape[1:] or shape, generator=generator) < 0.5
    options = {"num_bins": 15, "row": row, "num_rows": 3, "valid": valid}
    blocks = accumulate_bins(confidence, correct, **options)
    monkeypatch.setattr(binning, "_BLOCK", confidence.numel())
    whole = accumulate_bins(confidence, correct, **options)
    assert torch.equal(blocks.count, whole.count)
    assert torch.equal(blocks.correct, whole.correct)
    torch.testing.assert_close(blocks.confidence, whole.confidence, rtol=1e-12, atol=0)


def test_accumulate_bins_what_does_not_count_may_be_anything():
    confidence = torch.tensor([0.5, float("nan"), float("inf"), -3.0])
    correct = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    bins = accumulate_bins(confidence, correct, num_bins=4, valid=torch.tensor([True, False, False, False]))
    assert bins.count.sum() == 1
    assert bins.confidence.sum() == 0.5
    assert bins.correct.sum() == 1


def test_accumulate_bins_nothing_is_nan():
    bins = accumulate_bins(torch.zeros(0), torch.zeros(0, dtype=torch.bool), num_bins=5)
    assert bins.count.sum() == 0
    assert bins.calibration_error().isnan().all()
    assert bins.accuracy.isnan().all()


def test_accumulate_bins_gradient_reaches_confidence_and_correct():
    confidence = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    correct = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: accumulate_bins(a, b, num_bins=5).calibration_error(), (confidence, correct))


def test_accumulate_bins_sums_of_many_are_exact_enough():
    confidence = torch.full((3_000_000,), 0.1)
    bins = accumulate_bins(confidence, torch.ones(3_000_000, dtype=torch.bool), num_bins=15)
    torch.testing.assert_close(bins.confidence.sum(), 3_000_000 * confidence[0].double(), rtol=1e-9, atol=0)


def make_bins(*entries):
    """Bins from (count, sum of confidence, sum of correct) each."""
    count, confidence, correct = zip(*entries, strict=True)
    return Bins(torch.tensor([count]), torch.tensor([confidence], dtype=torch.float64), torch.tensor([correct], dtype=torch.float64))


# Ten entries: 4 of confidence 0.3, half of them right (gap 0.2); 5 of 0.9, 3 right (gap 0.3); 1 of 0.6, right (gap 0.4). The fourth bin is empty.
BY_HAND = make_bins((4, 4 * 0.3, 2), (5, 5 * 0.9, 3), (1, 0.6, 1), (0, 0.0, 0))
DEBIASED = (4 * (0.2**2 - 0.5 * 0.5 / 3) + 5 * (0.3**2 - 0.6 * 0.4 / 4)) / 9  # the bin of one entry is left out


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("expected", 0.4 * 0.2 + 0.5 * 0.3 + 0.1 * 0.4),
        ("maximum", 0.4),
        ("average", (0.2 + 0.3 + 0.4) / 3),
        ("root_mean_square", (0.4 * 0.2**2 + 0.5 * 0.3**2 + 0.1 * 0.4**2) ** 0.5),
        ("signed", -0.4 * 0.2 + 0.5 * 0.3 - 0.1 * 0.4),
        ("overconfidence", 0.5 * 0.3),
        ("underconfidence", 0.4 * 0.2 + 0.1 * 0.4),
        ("overconfidence_error", 0.5 * 0.9 * 0.3),
        ("debiased_mean_square", DEBIASED),
        ("debiased_root_mean_square", max(DEBIASED, 0) ** 0.5),
    ],
)
def test_calibration_error_measures_by_hand(measure, expected):
    torch.testing.assert_close(BY_HAND.calibration_error(measure), torch.tensor([expected], dtype=torch.float64))


def test_calibration_error_every_measure_has_a_sentence_and_is_nan_for_nothing():
    both = Bins(*(torch.cat([sums, torch.zeros_like(sums)]) for sums in (BY_HAND.count, BY_HAND.confidence, BY_HAND.correct)))
    for measure, sentence in MEASURES.items():
        assert sentence.endswith(".")
        assert both.calibration_error(measure).isnan().tolist() == [False, True], measure


def test_calibration_error_debiased_by_entries():
    # Kumar et al. 2019, equation of the estimator: per bin (acc - conf)^2 - acc (1 - acc) / (n - 1), weighted by n.
    generator = torch.Generator().manual_seed(6)
    confidence = torch.rand(200, generator=generator, dtype=torch.float64)
    right = torch.rand(200, generator=generator) < confidence
    total = 0.0
    for b in range(5):
        inside = [(c, float(r)) for c, r in zip(confidence.tolist(), right.tolist(), strict=True) if b / 5 < c <= (b + 1) / 5]
        n = len(inside)
        accuracy = sum(r for _, r in inside) / n
        total += n / 200 * ((accuracy - sum(c for c, _ in inside) / n) ** 2 - accuracy * (1 - accuracy) / (n - 1))
    bins = accumulate_bins(confidence, right, num_bins=5)
    assert bins.calibration_error("debiased_mean_square").item() == pytest.approx(total, abs=1e-14)
    assert bins.calibration_error("root_mean_square").item() ** 2 > total


def test_calibration_error_debiased_is_centred_where_the_plain_square_is_not():
    # A calibrated model: the true error is 0. Averaged over draws the plain square is positive and the debiased one is not.
    generator = torch.Generator().manual_seed(7)
    confidence = torch.rand(400, 100, generator=generator, dtype=torch.float64)
    right = torch.rand(400, 100, generator=generator) < confidence
    row = torch.arange(400).view(-1, 1)
    bins = accumulate_bins(confidence, right, num_bins=5, row=row, num_rows=400)
    assert bins.calibration_error("root_mean_square").square().mean() > 7e-3  # 5 bins of 20 entries: about 1/6 / 20 each
    assert bins.calibration_error("debiased_mean_square").mean().abs() < 1e-3


def test_calibration_error_debiased_needs_a_bin_of_two():
    assert make_bins((1, 0.3, 1), (1, 0.9, 0)).calibration_error("debiased_mean_square").isnan().all()


def test_calibration_error_unknown_measure():
    with pytest.raises(ValueError, match="Expected `measure` to be one of"):
        BY_HAND.calibration_error("ACE")


@pytest.mark.parametrize("length", [1, 3, 4, 65_535, 65_537, 200_001])
def test_accumulate_bins_every_entry_counts_once_whatever_the_length(length):
    bins = accumulate_bins(torch.full((length,), 0.3), torch.ones(length, dtype=torch.bool), num_bins=4)
    assert bins.count.tolist() == [[0, length, 0, 0]]
    assert bins.correct.tolist() == [[0, length, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bin_index_rounding_beyond_the_ends_does_no_harm(dtype):
    eps = torch.finfo(dtype).eps
    assert bin_index(torch.tensor([-eps, 0.0, 1.0, 1 + eps], dtype=dtype), 15).tolist() == [0, 0, 14, 14]


@pytest.mark.gpu
def test_accumulate_bins_on_a_gpu_equals_cpu_without_a_sync():
    generator = torch.Generator().manual_seed(3)
    confidence, correct = torch.rand(100_003, generator=generator), torch.rand(100_003, generator=generator) < 0.5
    row, valid = torch.randint(0, 4, (100_003,), generator=generator), torch.rand(100_003, generator=generator) < 0.5
    inputs = [tensor.cuda() for tensor in (confidence, correct, row, valid)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = accumulate_bins(inputs[0], inputs[1], num_bins=15, row=inputs[2], num_rows=4, valid=inputs[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = accumulate_bins(confidence, correct, num_bins=15, row=row, num_rows=4, valid=valid)
    assert torch.equal(on_gpu.count.cpu(), on_cpu.count)
    torch.testing.assert_close(on_gpu.confidence.cpu(), on_cpu.confidence)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"num_bins": 0}, "Expected `num_bins` to be greater than 0"), ({"num_bins": 3, "correct": torch.zeros(2)}, "Expected `correct` of the shape")],
    ids=["no-bins", "shape"],
)
def test_accumulate_bins_errors(kwargs, message):
    correct = kwargs.pop("correct", torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        accumulate_bins(torch.zeros(3), correct, **kwargs)
