"""A teacher trained on smoothed labels teaches at a low temperature (Chandrasegaran et al., "Revisiting Label Smoothing and Knowledge Distillation
Compatibility", ICML 2022): the higher the temperature, the more of the class diffuses into the one that looks like it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from densecal.losses import CrossEntropyLoss, DistillationLoss, LabelSmoothingLoss

KINDS = torch.tensor([[1.0, 0.7, 0.0], [0.7, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
"""Features of three kinds of pixels, one per class: the first two look alike, the third does not."""
LABELS = torch.arange(3).unsqueeze(0)
TEMPERATURES = (1.0, 2.0, 4.0)


def fitted(parameters: list[Tensor], value) -> None:
    """Minimise; so few parameters take no stochastic steps."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)


@functools.cache
def teacher_logits(smoothed: bool) -> Tensor:
    """``(1, 3, 3)``: what a linear teacher with a little weight decay says of each kind, trained on labels as they are or smoothed by a tenth."""
    loss = LabelSmoothingLoss(smoothing=0.1) if smoothed else CrossEntropyLoss()
    weights = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    fitted([weights], lambda: loss((KINDS @ weights).T.unsqueeze(0), LABELS) + 1e-4 * weights.square().sum())
    return (KINDS @ weights).T.unsqueeze(0).detach()


@functools.cache
def student_probs(smoothed: bool, temperature: float) -> Tensor:
    """``(class, kind)``: what a student ends with that is free to say anything of each kind, taught by the published mix."""
    loss = DistillationLoss(temperature=temperature)
    logits = nn.Parameter(torch.zeros(1, 3, 3, dtype=torch.float64))
    fitted([logits], lambda: loss(logits, LABELS, context={"teacher_logits": teacher_logits(smoothed)}))
    return logits.softmax(1)[0].detach()


def lead(smoothed: bool, temperature: float) -> float:
    """By how much the first class leads over its look-alike where it is true."""
    probs = student_probs(smoothed, temperature)[:, 0]
    return (probs[0] - probs[1]).item()


@pytest.mark.parametrize("smoothed", [False, True], ids=["labels", "smoothed"])
def test_both_teachers_are_right_and_both_students_at_temperature_one(smoothed):
    assert torch.equal(teacher_logits(smoothed).argmax(1), LABELS)
    assert lead(smoothed, 1.0) > 0.8


def test_the_class_diffuses_into_its_look_alike_as_the_temperature_grows():
    """Systematically: not into any class alike. The students of both teachers lose their lead, the smoothed teacher's more at each temperature above 1."""
    for smoothed in (False, True):
        probs = torch.stack([student_probs(smoothed, t)[:, 0] for t in TEMPERATURES])
        assert (probs[1:, 1] > probs[1:, 2]).all()
        assert (probs[:, 1].diff() > 0).all()
        assert (probs[:, 0].diff() < 0).all()
    lost = {smoothed: torch.tensor([lead(smoothed, 1.0) - lead(smoothed, t) for t in TEMPERATURES[1:]]) for smoothed in (False, True)}
    assert (lost[True] > lost[False]).all(), lost


def test_at_temperature_one_the_smoothed_teacher_teaches_nearly_as_well():
    """And at 2 its student is more than twice as far behind."""
    behind = [lead(False, t) - lead(True, t) for t in (1.0, 2.0)]
    assert 0 < behind[0] < 0.05
    assert behind[1] > 2 * behind[0]
