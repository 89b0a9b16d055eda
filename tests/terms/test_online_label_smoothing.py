"""Online label smoothing: arithmetic, loops, its state."""

import copy
import pickle

import pytest
import reference
import torch
from cases import each_dimension, make_case

from densecal.losses import CrossEntropyLoss, LabelSmoothingLoss, OnlineLabelSmoothingLoss
from densecal.targets import one_hot_target, svls_target
from densecal.terms import OnlineLabelSmoothing

WEIGHTS = [0.5, 1.0, 3.0]


def build(**options):
    return OnlineLabelSmoothing(3, **options).double()


def target_of(case, kind="hard"):
    options = {"spatial_dims": case.label_map.ndim - 1, "dtype": torch.float64}
    return one_hot_target(case.label_map if kind == "hard" else case.soft_labels, 3, **options)


def means(case, target, table):
    """The table of the next epoch, pixel by pixel."""
    sums, counts = torch.zeros(3, 3, dtype=torch.float64), [0] * 3
    for image, *x in reference.pixels(case.logits.shape):
        at = (image, slice(None), *x)
        label, p = int(target.one_hot[at].argmax()), case.logits[at].softmax(0)
        if case.valid[(image, *x)] and int(p.argmax()) == label:
            sums[label] += p
            counts[label] += 1
    return torch.stack([sums[c] / counts[c] if counts[c] else table[c] for c in range(3)])


def test_by_hand():
    # Two pixels of class 0: one right with p = (0.8, 0.2), one wrong with p = (0.4, 0.6); a pixel of class 1 that is wrong.
    logits = torch.tensor([[[0.8, 0.4, 0.7], [0.2, 0.6, 0.3]]]).log()
    loss = OnlineLabelSmoothingLoss(2, weight_ce=0.0, weight_soft=1.0, smoothing=0.2)
    label_map = torch.tensor([[0, 0, 1]])
    loss(logits, label_map)
    loss.on_epoch(1, 10)
    torch.testing.assert_close(loss.parts["soft"].table, torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.7, 0.3]])
    q = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]])
    torch.testing.assert_close(loss(logits, label_map), -(q * p.log()).sum() / 3)


@each_dimension
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_matches_the_loops(spatial, kind):
    case, term = make_case(spatial), build(class_weights=WEIGHTS, reduction="sum")
    target = target_of(case, kind)
    for epoch in range(2):
        table = term.table.clone()
        soft = torch.einsum("ny...,yk->nk...", target.one_hot, table)
        expected = reference.cross_entropy(case.logits, soft, case.valid, WEIGHTS)
        assert term(case.logits, target).item() == pytest.approx(expected, rel=1e-6)
        term.on_epoch(epoch + 1, 5)
        torch.testing.assert_close(term.table, means(case, target, table))
        torch.testing.assert_close(term.table.sum(1), torch.ones(3, dtype=torch.float64))


def test_first_epoch_is_label_smoothing_over_the_others():
    case = make_case((5, 7))
    loss = OnlineLabelSmoothingLoss(3, weight_ce=0.0, weight_soft=1.0, smoothing=0.3).double()
    torch.testing.assert_close(loss(case.logits, case.label_map), LabelSmoothingLoss(smoothing=0.3, spread="others")(case.logits, case.label_map))
    mixed = OnlineLabelSmoothingLoss(3, weight_ce=0.25, weight_soft=0.75, smoothing=0.0).double()
    torch.testing.assert_close(mixed(case.logits, case.label_map), CrossEntropyLoss()(case.logits, case.label_map))


def test_batches_of_an_epoch_add_up_and_evaluation_adds_nothing():
    case = make_case((5, 7))
    whole, parts = build(), build()
    whole(case.logits, target_of(case))
    for i in range(2):
        parts(case.logits[i : i + 1], one_hot_target(case.label_map[i : i + 1], 3, dtype=torch.float64))
    parts.eval()
    parts(-case.logits, target_of(case))
    for term in (whole, parts):
        term.on_epoch(1, 5)
    torch.testing.assert_close(parts.table, whole.table)


