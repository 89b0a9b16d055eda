"""Risk-coverage curves against arithmetic, random orders of ties, and other packages."""

import itertools
import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal import create_metric
from densecal.metrics import (
    AreaUnderRiskCoverage,
    ExcessAreaUnderRiskCoverage,
    area_under_risk_coverage,
    choose_logit_norm,
    excess_area_under_risk_coverage,
    logit_norm_score,
    risk_coverage,
)
from densecal.metrics.selective_risk import aurc_bound_from_bins, aurc_from_bins, excess_aurc_from_bins, risk_coverage_from_bins
from densecal.ops.binning import Bins
from densecal.ops.fine_bins import accumulate_fine_bins, distinct_bins, fine_bin_index

FUNCTIONS = {AreaUnderRiskCoverage: area_under_risk_coverage, ExcessAreaUnderRiskCoverage: excess_area_under_risk_coverage}
both = pytest.mark.parametrize("metric_class", FUNCTIONS, ids=["aurc", "excess"])


def loop_aurc(errors):
    """Mean over k of the error rate among the first k."""
    return sum(sum(errors[:k]) / k for k in range(1, len(errors) + 1)) / len(errors)


def expected_aurc(scores, errors):
    """Errors in order of score; among ties every entry is the mean of its group, which is what random orders expect."""
    order = []
    for value in sorted(set(scores), reverse=True):
        group = [e for s, e in zip(scores, errors, strict=True) if s == value]
        order += [sum(group) / len(group)] * len(group)
    return loop_aurc(order)


def two_classes(top):
    top = torch.tensor(top, dtype=torch.float64)
    return torch.stack([top, 1 - top]).unsqueeze(0)


def entries_of(probs, shares, valid):
    scores, errors = [], []
    for i, j in itertools.product(range(len(probs)), range(probs.shape[2])):
        if valid[i, j]:
            k = int(probs[i, :, j].argmax())
            scores.append(float(probs[i, k, j]))
            errors.append(1 - float(shares[i, k, j]))
    return scores, errors


def test_area_under_risk_coverage_by_hand():
    # In order of confidence: right, wrong, right, wrong.
    probs = two_classes([0.7, 0.95, 0.8, 0.6])
    label = torch.tensor([[0, 0, 1, 1]])
    expected = (0 + 1 / 2 + 1 / 3 + 2 / 4) / 4
    assert area_under_risk_coverage(probs, label).item() == pytest.approx(expected)
    best = (0 + 0 + 1 / 3 + 2 / 4) / 4
    assert excess_area_under_risk_coverage(probs, label).item() == pytest.approx(expected - best)


def test_area_under_risk_coverage_of_ties_is_the_mean_over_their_orders():
    # 0.9 once, wrong; then three tied, one of them wrong; then 0.6, right.
    probs = two_classes([0.8, 0.9, 0.8, 0.6, 0.8])
    label = torch.tensor([[0, 1, 1, 0, 0]])
    orders = [loop_aurc([1, *middle, 0]) for middle in itertools.permutations([0, 1, 0])]
    assert area_under_risk_coverage(probs, label).item() == pytest.approx(sum(orders) / len(orders))


@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_area_under_risk_coverage_equals_a_loop(spatial, soft, ties):
    case = make_case(spatial)
    probs = case.logits.softmax(1)
    probs = (probs * 16).round() / 16 if ties else probs
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    scores, errors = entries_of(probs.flatten(2), shares.flatten(2), case.valid.flatten(1))
    label = case.soft_labels if soft else case.label_map
    value = area_under_risk_coverage(probs, label, validate_args=False)
    assert value.item() == pytest.approx(expected_aurc(scores, errors), abs=1e-12)
    # The best order of the same sum of errors: nothing wrong at first, then everything.
    n, total = len(errors), sum(errors)
    best = sum(max(0.0, k - (n - total)) / k for k in range(1, n + 1)) / n
    excess = excess_area_under_risk_coverage(probs, label, validate_args=False)
    assert excess.item() == pytest.approx(value.item() - best, abs=1e-12)
    assert excess >= 0


