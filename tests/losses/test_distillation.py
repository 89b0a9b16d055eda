"""Distillation: pixel by pixel against the formula, under softmax and for overlapping regions, and where its minimum lies."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, each_dimension, make_case
from reference import pixels
from torch import Tensor

from densecal.losses import CompoundLoss, DiceSemimetricLoss, DistillationLoss, JaccardMetricLoss
from densecal.targets import TeacherTarget
from densecal.terms import CrossEntropy, KLDivergence

CLASSES = 3
each_activation = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def teacher_logits(spatial: tuple[int, ...], number: int = 2) -> Tensor:
    return 3 * torch.randn(number, 2, CLASSES, *spatial, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def labels(case: Case, activation: str) -> Tensor:
    """A label map, or regions of which a pixel has any number."""
    return case.label_map if activation == "softmax" else torch.where(case.valid.unsqueeze(1), (case.soft_labels > 0.3).long(), -100)


def probabilities(z: list[float], activation: str) -> list[float]:
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in z]
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def by_hand(case: Case, teachers: Tensor, activation: str, *, temperature: float, mix: float, ce: float, dice: float) -> float:
    """Loops over the formula; the overlap part pools the batch, every class counts, nothing is added to the fraction."""
    target = labels(case, activation)
    cross_entropy, count = 0.0, 0
    p_sum, q_sum, distance = [0.0] * CLASSES, [0.0] * CLASSES, [0.0] * CLASSES
    for image, *x in pixels(case.logits.shape):
        if not case.valid[(image, *x)]:
            continue
        at = (image, slice(None), *x)
        p = probabilities(case.logits[at].tolist(), activation)
        taught = [probabilities([v / temperature for v in z[at].tolist()], activation) for z in teachers]
        said = [sum(column) / len(taught) for column in zip(*taught, strict=True)]
        known = target[at].tolist() if activation == "sigmoid" else [float(c == target[(image, *x)]) for c in range(CLASSES)]
        q = [mix * a + (1 - mix) * b for a, b in zip(said, known, strict=True)]
        count += 1
        for c in range(CLASSES):
            cross_entropy -= q[c] * math.log(p[c])
            if activation == "sigmoid":
                cross_entropy -= (1 - q[c]) * math.log(1 - p[c])
            p_sum[c], q_sum[c], distance[c] = p_sum[c] + p[c], q_sum[c] + q[c], distance[c] + abs(p[c] - q[c])
    cross_entropy /= count * (CLASSES if activation == "sigmoid" else 1)
    overlap = sum(1 - (a + b - d) / (a + b) for a, b, d in zip(p_sum, q_sum, distance, strict=True)) / CLASSES
    return ce * cross_entropy + dice * overlap


@each_dimension
@each_activation
@pytest.mark.parametrize("teachers", [1, 3])
def test_loss_equals_the_formula(spatial, activation, teachers):
    case, z = make_case(spatial), teacher_logits(spatial, teachers)
    loss = DistillationLoss(temperature=2.0, mix=0.3, weight_ce=0.4, weight_overlap=0.9, smooth=0.0, activation=activation)
    expected = by_hand(case, z, activation, temperature=2.0, mix=0.3, ce=0.4, dice=0.9)
    assert loss(case.logits, labels(case, activation), context={"teacher_logits": z}).item() == pytest.approx(expected, rel=1e-10)


@each_activation
@pytest.mark.parametrize("overlap", ["dml", "jml"])
def test_gradient_is_that_of_the_value(activation, overlap):
    case, z = make_case((2, 3)), teacher_logits((2, 3))
    loss, target = DistillationLoss(activation=activation, overlap=overlap), labels(case, activation)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, context={"teacher_logits": z}), case.logits.clone().requires_grad_())


@pytest.mark.parametrize(("overlap", "plain"), [("dml", DiceSemimetricLoss), ("jml", JaccardMetricLoss)])
def test_published_mix_on_the_soft_labels_made_by_hand(overlap, plain):
    """0.25 and 0.75, half of it the teacher's, at temperature 1: the plain loss with such soft labels."""
    case, z = make_case((5, 7), ignored=0.0), teacher_logits((5, 7), 1)
    soft = 0.5 * z[0].softmax(1) + 0.5 * torch.nn.functional.one_hot(case.label_map, CLASSES).movedim(-1, 1)
    value = DistillationLoss(overlap=overlap)(case.logits, case.label_map, context={"teacher_logits": z[0]})
    torch.testing.assert_close(value, plain()(case.logits, soft))


def test_no_share_for_the_teacher_is_the_loss_of_the_labels():
    case, z = make_case((5, 7)), teacher_logits((5, 7))
    value = DistillationLoss(mix=0.0)(case.logits, case.label_map, context={"teacher_logits": z})
    torch.testing.assert_close(value, DiceSemimetricLoss()(case.logits, case.label_map))


@each_activation
def test_student_that_says_what_the_teacher_says_has_no_gradient(activation):
    case, z = make_case((5, 7)), teacher_logits((5, 7), 1)[0]
    student = z.clone().requires_grad_()
    loss = DistillationLoss(mix=1.0, weight_overlap=0.0, activation=activation)
    loss(student, labels(case, activation), context={"teacher_logits": z}).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softened_teacher_and_student_meet(temperature):
    """The customary recipe with a temperature, as a compound: both sides softened, no labels. Where they agree nothing is left to learn."""
    case, z = make_case((5, 7)), teacher_logits((5, 7), 1)[0]
    loss = CompoundLoss(TeacherTarget(temperature=temperature, mix=1.0), {"kl": {"term": KLDivergence(temperature=temperature)}})
    student = z.clone().requires_grad_()
    value = loss(student, case.label_map, context={"teacher_logits": z})
    value.backward()
    assert abs(value.item()) < 1e-12
    torch.testing.assert_close(student.grad, torch.zeros_like(z), rtol=0, atol=1e-12)


def test_cross_entropy_with_the_mix_is_divergence_and_labels_up_to_a_constant():
    """What the docstring says of T = 1, by gradients."""
    case, z = make_case((5, 7)), teacher_logits((5, 7), 1)[0]
    context = {"teacher_logits": z}
    parts = [
        (DistillationLoss(mix=0.3, weight_ce=1.0, weight_overlap=0.0), 1.0),
        (CompoundLoss(TeacherTarget(mix=1.0), {"kl": {"term": KLDivergence()}}), 0.3),
        (CompoundLoss(TeacherTarget(mix=0.0), {"ce": {"term": CrossEntropy()}}), 0.7),
    ]
    gradients = []
    for loss, share in parts:
        student = case.logits.clone().requires_grad_()
        (share * loss(student, case.label_map, context=context)).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"Expected `overlap` to be one of \('dml', 'jml'\), but got 'dice'"):
        DistillationLoss(overlap="dice")
    with pytest.raises(ValueError, match="Expected the side input 'teacher_logits', which TeacherTarget needs"):
        DistillationLoss()(torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.long))