def test_ignored_pixels_leave_no_trace():
    case = make_case((5, 7))
    loss = OnlineLabelSmoothingLoss(3)
    dirty = torch.where(case.valid.unsqueeze(1), case.logits, torch.nan)
    other = copy.deepcopy(loss)
    assert torch.equal(loss(case.logits, case.label_map), other(dirty, case.label_map))
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), other.state_dict().values(), strict=True))


def test_labels_are_read_before_smoothing():
    case = make_case((5, 7))
    smoothed = svls_target(case.label_map, 3, dtype=torch.float64)
    torch.testing.assert_close(build()(case.logits, smoothed), build()(case.logits, target_of(case)))


def test_state_survives_checkpoints_and_copies():
    case = make_case((5, 7), dtype=torch.float32)
    loss = OnlineLabelSmoothingLoss(3)
    loss(case.logits, case.label_map)
    resumed = OnlineLabelSmoothingLoss(3)
    resumed.load_state_dict(loss.state_dict())
    for twin in (resumed, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        twin.on_epoch(1, 5)
        twin.eval()
        assert twin.parts["soft"].table[0, 0] != 0.9
    loss.on_epoch(1, 5)
    torch.testing.assert_close(resumed(case.logits, case.label_map), loss(case.logits, case.label_map))


def test_autocast_changes_nothing():
    case = make_case((5, 7), dtype=torch.float32)
    a, b = OnlineLabelSmoothingLoss(3), OnlineLabelSmoothingLoss(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = a(case.logits, case.label_map)
    torch.testing.assert_close(value, b(case.logits, case.label_map))
    torch.testing.assert_close(a.parts["soft"].sums, b.parts["soft"].sums)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_compiles_into_one_graph(kind):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    label = case.label_map if kind == "hard" else case.soft_labels
    loss = OnlineLabelSmoothingLoss(3)
    twin = copy.deepcopy(loss)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        torch.testing.assert_close(compiled(case.logits, label), loss(case.logits, label))
        loss.on_epoch(epoch + 1, 5)
        twin.on_epoch(epoch + 1, 5)
        torch.testing.assert_close(twin.parts["soft"].table, loss.parts["soft"].table)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradient_is_right_and_zero_at_ignored_pixels(kind):
    case = make_case((2, 3), seed=3)
    logits, target, term = case.logits.requires_grad_(), target_of(case, kind), build(class_weights=WEIGHTS)
    assert torch.autograd.gradcheck(lambda z: term(z, target), logits)
    term(logits, target).backward()
    assert logits.grad is not None
    assert not case.valid.all()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


def test_no_valid_pixel_changes_nothing():
    case = make_case((5, 7), ignored=1.1)
    logits = case.logits.requires_grad_()
    loss = OnlineLabelSmoothingLoss(3)
    value = loss(logits, case.label_map)
    value.backward()
    assert value.item() == 0.0
    before = loss.parts["soft"].table.clone()
    loss.on_epoch(1, 5)
    assert torch.equal(loss.parts["soft"].table, before)


def test_wrong_inputs_are_named():
    case = make_case((5, 7))
    with pytest.raises(ValueError, match="Expected `num_classes` of at least 2, but got 1"):
        OnlineLabelSmoothingLoss(1)
    with pytest.raises(ValueError, match=r"Expected `smoothing` in \[0, 1\]"):
        OnlineLabelSmoothingLoss(3, smoothing=1.5)
    with pytest.raises(ValueError, match="Expected logits of 4 classes, as `num_classes` says, but got 3"):
        OnlineLabelSmoothingLoss(4)(case.logits, case.label_map)
    with pytest.raises(ValueError, match="Expected exclusive classes for online label smoothing"):
        build()(case.logits, one_hot_target(case.soft_labels, 3, activation="sigmoid", dtype=torch.float64))