def test_excess_area_is_0_for_the_best_order_and_for_none():
    probs = two_classes([0.9, 0.8, 0.7, 0.6])
    assert excess_area_under_risk_coverage(probs, torch.tensor([[0, 0, 1, 1]])).item() == pytest.approx(0, abs=1e-15)
    assert excess_area_under_risk_coverage(probs, torch.tensor([[0, 0, 0, 0]])).item() == pytest.approx(0, abs=1e-15)
    assert excess_area_under_risk_coverage(probs, torch.tensor([[1, 1, 1, 1]])).item() == pytest.approx(0, abs=1e-15)
    assert area_under_risk_coverage(probs, torch.tensor([[1, 1, 1, 1]])).item() == pytest.approx(1)


def test_excess_area_approaches_the_papers_for_many_pixels():
    # Geifman et al. subtract r + (1 - r) log(1 - r).
    generator = torch.Generator().manual_seed(0)
    score, right = torch.rand(100_000, generator=generator), torch.rand(100_000, generator=generator) < 0.8
    bins = distinct_bins(score, right)
    r = 1 - right.double().mean().item()
    theirs = aurc_from_bins(bins).item() - (r + (1 - r) * math.log(1 - r))
    assert excess_aurc_from_bins(bins).item() == pytest.approx(theirs, abs=1e-5)


def test_area_under_risk_coverage_equals_torch_uncertainty():
    # Theirs is the trapezoid from k = 1 to n over its length: half of the first and of the last rate are missing, then it is scaled by n / (n - 1).
    from torch_uncertainty.metrics import AURC

    case = make_case((60,), num_classes=4, batch=5, ignored=0.0)
    probs = case.logits.softmax(1)
    theirs = AURC()
    theirs.update(probs.movedim(1, -1).flatten(0, 1), case.label_map.flatten())
    n = case.label_map.numel()
    curve = risk_coverage(probs, case.label_map, coverage=torch.tensor([1 / n, 1.0]))
    ours = (area_under_risk_coverage(probs, case.label_map) * n - curve.risk.sum() / 2) / (n - 1)
    assert ours.item() == pytest.approx(theirs.compute().item(), abs=1e-6)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_risk_coverage_equals_a_loop(soft):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    shares = case.soft_labels if soft else torch.nn.functional.one_hot(case.label_map.clamp(min=0), 3).movedim(-1, 1)
    scores, errors = entries_of(probs.flatten(2), shares.flatten(2), case.valid.flatten(1))
    errors = [e for _, e in sorted(zip(scores, errors, strict=True), reverse=True)]
    n = len(errors)
    coverage = torch.arange(1, n + 1, dtype=torch.float64) / n
    curve = risk_coverage(probs, case.soft_labels if soft else case.label_map, coverage=coverage)
    expected = torch.tensor([sum(errors[:k]) / k for k in range(1, n + 1)], dtype=torch.float64)
    torch.testing.assert_close(curve.risk, expected)
    best = torch.tensor([max(0.0, k - n + sum(errors)) / k for k in range(1, n + 1)], dtype=torch.float64)
    torch.testing.assert_close(curve.best_risk, best, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(curve.coverage, coverage)
    torch.testing.assert_close(curve.risk.mean(), area_under_risk_coverage(probs, case.soft_labels if soft else case.label_map))


def test_risk_coverage_default_grid_and_parts_of_pixels():
    # Two pixels, the second wrong: 3/4 of them hold half an error in one and a half.
    probs, label = two_classes([0.9, 0.8]), torch.tensor([[0, 1]])
    curve = risk_coverage(probs, label)
    torch.testing.assert_close(curve.coverage, torch.arange(1, 101, dtype=torch.float64) / 100)
    assert curve.risk[74].item() == pytest.approx(0.5 / 1.5)
    assert curve.risk[49].item() == pytest.approx(0, abs=1e-15)


def loop_score(probs, norm):
    z = [math.log(p) for p in probs]
    z = [value - sum(z) / len(z) for value in z]
    scale = (1 + (len(z) - 1) ** (1 - norm)) ** (1 / norm)
    return max(z) / sum(abs(value) ** norm for value in z) ** (1 / norm) * scale


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.5, 8.0])
def test_logit_norm_score_equals_a_loop_and_forgets_a_constant(norm):
    case = make_case((7,), num_classes=4)
    probs = case.logits.softmax(1)
    expected = torch.tensor([[loop_score(probs[i, :, j].tolist(), norm) for j in range(7)] for i in range(2)], dtype=torch.float64)
    score = logit_norm_score(probs, norm)
    torch.testing.assert_close(score, expected)
    assert (score.max() <= 1) & (score.min() >= 0)
    z = case.logits - case.logits.mean(1, keepdim=True)
    from_logits = z.amax(1) / z.norm(p=norm, dim=1) * (1 + 3 ** (1 - norm)) ** (1 / norm)
    torch.testing.assert_close(score, from_logits)


