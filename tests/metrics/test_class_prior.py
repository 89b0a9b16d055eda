"""The class-prior baseline is what the evaluation says of constant probabilities."""

import pytest
import torch
from cases import make_case

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation, class_prior_baseline

SHARES = [0.25, 0.625, 0.125]  # exact in single precision


def evaluate(probs, label, **options):
    metric = SegmentationEvaluation(options.pop("schema", LabelSchema(("a", "b", "c"))), boundary_width=2, foreground_radius=1, **options)
    metric.update(probs, label, torch.arange(len(probs)))
    return metric.compute()


@pytest.mark.parametrize("background", [0, 1, None])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("spatial", [(9, 11), (4, 5, 6)], ids=["2d", "3d"])
def test_class_prior_baseline_equals_the_evaluation_of_constant_probabilities(spatial, kind, background):
    schema = LabelSchema(("a", "b", "c"), background=background)
    case = make_case(spatial, batch=3)
    label = case.label_map if kind == "hard" else case.soft_labels
    baseline = class_prior_baseline(evaluate(case.logits.softmax(1), label, schema=schema, detail=True, replicates=5), SHARES)
    constant = torch.tensor(SHARES).view(1, 3, *[1] * len(spatial)).expand(3, 3, *spatial)
    expected = {key: value for key, value in evaluate(constant, label, schema=schema).scalars().items() if "/" not in key}
    if kind == "soft":
        expected = {key: value for key, value in expected.items() if not key.startswith(("brier", "soft_", "qubiq_"))}
    assert baseline.scores == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert {"iou_dataset", "iou_image", "iou_class", "accuracy", "nll_boundary"} <= baseline.scores.keys()
    assert baseline.class_shares == tuple(SHARES)


def test_class_prior_baseline_of_a_structure_has_dice_zero():
    case = make_case((6, 7))
    assert class_prior_baseline(evaluate(case.logits.softmax(1), case.label_map), [0.5, 0.25, 0.25]).scores["dice"] == 0


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0.0], [float("nan")] * 3], ids=["few", "sum", "range", "nan"])
def test_class_prior_baseline_refuses_what_are_no_shares(shares):
    case = make_case((6, 7))
    with pytest.raises(ValueError, match="Expected `class_shares` in \\[0, 1\\] that sum to 1, one for each of 3 classes"):
        class_prior_baseline(evaluate(case.logits.softmax(1), case.label_map), shares)


REGIONS = LabelSchema(("wide", "narrow", "everywhere"), background=None, activation="sigmoid")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_class_prior_baseline_of_regions_equals_the_evaluation_of_constant_probabilities(kind):
    """Each region has a confidence of its own, and so a bin."""
    shares = [0.25, 0.0625, 0.75]
    generator = torch.Generator().manual_seed(0)
    probs, drawn = torch.rand(2, 3, 3, 7, 9, generator=generator)
    label = drawn if kind == "soft" else (drawn < torch.tensor([0.3, 0.1, 0.8]).view(3, 1, 1)).int()
    label[0, :, 2] = REGIONS.ignore_index
    baseline = class_prior_baseline(evaluate(probs, label, schema=REGIONS, detail=True), shares)
    constant = torch.tensor(shares).view(1, 3, 1, 1).expand(3, 3, 7, 9)
    expected = {key: value for key, value in evaluate(constant, label, schema=REGIONS).scalars().items() if "/" not in key}
    if kind == "soft":
        expected = {key: value for key, value in expected.items() if not key.startswith(("brier", "soft_", "qubiq_"))}
    assert baseline.scores == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert baseline.scores["ece"] > 0.01


@pytest.mark.parametrize("shares", [[0.5, 0.5], [1.5, 0.5, 0.5]], ids=["few", "range"])
def test_class_prior_baseline_of_regions_refuses_what_are_no_shares(shares):
    result = evaluate(torch.full((1, 3, 3, 3), 0.3), torch.zeros(1, 3, 3, 3).int(), schema=REGIONS)
    with pytest.raises(ValueError, match="in \\[0, 1\\], one for each of 3 regions"):
        class_prior_baseline(result, shares)
