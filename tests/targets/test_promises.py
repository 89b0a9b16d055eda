"""Promises that every target keeps under a loss: shapes, types, ignored pixels, copies, regions, MetaTensors."""

import copy
import pickle

import pytest
import torch
from cases import each_dimension, make_case

from densecal.losses import CompoundLoss
from densecal.registry import TARGETS
from densecal.terms import CrossEntropy, DiceSemimetric

NAMES = [name for name in TARGETS.list() if name != "temporal_smoothing"]  # which takes sequences of events, under sigmoid
OPTIONS = {"neighbour_proportions": {"kernel": "bilateral"}}
each_target = pytest.mark.parametrize("name", NAMES)


class SameDraws(CompoundLoss):
    """What a target draws is the same in each call."""

    def forward(self, *args, **kwargs):
        torch.manual_seed(0)
        return super().forward(*args, **kwargs)


def build(name, **options):
    target = TARGETS.create(name, **OPTIONS.get(name, {}), **options)
    return SameDraws(target, {"ce": {"weight": 0.5, "term": CrossEntropy()}, "dml": {"weight": 0.5, "term": DiceSemimetric()}})


def side_inputs(case, *, junk=None):
    """One of each, with other labels than the case's; what lies at ignored pixels of the case may be junk."""
    others = torch.stack([make_case(case.label_map.shape[1:], seed=s).label_map for s in (5, 6)], dim=1)
    image, teacher = torch.rand(2, 1, *case.label_map.shape[1:], generator=torch.Generator().manual_seed(7)), case.logits.flip(0).detach()
    if junk is not None:
        image, teacher = (torch.where(case.valid.unsqueeze(1), t, junk) for t in (image, teacher))
    return {"image": image, "teacher_logits": teacher, "rater_labels": others, "label_stack": others, "spacing": torch.ones(case.label_map.ndim - 1)}


@each_target
@each_dimension
@pytest.mark.parametrize("form", ["map", "soft"])
def test_value_and_gradient(name, spatial, form):
    case = make_case(spatial)
    logits = case.logits.requires_grad_()
    value = build(name)(logits, case.label_map if form == "map" else case.soft_labels, context=side_inputs(case))
    value.backward()
    assert value.shape == ()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


@each_target
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e4])
def test_nothing_at_an_ignored_pixel_has_influence(name, junk):
    case, loss = make_case((5, 7)), build(name)
    dirty = torch.where(case.valid.unsqueeze(1), case.logits, junk)
    assert torch.equal(
        loss(dirty, case.label_map, context=side_inputs(case, junk=junk)), loss(case.logits, case.label_map, context=side_inputs(case))
    )


@each_target
def test_no_valid_pixel_is_zero_on_the_graph(name):
    case = make_case((5, 7), ignored=1.1)
    logits = case.logits.requires_grad_()
    value = build(name)(logits, case.label_map, context=side_inputs(case))
    value.backward()
    assert value.item() == 0.0
    assert not logits.grad.any()


@each_target
def test_distribution_sums_to_one_where_valid_and_is_zero_elsewhere(name):
    case = make_case((5, 7))
    target = TARGETS.create(name, **OPTIONS.get(name, {}))(case.label_map, 3, context=side_inputs(case))
    assert target.probs.dtype == torch.float32
    torch.testing.assert_close(target.probs.sum(1), target.valid.float())
    assert target.probs.min() >= 0


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_near_single(name, dtype):
    case, loss = make_case((5, 7), dtype=torch.float32), build(name)
    context = side_inputs(case)
    logits = case.logits.to(dtype)
    torch.testing.assert_close(loss(logits, case.label_map, context=context), loss(logits.float(), case.label_map, context=context))
    expected = loss(case.logits, case.label_map, context=context)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(loss(case.logits, case.label_map, context=context), expected)


@each_target
def test_copies_give_the_same_and_hold_no_state(name):
    case, loss = make_case((5, 7)), build(name)
    expected = loss(case.logits, case.label_map, context=side_inputs(case))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(case.logits, case.label_map, context=side_inputs(case)), expected)
    assert not loss.state_dict()


@each_target
def test_single_foreground_channel_and_overlapping_regions(name):
    loss = build(name, activation="sigmoid")
    for channels in (1, 3):
        generator = torch.Generator().manual_seed(channels)
        logits = torch.randn(2, channels, 5, 7, generator=generator, requires_grad=True)
        regions = torch.randint(0, 2, (2, channels, 5, 7), generator=generator)
        regions[0, :, :2] = -100
        raters = torch.stack([regions, regions.flip(-1)], dim=1)
        context = {"image": torch.rand(2, 1, 5, 7), "teacher_logits": logits.detach(), "rater_labels": raters, "label_stack": raters}
        value = loss(logits, regions, context=context)
        value.backward()
        assert value.isfinite()
        assert not logits.grad[0, :, :2].any()


@each_target
def test_ignore_index_and_meta_tensors(name):
    monai_data = pytest.importorskip("monai.data")
    case = make_case((5, 7))
    context, label = side_inputs(case), case.label_map
    expected = build(name)(case.logits, label, context=context)
    marked = {k: v.masked_fill(v == -100, 255) if k in ("rater_labels", "label_stack") else v for k, v in context.items()}
    torch.testing.assert_close(build(name, ignore_index=255)(case.logits, label.masked_fill(label == -100, 255), context=marked), expected)
    meta = {k: monai_data.MetaTensor(v) if k != "spacing" else v for k, v in context.items()}
    value = build(name)(monai_data.MetaTensor(case.logits), monai_data.MetaTensor(label.unsqueeze(1)), context=meta)
    assert type(value) is torch.Tensor
    assert torch.equal(value, expected)


@pytest.mark.gpu
@each_target
def test_gpu_and_cpu_agree(name):
    case, loss = make_case((5, 7, 6), dtype=torch.float32), build(name)
    here, there = case.logits.clone().requires_grad_(), case.logits.cuda().requires_grad_()
    expected = loss(here, case.label_map, context=side_inputs(case))
    value = loss.cuda()(there, case.label_map.cuda(), context={k: v.cuda() for k, v in side_inputs(case).items()})
    expected.backward()
    value.backward()
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(there.grad.cpu(), here.grad)