def test_logit_norm_score_at_the_ends():
    probs = torch.tensor([[[1.0, 0.25, 0.7], [0.0, 0.25, 0.1], [0.0, 0.25, 0.1], [0.0, 0.25, 0.1]]])
    score = logit_norm_score(probs, 4.0)
    torch.testing.assert_close(score, torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64))


def test_area_under_risk_coverage_with_logit_norm():
    case = make_case((5, 7), num_classes=4)
    probs = case.logits.softmax(1)
    scores, errors = [], []
    for i, y, x in itertools.product(range(2), range(5), range(7)):
        if case.valid[i, y, x]:
            scores.append(loop_score(probs[i, :, y, x].tolist(), 3.0))
            errors.append(float(probs[i, :, y, x].argmax() != case.label_map[i, y, x]))
    value = area_under_risk_coverage(probs, case.label_map, score="logit_norm", norm=3.0)
    assert value.item() == pytest.approx(expected_aurc(scores, errors), abs=1e-12)


def test_choose_logit_norm_takes_the_lowest_area():
    case = make_case((9, 11), num_classes=4, batch=4)
    probs = case.logits.softmax(1)
    best, values = choose_logit_norm(zip(probs.split(2), case.label_map.split(2), strict=True), candidates=(None, 1.0, 2.0, 6.0))
    for norm, value in values.items():
        score = "max_probability" if norm is None else "logit_norm"
        assert value == pytest.approx(area_under_risk_coverage(probs, case.label_map, score=score, norm=norm).item())
    assert values[best] == min(values.values())


@both
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", [{}, {"score": "logit_norm", "norm": 3.0}], ids=["max", "norm"])
@pytest.mark.parametrize("max_exact", [0, 40, 1000], ids=["bins", "mixed", "exact"])
def test_selective_metrics_batch_by_batch(metric_class, soft, options, max_exact):
    case = make_case((5, 7), batch=5)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    metric = metric_class(max_exact=max_exact, **options)
    for part, labels in zip(probs.split([1, 3, 1]), label.split([1, 3, 1]), strict=True):
        metric.update(part, labels)
    exact = FUNCTIONS[metric_class](probs, label, **options)
    assert metric.count == case.valid.sum()
    if max_exact == 1000:
        torch.testing.assert_close(metric.compute(), exact, rtol=1e-11, atol=0)
        assert metric.error_bound == 0
        torch.testing.assert_close(metric.curve().risk, risk_coverage(probs, label, **options).risk)
    else:
        assert (metric.compute() - exact).abs() <= metric.error_bound + 1e-12
        at_once = metric_class(max_exact=0, **options)
        torch.testing.assert_close(metric.compute(), at_once(probs, label), rtol=1e-11, atol=0)


@pytest.mark.parametrize("wrong_last", [False, True])
def test_aurc_bound_holds_for_the_worst_order(wrong_last):
    # Everything in three fine bins, a third of each wrong, first or last: the bound is reached.
    confidence = 0.7 + 0.004 * torch.arange(1000, dtype=torch.float64) / 1000
    index = fine_bin_index(confidence)
    correct = torch.ones(1000, dtype=torch.bool)
    for b in index.unique():
        members = (index == b).nonzero()[:, 0]
        size = len(members) // 3
        correct[members[:size] if wrong_last else members[-size:]] = False
    bins = accumulate_fine_bins(confidence, correct)
    error = (aurc_from_bins(bins) - aurc_from_bins(distinct_bins(confidence, correct))).abs()
    bound = aurc_bound_from_bins(bins)
    assert error <= bound + 1e-12
    if not wrong_last:  # errors that come first cost more than errors that come last save
        assert error.item() == pytest.approx(bound.item(), rel=1e-9)


def test_aurc_bound_of_soft_errors_holds():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        confidence = 0.7 + 0.004 * torch.rand(37, generator=generator, dtype=torch.float64)
        correct = torch.rand(37, generator=generator, dtype=torch.float64)
        bins = accumulate_fine_bins(confidence, correct)
        error = (aurc_from_bins(bins) - aurc_from_bins(distinct_bins(confidence, correct))).abs()
        assert error <= aurc_bound_from_bins(bins)


