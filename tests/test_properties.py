"""Whatever the shape, the type and the labels: properties of every registered loss and target."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_by_name import NAMES, evaluate, make_loss
from torch import Tensor

from densecal.registry import TARGETS

IGNORED = 255


@dataclass
class Problem:
    logits: Tensor
    label_map: Tensor

    @property
    def valid(self) -> Tensor:
        return self.label_map != IGNORED


@st.composite
def problems(draw: st.DrawFn, dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64)) -> Problem:
    """Logits and labels: axes from one pixel on, batches from none on, all sorts of label maps."""
    spatial = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    batch, num_classes = draw(st.integers(0, 3)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = draw(st.sampled_from((0.1, 3.0, 30.0))) * torch.randn(batch, num_classes, *spatial, generator=generator)
    labels = torch.randint(0, num_classes, (batch, *spatial), generator=generator)
    kind = draw(st.sampled_from(("random", "one class", "a class absent", "all ignored")))
    if kind == "one class":
        labels = torch.full_like(labels, draw(st.integers(0, num_classes - 1)))
    elif kind == "a class absent":
        labels[labels == draw(st.integers(0, num_classes - 1))] = 0
    share = 1.0 if kind == "all ignored" else draw(st.sampled_from((0.0, 0.3, 0.9)))
    labels[torch.rand(labels.shape, generator=generator) < share] = IGNORED
    integer = draw(st.sampled_from((torch.uint8, torch.int16, torch.int32, torch.int64)))
    return Problem(logits.to(draw(st.sampled_from(dtypes))), labels.to(integer))


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
def test_a_loss_is_a_finite_number_without_gradient_at_ignored_pixels(name: str, problem: Problem) -> None:
    logits, valid = problem.logits.requires_grad_(), problem.valid
    value = evaluate(make_loss(name, ignore_index=IGNORED, num_classes=problem.logits.shape[1]), logits, problem.label_map)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert value.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad.movedim(1, -1)[~valid].any()
    if not valid.any():
        assert value == 0


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems(dtypes=(torch.float64,)), shift=st.floats(-100, 100))
def test_what_lies_at_ignored_pixels_moves_nothing(name: str, problem: Problem, shift: float) -> None:
    loss = make_loss(name, ignore_index=IGNORED, num_classes=problem.logits.shape[1])
    moved = torch.where(problem.valid.unsqueeze(1), problem.logits, problem.logits.flip(1) + shift)
    assert torch.equal(evaluate(loss, problem.logits, problem.label_map), evaluate(loss, moved, problem.label_map))


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems(dtypes=(torch.float64,)), seed=st.integers(0, 2**16))
def test_the_names_of_classes_do_not_matter(name: str, problem: Problem, seed: int) -> None:
    loss = make_loss(name, ignore_index=IGNORED, num_classes=problem.logits.shape[1])
    num_classes = problem.logits.shape[1]
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    renamed = torch.where(problem.valid, order.argsort()[torch.where(problem.valid, problem.label_map.long(), 0)], IGNORED)
    torch.testing.assert_close(evaluate(loss, problem.logits[:, order], renamed), evaluate(loss, problem.logits, problem.label_map))


# Targets that follow from a label map alone, with their default settings.
TARGET_NAMES = [name for name in TARGETS.list() if not TARGETS.create(name).needs and TARGETS.create(name).activation == "softmax"]


@pytest.mark.parametrize("name", TARGET_NAMES)
@given(problem=problems(), data=st.data())
def test_a_target_is_a_distribution_where_valid_and_zero_elsewhere(name: str, problem: Problem, data: st.DataObject) -> None:
    parameters, options = inspect.signature(TARGETS[name]).parameters, {}
    spatial_dims = problem.label_map.ndim - 1
    if "kernel_size" in parameters:
        sides = st.sampled_from((1, 3, 5, 7))
        options["kernel_size"] = data.draw(sides | st.lists(sides, min_size=spatial_dims, max_size=spatial_dims), label="kernel_size")
    if "border" in parameters:
        options["border"] = data.draw(st.sampled_from(("replicate", "renormalize")), label="border")
    num_classes = problem.logits.shape[1]
    target = TARGETS.create(name, ignore_index=IGNORED, **options)(problem.label_map, num_classes, spatial_dims=spatial_dims)
    probs = target.probs
    assert probs.shape == problem.logits.shape
    assert torch.equal(target.valid, problem.valid)
    assert probs.min().item() >= 0 if probs.numel() else True
    torch.testing.assert_close(probs.sum(1), problem.valid.float())
    one_hot = TARGETS.create("one_hot", ignore_index=IGNORED)(problem.label_map, num_classes, spatial_dims=spatial_dims).probs
    in_one_class = (one_hot.flatten(2).amax(2) if probs.numel() else one_hot.new_zeros(0, num_classes)).sum(1) == 1
    if name not in ("label_smoothing",):  # all others leave an image of one class alone
        torch.testing.assert_close(probs[in_one_class], one_hot[in_one_class])
