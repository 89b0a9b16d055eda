"""The sentences say what the numbers say."""

from dataclasses import replace

import pytest
import torch

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation, class_prior_baseline
from densecal.report.findings import findings, percent
from densecal.report.summary import named_cases

SCHEMA = LabelSchema(("road", "car", "tram"), background=None)


def evaluated(confidence, right, **fields):
    """One case of voxels of class 0, each predicted with that confidence, as class 0 where right and as class 1 where not."""
    p = torch.tensor(confidence, dtype=torch.float64)
    rest = torch.stack([1 - p, torch.zeros_like(p)])
    probs = torch.stack(
        [torch.cat([p[i : i + 1], rest[:, i]] if ok else [rest[:1, i], p[i : i + 1], rest[1:, i]]) for i, ok in enumerate(right)], dim=1
    )
    metric = SegmentationEvaluation(SCHEMA, num_bins=10)
    metric.update(probs.unsqueeze(0), torch.zeros(1, len(p), dtype=torch.long), torch.tensor([0]))
    return replace(metric.compute(), **fields)


def said(evaluation):
    return dict(findings(evaluation, named_cases(evaluation, ["the case"]), element="pixels"))


@pytest.mark.parametrize(
    ("confidence", "right", "headline"),
    [
        ([0.95] * 4, [True, True, False, False], "Over-confident by 45.0 points over all pixels"),
        ([0.75] * 4, [True] * 4, "Under-confident by 25.0 points over all pixels"),
        ([0.75] * 4, [True, True, True, False], "Well matched on average over all pixels"),
    ],
)
def test_findings_judge_confidence(confidence, right, headline):
    assert headline in said(evaluated(confidence, right))


def test_findings_count_confident_errors():
    # Confidence above 90 %: four pixels, one wrong. Errors in all: two.
    sentences = said(evaluated([0.95] * 4 + [0.65] * 2, [True, True, True, False, True, False]))
    assert (
        "Of 4 pixels predicted with more than 90.0\xa0% confidence over all pixels, 25.0\xa0% are wrong"
        in sentences["50.0\xa0% of the errors are made with confidence"]
    )


def test_findings_of_a_scene_speak_of_mean_iou_and_pixels():
    # Of 4 pixels of road, 3 are right: IoU 3/4 of road, 0 of car, which is there in the prediction alone and in no mean of the references' classes.
    evaluation = evaluated([0.95] * 4, [True, True, True, False])
    (sentence,) = (text for head, text in said(evaluation).items() if head == "Mean IoU 0.75, 75.0\xa0% of the pixels right")
    assert "a mean IoU of 0.750 over the whole data set" in sentence
    assert "Hardest are car (0.00), road (0.75)" in sentence


def test_findings_hold_the_model_against_the_class_shares():
    evaluation = evaluated([0.95] * 4, [True, True, True, False])
    baseline = class_prior_baseline(evaluation, [0.5, 0.25, 0.25])
    sentences = dict(findings(evaluation, named_cases(evaluation, ["the case"]), element="pixels", baseline=baseline))
    # Every pixel is road: -log 0.5 = 0.69 against (3 * -log 0.95 - log 0.05) / 4 = 0.79.
    assert (
        "mean IoU 1.00 (this model 0.75), accuracy 1.00 (this model 0.75), negative log-likelihood 0.69 (this model 0.79)"
        in (sentences["No better than knowing how common each class is"])
    )


def test_findings_name_classes_without_a_value():
    sentences = said(evaluated([0.95] * 2, [True, False]))
    assert "Nothing can be said about tram" in next(text for head, text in sentences.items() if head.startswith("Mean IoU"))


def test_findings_read_the_curves():
    curves = {
        "risk_coverage": {"coverage": [0.5, 0.9, 1.0], "risk": [0.0, 0.1, 0.2], "best_risk": [0.0, 0.0, 0.2]},
        "boundary_distance": {"edges": [0, 1, 5], "unit": "pixels", "count": [10, 90], "accuracy": [0.7, 1.0], "mean_confidence": [0.9, 0.95]},
    }
    sentences = said(evaluated([0.95] * 2, [True, False], curves=curves))
    # 0.2 of all are wrong, 0.9 * 0.1 of them are kept: 0.11 of 0.2 is found.
    assert "instead of 20.0\xa0%" in sentences["Confidence finds 55.0\xa0% of the errors in the least certain tenth"]
    assert (
        "Within 1 pixel of a boundary 30.0\xa0% of the pixels are wrong, and the model expects 10.0\xa0%"
        in sentences["100\xa0% of the errors lie right at a boundary"]
    )


def test_findings_of_nothing_are_none():
    metric = SegmentationEvaluation(SCHEMA)
    metric.update(torch.full((1, 3, 4), 1 / 3), torch.full((1, 4), -100), torch.tensor([0]))
    assert said(metric.compute()) == {}


@pytest.mark.parametrize(("share", "expected"), [(0.5, "50.0"), (0.09, "9.0"), (0.00123, "0.12"), (1.2e-7, "0.0000"), (0.0, "0"), (1.0, "100")])
def test_percent(share, expected):
    assert percent(share) == f"{expected}\xa0%"
