"""Bands over cases and the histogram of cases, small enough to count by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation
from densecal.metrics.results import RegionSums
from densecal.ops.binning import Bins
from densecal.report.drawing import Theme
from densecal.report.reliability import accuracy_band, dataset_reliability_chart, expected_gap, reliability_chart


def bins(count, correct):
    count = torch.tensor(count)
    return Bins(count, 0.5 * count.double(), torch.tensor(correct, dtype=torch.float64))


def test_accuracy_band_of_two_opposite_cases_spans_them():
    # Drawn twice from {all right, all wrong}: both right with probability 1/4, more than the 2.5 % outside the band.
    low, high = accuracy_band(bins([[10], [10]], [[10.0], [0.0]]))
    assert (low[0], high[0]) == (0, 1)


def test_accuracy_band_of_equal_cases_has_no_width():
    low, high = accuracy_band(bins([[4], [8], [12]], [[1.0], [2.0], [3.0]]))
    assert low[0] == high[0] == 0.25


def test_accuracy_band_is_undefined_where_a_single_case_is():
    low, high = accuracy_band(bins([[4, 1, 0], [4, 0, 0]], [[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]]))
    assert np.isfinite([low[0], high[0]]).all()
    assert np.isnan([low[1:], high[1:]]).all()


@pytest.mark.parametrize("num_cases", [0, 1])
def test_accuracy_band_needs_two_cases(num_cases):
    assert accuracy_band(bins([[3, 2]] * num_cases or torch.zeros(0, 2).tolist(), [[1.0, 2.0]] * num_cases)) is None


def test_accuracy_band_resamples_cases_like_a_loop():
    random = np.random.default_rng(1)
    count = random.integers(1, 50, (8, 2))
    correct = np.array([[random.integers(0, n + 1) for n in row] for row in count], dtype=float)
    low, high = accuracy_band(bins(count.tolist(), correct.tolist()), num_resamples=4000)
    drawn = [random.integers(0, 8, 8) for _ in range(4000)]
    for b in range(2):
        accuracies = [correct[rows, b].sum() / count[rows, b].sum() for rows in drawn]
        assert low[b] == pytest.approx(np.quantile(accuracies, 0.025), abs=0.03)
        assert high[b] == pytest.approx(np.quantile(accuracies, 0.975), abs=0.03)


def test_accuracy_band_is_seeded():
    some = bins([[3, 5], [9, 2], [4, 4]], [[1.0, 5.0], [2.0, 1.0], [4.0, 0.0]])
    assert np.array_equal(accuracy_band(some, seed=3), accuracy_band(some, seed=3))


def test_expected_gap_weighs_bins_by_their_count():
    row = {"edges": [0, 0.5, 1], "count": [3, 1], "mean_confidence": [0.4, 0.9], "accuracy": [0.2, 0.5]}
    assert expected_gap(row) == pytest.approx((3 * 0.2 + 1 * 0.4) / 4)
    assert np.isnan(expected_gap(row | {"count": [0, 0], "mean_confidence": [float("nan")] * 2, "accuracy": [float("nan")] * 2}))


def evaluation(case_bins):
    metric = SegmentationEvaluation(LabelSchema(("road", "car"), background=None), num_bins=2)
    metric.update(torch.tensor([[[0.9, 0.6], [0.1, 0.4]]] * 2), torch.tensor([[0, 1], [0, 0]]), torch.arange(2))
    result = metric.compute()
    sums = result.case_sums["all"]
    return replace(result, case_sums={"all": RegionSums(sums.nll, sums.brier, case_bins, sums.classwise)})


def draw(panel):
    figure = Figure()
    panel.draw(figure, Theme())
    return figure


def test_dataset_reliability_counts_cases():
    # Upper bin of confidence: two cases at most half right, one all right. Lower bin: one case, none right.
    chart = dataset_reliability_chart(evaluation(bins([[0, 4], [2, 4], [0, 4]], [[0.0, 2.0], [0.0, 1.0], [0.0, 4.0]])))
    (mesh,) = [c for c in draw(chart.panels[0]).axes[0].collections if c.get_array() is not None]
    assert mesh.get_array().filled(0).reshape(2, 2).tolist() == [[1, 2], [0, 1]]  # rows: accuracy from below


def test_reliability_chart_draws_the_band_of_its_bins():
    few = bins([[0, 2], [0, 2]], [[0.0, 2.0], [0.0, 1.0]])
    axes = draw(reliability_chart(evaluation(few)).panels[0]).axes[0]
    (lines,) = [c for c in axes.collections if c.get_label() == "95 % over cases"]
    (segment,) = lines.get_segments()
    assert segment[:, 1].tolist() == [0.5, 1.0]
    one = Bins(few.count[:1], few.confidence[:1], few.correct[:1])
    assert not draw(reliability_chart(evaluation(one)).panels[0]).axes[0].collections
