"""Weights and smoothing levels that change: values, state, gradients, compilation."""

import copy
import pickle

import pytest
import torch
from cases import make_case
from torch.nn import functional as F

from densecal.losses import CompoundLoss, DeepSupervisionLoss, LabelSmoothingLoss, MbLSLoss, NACLLoss
from densecal.schedules import Add, Cosine, Level, Linear, Multiply, Steps, TwoStage
from densecal.targets import LabelSmoothingTarget, OneHotTarget
from densecal.terms import CrossEntropy, DiceSemimetric


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(0.0, 1.0, until=1.0), [0.0, 0.2, 0.4, 0.6, 0.8]),
        (Linear(0.0, 1.0, until=0.4), [0.0, 0.5, 1.0, 1.0, 1.0]),
        (Linear(0.0, 1.0, until=4), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Cosine(1.0, 0.0, until=2), [1.0, 0.5, 0.0, 0.0, 0.0]),
        (Steps([1.0, 2.0, 3.0], [2, 4]), [1.0, 1.0, 2.0, 2.0, 3.0]),
        (Steps([1.0, 2.0, 3.0], [0.2, 0.8]), [1.0, 2.0, 2.0, 2.0, 3.0]),
        (TwoStage(0.1, 0.0, switch=3), [0.1, 0.1, 0.1, 0.0, 0.0]),
        (TwoStage(0.1, 0.0, switch=0.4), [0.1, 0.1, 0.0, 0.0, 0.0]),
        (Multiply(1.0, 2.0, maximum=5.0), [1.0, 2.0, 4.0, 5.0, 5.0]),
        (Multiply(1.0, 0.5, every=2, minimum=0.3), [1.0, 1.0, 0.5, 0.5, 0.3]),
        (Add(1.0, -0.5, minimum=0.0), [1.0, 0.5, 0.0, 0.0, 0.0]),
        (Add(0.0, 1.0, maximum=2.5), [0.0, 1.0, 2.0, 2.5, 2.5]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_schedule_by_hand(schedule, expected):
    assert [schedule(epoch, 5) for epoch in range(5)] == pytest.approx(expected)
    assert schedule == pickle.loads(pickle.dumps(schedule))
    assert hash(schedule) == hash(copy.deepcopy(schedule))


@pytest.mark.parametrize("schedule", [Linear(0.5, 1.0), Cosine(0.5, 1.0, until=1.0), TwoStage(0.5, 1.0), Steps([0.5, 1.0], [0.3])])
def test_training_of_one_epoch_is_its_beginning(schedule):
    assert schedule(0, 1) == 0.5


def test_endless_growth_stays_a_number():
    assert Multiply(1.0, 10.0, maximum=7.0)(100_000, 0) == 7.0
    assert Multiply(1.0, 0.1)(100_000, 0) == 0.0


@pytest.mark.parametrize("schedule", [Linear(0.0, 1.0), Cosine(0.0, 1.0, until=0.5), TwoStage(0.0, 1.0), Steps([0.0, 1.0], [0.5])])
def test_open_length_is_named(schedule):
    with pytest.raises(ValueError, match=r"Expected the number of epochs of the training.*Set `trainer.max_epochs`"):
        schedule(3, -1)


@pytest.mark.parametrize(
    "schedule", [Linear(0.0, 1.0, until=2), TwoStage(0.0, 1.0, switch=2), Steps([0.0, 1.0], [2]), Add(0.0, 0.5), Multiply(1.0, 1.0)]
)
def test_positions_need_no_length(schedule):
    assert schedule(2, -1) == 1.0


def test_level_that_stays_is_a_float_and_one_that_changes_is_in_the_checkpoint():
    still, moving = Level("weight", 0.1), Level("weight", Linear(0.0, 1.0))
    still.on_epoch(3, 5)
    assert still.value == 0.1
    assert not still.state_dict()
    moving.on_epoch(1, 5)
    assert moving.state_dict() == {"value": torch.tensor(0.25)}
    fresh = Level("weight", Linear(0.0, 1.0))
    fresh.load_state_dict(moving.state_dict())
    assert fresh.value == 0.25
    for twin in (copy.deepcopy(moving), pickle.loads(pickle.dumps(moving))):
        twin.on_epoch(2, 5)
        assert (twin.value, moving.value) == (0.5, 0.25)


def test_epochs_and_steps_do_not_mix():
    by_epoch, by_step = Level("weight", Linear(0.0, 1.0)), Level("weight", Linear(0.0, 1.0, by="step"))
    for level in (by_epoch, by_step):
        level.on_epoch(1, 2)
        level.on_step(1, 5)
    assert (by_epoch.value, by_step.value) == (1.0, 0.25)


@pytest.mark.parametrize("spread", ["all", "others"])
@pytest.mark.parametrize("form", ["map", "soft"])
def test_scheduled_smoothing_equals_the_constant_of_that_epoch(spread, form):
    case = make_case((5, 7))
    target = case.label_map if form == "map" else case.soft_labels
    scheduled = LabelSmoothingLoss(smoothing=Linear(0.0, 0.4), spread=spread, class_weights=[0.5, 1.0, 2.0])
    for epoch, smoothing in ((0, 0.0), (1, 0.2), (2, 0.4)):
        scheduled.on_epoch(epoch, 3)
        constant = LabelSmoothingLoss(smoothing=smoothing, spread=spread, class_weights=[0.5, 1.0, 2.0])
        torch.testing.assert_close(scheduled(case.logits, target), constant(case.logits, target), rtol=1e-6, atol=0)


def test_two_stage_label_smoothing_ends_as_plain_cross_entropy():
    case = make_case((5, 7))
    loss = LabelSmoothingLoss(smoothing=TwoStage(0.1, 0.0, switch=0.5))
    loss.on_epoch(4, 10)
    expected = F.cross_entropy(case.logits, case.label_map, label_smoothing=0.1)
    torch.testing.assert_close(loss(case.logits, case.label_map), expected, rtol=1e-6, atol=0)
    loss.on_epoch(5, 10)
    torch.testing.assert_close(loss(case.logits, case.label_map), F.cross_entropy(case.logits, case.label_map))


def test_weights_of_a_composition_follow_their_schedules():
    case = make_case((5, 7))
    terms = {"ce": {"weight": Linear(1.0, 0.0), "term": CrossEntropy()}, "dml": {"weight": Linear(0.0, 1.0, by="step"), "term": DiceSemimetric()}}
    loss = DeepSupervisionLoss(CompoundLoss(LabelSmoothingTarget(smoothing=0.1), terms))
    loss.on_epoch(1, 5)
    loss.on_step(3, 4)
    assert loss.loss.weights == {"ce": 0.75, "dml": 1.0}
    parts = loss.terms(case.logits, case.label_map)
    torch.testing.assert_close(loss(case.logits, case.label_map), 0.75 * parts["ce"] + parts["dml"])
    assert set(loss.state_dict()) == {"loss.levels.ce.value", "loss.levels.dml.value"}


def test_new_values_need_no_new_compilation():
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    terms = {"ce": {"weight": Linear(0.0, 1.0), "term": CrossEntropy()}}
    loss = CompoundLoss(LabelSmoothingTarget(smoothing=Linear(0.0, 0.5)), terms)
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for epoch in range(4):
        loss.on_epoch(epoch, 4)
        torch.testing.assert_close(compiled(case.logits, case.label_map), loss(case.logits, case.label_map))
        constant = LabelSmoothingLoss(smoothing=0.5 * epoch / 3)
        torch.testing.assert_close(compiled(case.logits, case.label_map), epoch / 3 * constant(case.logits, case.label_map))
    assert len(graphs) == 1


def test_gradient_with_a_scheduled_weight():
    case = make_case((2, 3))
    loss = NACLLoss(weight=Linear(0.0, 1.0))
    loss.on_epoch(1, 3)
    a, b = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
    loss(a, case.label_map).backward()
    NACLLoss(weight=0.5)(b, case.label_map).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(0.0, 1.0, until=0), ValueError, "Expected `until` as a whole number of 1 or more, or as a share"),
        (lambda: Linear(0.0, 1.0, until=1.5), ValueError, r"in \(0, 1\], but got 1.5"),
        (lambda: Linear(0.0, 1.0, by="batch"), ValueError, "Expected `by` to be one of"),
        (lambda: TwoStage(0.0, 1.0, switch=0.0), ValueError, "Expected `switch` as"),
        (lambda: Steps([1.0], [2]), ValueError, "Expected one value more than the 1 milestones, but got 1"),
        (lambda: Steps([1.0, 2.0, 3.0], [2, 1]), ValueError, "Expected `milestones` to rise"),
        (lambda: Steps([1.0, 2.0, 3.0], [2, 0.5]), ValueError, "all of them positions or all shares"),
        (lambda: Multiply(1.0, 0.0), ValueError, "Expected `factor` to be greater than 0"),
        (lambda: Add(1.0, 1.0, every=0), ValueError, "Expected `every` to be greater than 0"),
        (lambda: MbLSLoss(weight=-0.1), ValueError, "Expected `terms.mbls.weight` to be 0 or greater, but got -0.1"),
        (lambda: MbLSLoss(weight=Linear(0.1, -0.1)).on_epoch(9, 10), ValueError, "Expected `terms.mbls.weight` to be 0 or greater, but got -0.1"),
        (lambda: LabelSmoothingTarget(smoothing=1.5), ValueError, r"Expected `smoothing` in \[0, 1\], but got 1.5"),
        (lambda: LabelSmoothingTarget(smoothing=Add(1.0, 1.0)).on_epoch(1, 2), ValueError, r"Expected `smoothing` in \[0, 1\], but got 2.0"),
        (
            lambda: CompoundLoss(OneHotTarget(), {"ce": {"weight": "high", "term": CrossEntropy()}}),
            TypeError,
            "a number or a densecal.schedules.Schedule",
        ),
    ],
)
def test_wrong_values_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.gpu
def test_level_follows_the_loss_to_the_gpu():
    case = make_case((5, 7), dtype=torch.float32)
    loss = LabelSmoothingLoss(smoothing=Linear(0.0, 0.4))
    loss.on_epoch(1, 3)
    expected = loss(case.logits, case.label_map)
    torch.testing.assert_close(loss(case.logits.cuda(), case.label_map.cuda()).cpu(), expected)
    torch.testing.assert_close(loss.cuda()(case.logits.cuda(), case.label_map.cuda()).cpu(), expected)
    assert {b.device.type for b in loss.buffers()} == {"cuda"}
