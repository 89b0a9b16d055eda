"""Every smoothing in two stages: all of it first, the labels themselves afterwards."""

import copy
import pickle

import pytest
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss, SVLSLoss
from densecal.registry import TARGETS
from densecal.schedules import Linear, TwoStage
from densecal.targets import BoundarySmoothingTarget, LabelSmoothingTarget, OneHotTarget, ScheduledTarget, SVLSTarget
from densecal.terms import CrossEntropy

# Those that smooth a label map alone.
NAMES = [name for name in TARGETS.list() if name != "one_hot" and not TARGETS.create(name).needs and TARGETS.create(name).activation == "softmax"]


@each_dimension
@pytest.mark.parametrize("name", NAMES)
def test_every_target_in_two_stages(name, spatial):
    case = make_case(spatial)
    smooth, scheduled = TARGETS.create(name), ScheduledTarget(label_target=TARGETS.create(name), share=TwoStage(1.0, 0.0, switch=2))
    for epoch in range(4):
        scheduled.on_epoch(epoch, 4)
        made = scheduled(case.label_map, 3, dtype=torch.float64)
        start = smooth(case.label_map, 3, dtype=torch.float64)
        assert torch.equal(made.probs, start.probs if epoch < 2 else start.one_hot)
        assert torch.equal(made.valid, start.valid)


@pytest.mark.parametrize("target", [SVLSTarget, BoundarySmoothingTarget, LabelSmoothingTarget])
def test_a_part_of_the_smoothing_by_hand(target):
    label = torch.tensor([[0, 0, 1, -100]])
    half = ScheduledTarget(label_target=target(), share=Linear(1.0, 0.0, by="step"))
    half.on_epoch(9, 10)
    half.on_step(3, 5)
    torch.testing.assert_close(half(label, 2).probs, 0.25 * target()(label, 2).probs + 0.75 * OneHotTarget()(label, 2).probs)


def test_label_smoothing_of_less_is_a_part_of_label_smoothing():
    case = make_case((5, 7))
    part, less = ScheduledTarget(label_target=LabelSmoothingTarget(smoothing=0.4), share=0.25), LabelSmoothingTarget(smoothing=0.1)
    torch.testing.assert_close(part(case.label_map, 3).probs, less(case.label_map, 3).probs)


def test_schedule_is_in_checkpoints_and_copies_and_in_one_graph():
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)

    def build():
        return CompoundLoss(ScheduledTarget(label_target=SVLSTarget()), {"ce": {"weight": 1.0, "term": CrossEntropy()}})

    loss, fresh = build(), build()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.logits, case.label_map), SVLSLoss()(case.logits, case.label_map))
    loss.on_epoch(3, 4)
    expected = loss(case.logits, case.label_map)
    torch.testing.assert_close(compiled(case.logits, case.label_map), expected)
    fresh.load_state_dict(loss.state_dict())
    for twin in (fresh, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(case.logits, case.label_map), expected)


def test_activation_and_ignored_label_are_those_of_the_target():
    scheduled = ScheduledTarget(label_target=SVLSTarget(activation="sigmoid", ignore_index=255), share=0.5)
    made = scheduled(torch.tensor([[[0, 1, 255]]]), 1)
    assert (made.activation, made.valid.tolist()) == ("sigmoid", [[True, True, False]])
    loss = CompoundLoss(ScheduledTarget(label_target=SVLSTarget()), {"ce": {"weight": 1.0, "term": CrossEntropy()}}, ignore_index=7)
    assert loss.target.label_target.ignore_index == 7


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"Expected a `label_target` that smooths labels, but got OneHotTarget"):
        ScheduledTarget(label_target=OneHotTarget())
    with pytest.raises(TypeError, match=r"`label_target` to be a densecal\.targets\.Target, but got str"):
        ScheduledTarget(label_target="svls")
    with pytest.raises(ValueError, match=r"Expected `share` in \[0, 1\], but got 1.5"):
        ScheduledTarget(label_target=SVLSTarget(), share=1.5)
