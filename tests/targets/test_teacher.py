"""Teachers: arithmetic, limits of the mix, several networks, ignored pixels."""

import math

import pytest
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, CrossEntropyLoss, DeepSupervisionLoss
from densecal.schedules import Linear
from densecal.targets import (
    BoundarySmoothingTarget,
    LabelSmoothingTarget,
    SVLSTarget,
    TeacherTarget,
    one_hot_target,
    svls_target,
    teacher_probabilities,
)
from densecal.terms import CrossEntropy


def teachers(spatial, number=3, seed=9):
    return torch.randn(number, 2, 3, *spatial, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mix_by_hand():
    logits = torch.tensor([[[math.log(3.0)], [0.0]]])  # a teacher that says 3/4
    for mix, share in ((0.0, 1.0), (0.5, 0.875), (1.0, 0.75)):
        probs = TeacherTarget(mix=mix)(torch.tensor([[0]]), 2, context={"teacher_logits": logits}).probs
        torch.testing.assert_close(probs[0, 0, 0].item(), share)
    cold = TeacherTarget(mix=1.0, temperature=0.5)(torch.tensor([[0]]), 2, context={"teacher_logits": logits}).probs
    torch.testing.assert_close(cold[0, 0, 0].item(), 9 / 10)


@each_dimension
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_several_teachers_average_their_probabilities(spatial, activation):
    logits = teachers(spatial)
    by_hand = sum((z / 2).softmax(1) if activation == "softmax" else (z / 2).sigmoid() for z in logits) / 3
    torch.testing.assert_close(teacher_probabilities(logits, temperature=2.0, activation=activation), by_hand)
    case = make_case(spatial)
    label = case.label_map if activation == "softmax" else torch.where(case.valid.unsqueeze(1), (case.soft_labels > 0.4).long(), -100)
    target = TeacherTarget(temperature=2.0, mix=0.3, activation=activation)
    made = target(label, 3, spatial_dims=len(spatial), dtype=torch.float64, context={"teacher_logits": logits})
    torch.testing.assert_close(made.probs, torch.where(case.valid.unsqueeze(1), 0.3 * by_hand + 0.7 * made.one_hot, 0.0))


def test_no_mix_is_the_label_target():
    case, context = make_case((5, 7)), {"teacher_logits": teachers((5, 7))}
    made = TeacherTarget(mix=0.0, label_target=SVLSTarget(sigma=2.0))(case.label_map, 3, dtype=torch.float64, context=context)
    torch.testing.assert_close(made.probs, svls_target(case.label_map, 3, sigma=2.0, dtype=torch.float64).probs)
    loss = CompoundLoss(TeacherTarget(mix=0.0), {"ce": {"term": CrossEntropy(class_weights=[0.5, 1.0, 2.0])}})
    torch.testing.assert_close(
        loss(case.logits, case.label_map, context=context), CrossEntropyLoss(class_weights=[0.5, 1.0, 2.0])(case.logits, case.label_map)
    )


def test_labels_play_no_part_at_full_mix():
    case, context = make_case((5, 7), ignored=0.0), {"teacher_logits": teachers((5, 7))}
    target = TeacherTarget(mix=1.0)
    one, other = (target(label, 3, context=context) for label in (case.label_map, (case.label_map + 1) % 3))
    torch.testing.assert_close(one.probs, other.probs)
    assert not one.hard


def test_one_hot_teacher_is_the_labels():
    case = make_case((5, 7))
    sure = 100.0 * one_hot_target(case.label_map, 3).one_hot
    torch.testing.assert_close(TeacherTarget()(case.label_map, 3, context={"teacher_logits": sure}).probs, one_hot_target(case.label_map, 3).probs)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e9])
def test_ignored_pixels_stay_ignored_and_teachers_get_no_gradient(junk):
    case = make_case((3, 4))
    clean = teachers((3, 4))
    dirty = torch.where(case.valid.unsqueeze(1), clean, junk).requires_grad_()
    loss = CompoundLoss(TeacherTarget(label_target=BoundarySmoothingTarget()), {"ce": {"term": CrossEntropy()}})
    logits = case.logits.requires_grad_()
    value = loss(logits, case.label_map, context={"teacher_logits": dirty})
    assert torch.equal(value, loss(logits, case.label_map, context={"teacher_logits": clean}))
    value.backward()
    assert dirty.grad is None
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


def test_gradient_of_cross_entropy_is_student_less_teacher():
    case, z = make_case((5, 7), ignored=0.0), teachers((5, 7), 1)
    loss = CompoundLoss(TeacherTarget(mix=1.0), {"ce": {"term": CrossEntropy(reduction="sum")}})
    small = {"teacher_logits": z[..., :2, :3]}
    assert torch.autograd.gradcheck(lambda x: loss(x, case.label_map[:, :2, :3], context=small), case.logits[..., :2, :3].clone().requires_grad_())
    logits = case.logits.requires_grad_()
    loss(logits, case.label_map, context={"teacher_logits": z}).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - z[0].softmax(1)).detach())


def test_compiles_into_one_graph_and_follows_the_resolution():
    torch._dynamo.reset()
    case, context = make_case((8, 8), dtype=torch.float32), {"teacher_logits": teachers((8, 8)).half()}
    loss = CompoundLoss(TeacherTarget(), {"ce": {"term": CrossEntropy()}})
    assert loss.needs == ("teacher_logits",)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.logits, case.label_map, context=context), loss(case.logits, case.label_map, context=context))
    assert DeepSupervisionLoss(loss)([case.logits, case.logits[..., ::2, ::2]], case.label_map, context=context).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherTarget(temperature=0.0), "Expected `temperature` to be greater than 0"),
        (lambda: TeacherTarget(mix=1.5), r"Expected `mix` in \[0, 1\], but got 1.5"),
        (lambda: TeacherTarget()(torch.zeros(1, 4).long(), 2), "Expected the side input 'teacher_logits', which TeacherTarget needs"),
        (
            lambda: TeacherTarget()(torch.zeros(1, 4).long(), 2, context={"teacher_logits": torch.zeros(1, 3, 4)}),
            r"Expected 'teacher_logits' of shape \(N, C, \*spatial\) = \(1, 2, 4\)",
        ),
    ],
)
def test_wrong_inputs_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_schedules_of_the_target_inside_go_on(by):
    inside = LabelSmoothingTarget(smoothing=Linear(0.0, 0.4, by=by))
    loss = CompoundLoss(TeacherTarget(label_target=inside), {"ce": {"weight": 1.0, "term": CrossEntropy()}})
    getattr(loss, f"on_{by}")(2, 5)
    assert inside.level.value.item() == pytest.approx(0.2)
