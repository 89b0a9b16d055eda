"""What is promised holds over draws of cases, and the threshold is the largest that can be promised."""

from __future__ import annotations

import math

import pytest
import torch

from densecal.posthoc import FalseNegativeControl


def case(generator: torch.Generator, size: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """A region that the network finds more or less well, depending on the case."""
    label = (torch.rand(1, size, generator=generator) < 0.5).long()
    label[0, 0] = 1
    quality = 3 * torch.randn(1, 1, generator=generator)
    logit = (2 * label - 1) * quality + 2 * torch.randn(1, size, generator=generator)
    return torch.stack([-logit, logit], dim=1).softmax(1), label


@pytest.mark.parametrize(("alpha", "cases"), [(0.2, 15), (0.4, 5), (0.15, 25)])
def test_expected_share_missed_is_at_most_alpha(alpha, cases):
    generator = torch.Generator().manual_seed(cases)
    rates = []
    for _ in range(250):
        control = FalseNegativeControl(1, alpha=alpha).fit([case(generator) for _ in range(cases)])
        rates.append(float(control.false_negative_rate(*case(generator))))
    rates = torch.tensor(rates)
    error = float(rates.std()) / math.sqrt(len(rates))
    assert float(rates.mean()) <= alpha + 3 * error
    assert float(rates.mean()) >= alpha - 2 / (cases + 1) - 3 * error  # and no smaller than it need be (theorem 2 of the paper)


def test_threshold_is_the_largest_that_is_promised():
    generator = torch.Generator().manual_seed(0)
    batches = [case(generator) for _ in range(12)]
    control = FalseNegativeControl(1, alpha=0.3).fit(batches)

    def risk(threshold: float) -> float:
        total = 0.0
        for probs, label in batches:
            region = [p for p, y in zip(probs[0, 1].tolist(), label[0].tolist(), strict=True) if y == 1]
            total += sum(p < threshold for p in region) / len(region)
        return (total + 1) / 13

    candidates = sorted({0.0, *(float(p) for probs, _ in batches for p in probs[0, 1])})
    best = max(c for c in candidates if risk(c) <= 0.3)
    above = min(c for c in candidates if c > best)
    assert risk(control.threshold) <= 0.3
    assert best - 0.01 <= control.threshold <= above


def test_too_few_cases_take_the_whole_image():
    generator = torch.Generator().manual_seed(0)
    control = FalseNegativeControl(1, alpha=0.1).fit([case(generator) for _ in range(8)])
    assert control.threshold == 0
    assert bool(control(torch.rand(1, 2, 50)).all())


def test_classes_are_added_and_regions_stand_alone():
    probs = torch.tensor([[[0.2, 0.5, 0.9], [0.5, 0.2, 0.05], [0.3, 0.3, 0.05]]])
    label = torch.tensor([[1, 2, 0]])
    control = FalseNegativeControl([1, 2], alpha=0.2).fit([(probs, label)] * 9)
    assert control.threshold == pytest.approx(0.5, abs=0.005)
    regions = FalseNegativeControl(1, alpha=0.2, activation="sigmoid").fit([(probs[:, :2], torch.tensor([[[0, 0, 0], [1, 0, 0]]]))] * 9)
    assert regions.threshold == pytest.approx(0.5, abs=0.005)


def test_ignored_pixels_and_cases_without_the_region_do_not_count():
    generator = torch.Generator().manual_seed(0)
    batches = [case(generator) for _ in range(10)]
    expected = FalseNegativeControl(1, alpha=0.3).fit(batches)
    spoiled = []
    for probs, label in batches:
        more = torch.cat([probs, torch.tensor([[[1.0], [0.0]]])], dim=2)
        spoiled.append((more, torch.cat([label, torch.tensor([[255]])], dim=1)))
    empty = (torch.full((1, 2, 5), 0.5), torch.zeros(1, 5, dtype=torch.long))
    found = FalseNegativeControl(1, alpha=0.3, ignore_index=255).fit([*spoiled, empty])
    assert found.threshold == expected.threshold
    assert found.num_cases == 10
    assert math.isnan(float(found.false_negative_rate(*empty)))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: FalseNegativeControl(1, alpha=1.0), r"`alpha` in \(0, 1\)"),
        (lambda: FalseNegativeControl([]), r"`region` to be a channel"),
        (lambda: FalseNegativeControl([0, 1], activation="sigmoid"), r"one channel as `region` under sigmoid"),
        (lambda: FalseNegativeControl(1)(torch.rand(1, 2, 4)), r"Call `fit` first"),
        (lambda: FalseNegativeControl(1).fit([]), r"cases that have the region, but got none"),
        (lambda: FalseNegativeControl(2).update(torch.rand(1, 2, 4), torch.zeros(1, 4, dtype=torch.long)), r"more than 2 channels"),
    ],
    ids=["alpha", "no-region", "several", "not-fitted", "no-case", "channel"],
)
def test_mistakes_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_size_ratio_is_mask_over_region():
    """Of five pixels one is ignored; the mask takes three, the region has two. A case without the region has no ratio."""
    inside = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.9], [0.9, 0.8, 0.7, 0.1, 0.9]])
    probs = torch.stack([1 - inside, inside], dim=1)
    label = torch.tensor([[1, 1, 0, 0, 255], [0, 0, 0, 0, 255]])
    control = FalseNegativeControl(1, alpha=0.5, ignore_index=255)
    control.threshold = 0.5
    first, second = control.size_ratio(probs, label).tolist()
    assert first == 3 / 2
    assert math.isnan(second)
    control.threshold = 0.95
    assert control.size_ratio(probs[:1], label[:1]).tolist() == [0.0]
