"""Intervals from resampled cases."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from densecal.metrics import CaseBootstrap
from densecal.ops.binning import Bins, accumulate_bins


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ece(count, confidence, correct):
    return Bins(count, confidence, correct).calibration_error()


def bins_of_cases(cases=12, pixels=200, num_bins=5, seed=0):
    confidence = 0.5 + 0.5 * torch.rand(cases, pixels, generator=generator(seed), dtype=torch.float64)
    level = 0.5 + 0.4 * torch.rand(cases, 1, generator=generator(seed + 1), dtype=torch.float64)
    correct = torch.rand(cases, pixels, generator=generator(seed + 2), dtype=torch.float64) < level
    row = torch.arange(cases).view(-1, 1)
    bins = accumulate_bins(confidence, correct, num_bins=num_bins, row=row, num_rows=cases)
    return bins.count, bins.confidence, bins.correct


def test_mean_interval_by_enumeration():
    # Two cases of 0 and 1: a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    values = torch.tensor([0.0, 1.0])
    assert [end.item() for end in CaseBootstrap(2, level=0.95).mean_interval(values)] == [0.0, 1.0]
    assert [end.item() for end in CaseBootstrap(2, level=0.4).mean_interval(values)] == [0.5, 0.5]


def test_weights_draw_as_many_cases_as_there_are():
    bootstrap = CaseBootstrap(7, replicates=4000)
    assert bootstrap.weights.shape == (4000, 7)
    assert (bootstrap.weights.sum(1) == 7).all()
    # Multinomial: mean 1 and variance 1 - 1/7 for every case.
    torch.testing.assert_close(bootstrap.weights.double().mean(0), torch.ones(7, dtype=torch.float64), rtol=0, atol=0.06)
    torch.testing.assert_close(bootstrap.weights.double().var(0), torch.full((7,), 6 / 7, dtype=torch.float64), rtol=0, atol=0.12)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_mean_interval_equals_scipy_within_chance(level):
    values = 1 - torch.rand(30, generator=generator(), dtype=torch.float64) ** 4
    theirs = stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=0).confidence_interval
    ours = CaseBootstrap(30, replicates=20_000, level=level).mean_interval(values)
    # The standard error of a 2.5 % quantile of 20 000 normal draws is about 0.02 standard deviations.
    assert [end.item() for end in ours] == pytest.approx(list(theirs), abs=0.1 * values.std().item() / math.sqrt(30))


def test_interval_of_a_pooled_error_equals_a_loop_over_resamples():
    sums = bins_of_cases()
    bootstrap = CaseBootstrap(12, replicates=50, level=0.9)
    figures = []
    for weights in bootstrap.weights.tolist():
        drawn = [i for i, times in enumerate(weights) for _ in range(times)]
        count, confidence, correct = (one[drawn].sum(0) for one in sums)
        figures.append(sum(abs(h - f) for h, f in zip(correct.tolist(), confidence.tolist(), strict=True)) / count.sum().item())
    assert bootstrap.resampled(ece, *sums).tolist() == pytest.approx(figures)
    assert [end.item() for end in bootstrap.interval(ece, *sums)] == pytest.approx(np.percentile(figures, [5, 95]).tolist())


def test_blocks_of_replicates_change_nothing(monkeypatch):
    sums = bins_of_cases()
    at_once = CaseBootstrap(12).resampled(ece, *sums)
    monkeypatch.setattr("densecal.metrics.bootstrap._BLOCK", 100)
    torch.testing.assert_close(CaseBootstrap(12).resampled(ece, *sums), at_once, rtol=1e-12, atol=1e-15)


def test_mean_interval_columns_leave_out_their_own_undefined_cases():
    values = torch.rand(9, 2, 3, generator=generator(), dtype=torch.float64)
    values[0, 0, 0] = values[3, 0, 0] = torch.nan
    values[1:, 1, 2] = torch.nan  # one case left
    bootstrap = CaseBootstrap(9, replicates=40)
    lower, upper = bootstrap.mean_interval(values)
    assert lower.shape == upper.shape == (2, 3)
    means = [np.nanmean([values[i, 0, 0] for i, times in enumerate(w) for _ in range(times)]) for w in bootstrap.weights.tolist()]
    assert [lower[0, 0].item(), upper[0, 0].item()] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
    assert lower[1, 2].isnan()
    assert upper[1, 2].isnan()
    alone = bootstrap.mean_interval(values[:, 1, 0])
    assert (lower[1, 0], upper[1, 0]) == alone


def test_replicates_without_a_value_are_left_out():
    # Values in two of twelve cases: every seventh resample has neither, (10/12)^12 of them.
    values = torch.full((12,), torch.nan)
    values[:2] = torch.tensor([0.2, 0.6])
    bootstrap = CaseBootstrap(12, replicates=500)
    assert (bootstrap.weights[:, :2].sum(1) == 0).any()
    assert [end.item() for end in bootstrap.mean_interval(values)] == pytest.approx([0.2, 0.6])


@pytest.mark.parametrize("num_cases", [0, 1])
def test_fewer_than_two_cases_have_no_interval(num_cases):
    bootstrap = CaseBootstrap(num_cases, replicates=10)
    assert all(end.isnan() for end in bootstrap.mean_interval(torch.ones(num_cases)))
    assert all(end.isnan() for end in bootstrap.interval(ece, *(torch.ones(num_cases, 4) for _ in range(3))))


def test_interval_fewer_than_two_cases_that_add_anything():
    sums = [torch.zeros(5, 4) for _ in range(3)]
    for one in sums:
        one[2] = 1.0
    assert all(end.isnan() for end in CaseBootstrap(5, replicates=10).interval(ece, *sums))
    assert all(end.isnan() for end in CaseBootstrap(5, replicates=10, groups=[0, 0, 0, 0, 0]).mean_interval(torch.rand(5)))


def test_groups_are_drawn_whole():
    groups = torch.tensor([30, 10, 30, 20, 10, 30])
    bootstrap = CaseBootstrap(6, groups=groups, replicates=200)
    weights = bootstrap.weights
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] == weights[:, 5]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    # Five copies of each of 20 subjects tell as much as the 20: the interval is theirs, wider by sqrt(5) than that of 100 free cases.
    values = torch.rand(20, generator=generator(), dtype=torch.float64)
    copies, subjects = values.repeat_interleave(5), torch.arange(20).repeat_interleave(5)
    grouped = CaseBootstrap(100, groups=subjects).mean_interval(copies)
    torch.testing.assert_close(grouped, CaseBootstrap(20).mean_interval(values))
    free = CaseBootstrap(100).mean_interval(copies)
    assert ((grouped[1] - grouped[0]) / (free[1] - free[0])).item() == pytest.approx(math.sqrt(5), rel=0.2)


def test_coverage_of_the_mean():
    # 2000 samples of 40 normal scores around 0.8: 95 % intervals hold 0.8 in about 94 of 100 (percentiles are short by about 1/n).
    values = 0.8 + 0.05 * torch.randn(40, 2000, generator=generator(), dtype=torch.float64)
    lower, upper = CaseBootstrap(40).mean_interval(values)
    covered = ((lower <= 0.8) & (upper >= 0.8)).double().mean().item()
    assert 0.92 < covered < 0.96


def test_difference_on_pairs_is_narrower():
    base = bins_of_cases(cases=30)
    # Model b is a little less sure of everything: by case the two go together.
    other = (base[0], base[1] - 0.02 * base[0], base[2])
    bootstrap = CaseBootstrap(30)
    a, b, difference = bootstrap.interval(ece, *base), bootstrap.interval(ece, *other), bootstrap.difference_interval(ece, base, other)
    figures = bootstrap.resampled(ece, *base) - bootstrap.resampled(ece, *other)
    assert [end.item() for end in difference] == pytest.approx(np.percentile(figures.numpy(), [2.5, 97.5]).tolist())
    unpaired = math.hypot(a[1] - a[0], b[1] - b[0])
    assert difference[1] - difference[0] < 0.5 * unpaired
    assert difference[0] <= (ece(*(one.sum(0) for one in base)) - ece(*(one.sum(0) for one in other))) <= difference[1]


def test_same_seed_same_resamples_and_other_seed_others():
    assert torch.equal(CaseBootstrap(5, seed=3).weights, CaseBootstrap(5, seed=3).weights)
    assert not torch.equal(CaseBootstrap(5, seed=3).weights, CaseBootstrap(5, seed=4).weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_ends_are_double(dtype):
    lower, upper = CaseBootstrap(4).mean_interval(torch.tensor([0, 1, 2, 4]).to(dtype))
    assert lower.dtype == upper.dtype == torch.float64
    assert (lower.item(), upper.item()) == tuple(end.item() for end in CaseBootstrap(4).mean_interval(torch.tensor([0.0, 1.0, 2.0, 4.0])))


def test_errors():
    for kwargs, message in [
        ({"num_cases": -1}, "Expected `num_cases` to be 0 or greater, but got -1"),
        ({"num_cases": 2, "replicates": 0}, "Expected `replicates` to be greater than 0"),
        ({"num_cases": 2, "level": 95}, r"Expected `level` in \(0, 1\), but got 95"),
        ({"num_cases": 2, "groups": [1]}, r"Expected `groups` of shape \(n,\) = \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            CaseBootstrap(**kwargs)
    with pytest.raises(ValueError, match="Expected `values` with one row for each of 2 cases"):
        CaseBootstrap(2).mean_interval(torch.zeros(3))
    with pytest.raises(ValueError, match="Expected `per_case_sums` without NaN"):
        CaseBootstrap(2).interval(lambda a: a, torch.tensor([1.0, torch.nan]))
