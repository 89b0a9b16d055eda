"""Losses of a label map as their twin of plain PyTorch computes them: what terms say of themselves, against the terms."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, MarginPart, OverlapPart, label_losses
from densecal.targets import BoundarySmoothingTarget, LabelSmoothingTarget, NeighbourProportionsTarget, OneHotTarget, SVLSTarget
from densecal.terms import AdaptiveConditionalMargin, CrossEntropy, DiceSemimetric, JaccardMetric, LogitMargin, MaxSuppression, NeighbourPenalty

WEIGHTS = [0.5, 1.0, 2.0]

TERMS = {
    "ce": CrossEntropy(),
    "ce-weighted": CrossEntropy(class_weights=WEIGHTS),
    "ce-pixels": CrossEntropy(class_weights=WEIGHTS, reduction="none"),
    "ce-sum": CrossEntropy(reduction="sum"),
    "neighbour": NeighbourPenalty(),
    "neighbour-l2": NeighbourPenalty(distance="l2", kernel="gaussian", border="zeros"),
    "mbls": LogitMargin(margin=1.0),
    "mbls-squared": LogitMargin(margin=1.0, squared=True),
    "acls": AdaptiveConditionalMargin(margin=0.5),
    "maxsup": MaxSuppression(),
    "dice": DiceSemimetric(class_weights=WEIGHTS),
    "jaccard-l2": JaccardMetric(norm="l2", weight_image=1.0, include_background=False),
}
TARGETS = {
    "label": OneHotTarget(),
    "even": LabelSmoothingTarget(smoothing=0.2, spread="others"),
    "boundary": BoundarySmoothingTarget(),
    "svls": SVLSTarget(sigma=2.0),
    "mean": NeighbourProportionsTarget(border="renormalize"),
    "gaussian": NeighbourProportionsTarget(kernel="gaussian", border="zeros"),
}


def value_and_gradient(function, logits):
    logits = logits.detach().requires_grad_()
    value = function(logits)
    value.sum().backward()
    return value.detach(), logits.grad


@each_dimension
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("term", TERMS)
def test_a_fused_term_is_the_term(term, target, spatial):
    case = make_case(spatial)
    term = TERMS[term]
    soft_target = TARGETS[target](case.label_map, 3, spatial_dims=len(spatial), dtype=torch.float64)

    def fused(logits):
        how = term.fused(logits, soft_target)
        labels = soft_target.labels_as_given()
        (result,) = label_losses(logits, labels.given, [how.part], ignore_index=labels.ignore_index, per_pixel=how.per_pixel)
        return how.finish(result)

    torch.testing.assert_close(value_and_gradient(fused, case.logits), value_and_gradient(lambda z: term(z, soft_target), case.logits))


def test_by_hand():
    logits = torch.tensor([[[math.log(3.0)], [0.0]]], dtype=torch.float64)  # p = (3/4, 1/4)
    shares = LabelShares(smoothing=0.5)  # q = (3/4, 1/4)
    ce, margin, overlap = label_losses(
        logits, torch.tensor([[0]]), [CrossEntropyPart(shares), MarginPart(1.0, False, 0.5), OverlapPart(shares)], ignore_index=-100
    )
    assert ce.values.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert margin.values.item() == pytest.approx(0.5 * (math.log(3.0) - 1.0))
    torch.testing.assert_close(overlap.tp, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(overlap.fp + overlap.fn, torch.zeros(1, 2, dtype=torch.float64))


def test_a_smoothing_that_varies_within_an_image_is_not_covered():
    from densecal.targets.base import Uniform

    assert Uniform(torch.full((2, 1, 1, 1), 0.1)).label_shares(2).smoothing.shape == (2, 1, 1, 1)
    for share in (torch.full((2, 1, 5, 7), 0.1), torch.full((7,), 0.1)):
        with pytest.raises(NotCovered, match="varies within an image"):
            Uniform(share).label_shares(2)
    with pytest.raises(NotCovered, match="the gradient of a smoothing"):
        Uniform(torch.tensor(0.1, requires_grad=True)).label_shares(2)