def test_aurc_from_fine_bins_is_close_for_a_network():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(1, 4, 200_000, generator=generator).mul(6).softmax(1)
    label = torch.multinomial(probs[0].sqrt().T, 1, generator=generator).T
    metric = AreaUnderRiskCoverage()
    value = metric(probs, label)
    assert not metric.entries
    error = (value - area_under_risk_coverage(probs, label)).abs()
    assert error <= metric.error_bound < 1e-3
    assert error < 1e-6


def test_aurc_of_many_pixels_keeps_its_digits():
    # Ten thousand million pixels, in two bins by hand: the first all right, half of the second wrong.
    n = 5 * 10**9
    bins = Bins(torch.tensor([[n, n]]), torch.tensor([[0.6 * n, 0.9 * n]]), torch.tensor([[n / 2, float(n)]], dtype=torch.float64))
    expected = 0.5 * (1 - math.log(2)) / 2  # the integral of (x - 1) / (2 x) from 1 to 2, over 2
    assert aurc_from_bins(bins).item() == pytest.approx(expected, rel=1e-9)


@both
def test_selective_metrics_nothing_valid_is_nan(metric_class):
    for max_exact in (0, 100):
        metric = metric_class(max_exact=max_exact)
        metric.update(torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100))
        assert metric.compute().isnan()
        assert metric.curve().risk.isnan().all()
        assert metric.count == 0
    assert FUNCTIONS[metric_class](torch.full((1, 2, 3), 0.5), torch.full((1, 3), -100)).isnan()
    assert risk_coverage_from_bins(Bins.empty(1, 10)).best_risk.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"score": "logit_norm"}], ids=["max", "norm"])
def test_area_under_risk_coverage_precision(dtype, options):
    case = make_case((9, 11))
    probs = case.logits.softmax(1)
    expected = area_under_risk_coverage(probs, case.label_map, **options)
    torch.testing.assert_close(area_under_risk_coverage(probs.to(dtype), case.label_map, **options), expected, atol=0.01, rtol=0)


@both
@pytest.mark.parametrize("options", [{}, {"score": "logit_norm"}], ids=["max", "norm"])
def test_selective_metrics_ignored_pixels_have_no_influence(metric_class, options):
    case = make_case((5, 7))
    probs = case.logits.softmax(1)
    function = FUNCTIONS[metric_class]
    other = torch.where(case.valid.unsqueeze(1), probs, torch.nan)
    expected = function(probs, case.label_map, **options)
    assert torch.equal(function(other, case.label_map, **options), expected)
    assert torch.equal(function(other, case.label_map.clamp(min=0), mask=case.valid, **options), expected)
    for max_exact in (0, 1000):
        metric = metric_class(max_exact=max_exact, **options)
        metric.update(other, case.label_map)
        assert (metric.compute() - expected).abs() <= metric.error_bound + 1e-12


def test_area_under_risk_coverage_one_region_equals_its_channel():
    case = make_case((5, 7), num_classes=2)
    probs = case.logits.softmax(1)
    as_region = area_under_risk_coverage(probs[:, 1:], case.label_map.unsqueeze(1), activation="sigmoid")
    torch.testing.assert_close(as_region, area_under_risk_coverage(probs, case.label_map))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "entropy"}, "Expected `score` to be one of"),
        ({"norm": 2.0}, "Expected no `norm`"),
        ({"score": "logit_norm", "norm": 0.5}, "Expected `norm` to be at least 1"),
        ({"score": "logit_norm"}, "at least 3 classes"),
    ],
    ids=["score", "norm", "small", "classes"],
)
def test_area_under_risk_coverage_errors(options, message):
    with pytest.raises(ValueError, match=message):
        area_under_risk_coverage(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]), **options)
    with pytest.raises(ValueError, match=message):
        create_metric("aurc", **options).update(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, 1]]))


def test_selective_risk_errors():
    bins = Bins.empty(1, 10)
    for coverage in (torch.tensor([0.0, 0.5]), torch.tensor(0.5), torch.tensor([1.1])):
        with pytest.raises(ValueError, match="Expected `coverage`"):
            risk_coverage_from_bins(bins, coverage)
    with pytest.raises(ValueError, match="Expected `batches`"):
        choose_logit_norm([])
    with pytest.raises(ValueError, match="Expected at least one of `candidates`"):
        choose_logit_norm([], candidates=())
    with pytest.raises(ValueError, match="Expected one row of bins"):
        aurc_from_bins(Bins.empty(2, 5))
