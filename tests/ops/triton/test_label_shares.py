"""The fused distribution of a label map against its twin of plain PyTorch, in double precision."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE, needs_kernels
from torch import Tensor

from densecal.ops import gaussian_kernel, mean_kernel, svls_kernel
from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import LabelShares
from densecal.targets import base, boundary_smoothing_target, label_smoothing_target, one_hot_target, svls_target

pytestmark = needs_kernels

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def label_map(*shape: int, num_classes: int = 3, ignored: float = 0.15, ignore_index: int = -100, seed: int = 0) -> Tensor:
    """Regions with some noise, pixels to ignore among them, the first corner for certain."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, shape, generator=generator).flatten().sort().values.reshape(shape)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.2, labels.flip(-1), labels)
    out = torch.rand(shape, generator=generator) < ignored
    out[(0,) * len(shape)] = ignored > 0
    return labels.masked_fill(out, ignore_index).to(DEVICE)


def fused(*args, **options) -> Tensor:
    from densecal.ops.triton import label_shares as module

    return module.label_shares(*args, **options)


def expected(labels: Tensor, num_classes: int, shares: LabelShares, *, ignore_index: int = -100) -> Tensor:
    classes = labels.long()
    valid = classes != ignore_index
    return shares(classes.masked_fill(~valid, 0), valid, num_classes, torch.float64)


def hold(labels: Tensor, shares: LabelShares, *, num_classes: int = 3, ignore_index: int = -100, dtype: torch.dtype = torch.float64) -> Tensor:
    found = fused(labels, num_classes, shares, ignore_index=ignore_index, dtype=dtype)
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected(labels, num_classes, shares, ignore_index=ignore_index), rtol=tolerance, atol=tolerance)
    assert not found.movedim(1, -1)[labels == ignore_index].any()
    return found


KERNELS = {
    "mean-1d": mean_kernel(5, 1),
    "svls-1d": svls_kernel(3, 1.0, 1),
    "svls-2d": svls_kernel(3, 0.8, 2),
    "gaussian-2d-5x3": gaussian_kernel((5, 3), 1.5, 2),
    "svls-3d": svls_kernel(3, (1.0, 2.0, 0.5), 3),
    "mean-3d-5x1x3": mean_kernel((5, 1, 3), 3),
}


@pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])
@pytest.mark.parametrize("name", KERNELS)
def test_windows(name, border):
    kernel = KERNELS[name]
    hold(label_map(2, *{1: (19,), 2: (5, 7), 3: (3, 4, 3)}[len(kernel.size)]), LabelShares(kernel, border))


def test_the_largest_window():
    hold(label_map(1, 4, 3, 5), LabelShares(gaussian_kernel(5, 2.0, 3)))
    with pytest.raises(NotCovered, match="147 pixels"):
        fused(label_map(1, 4, 3, 5), 3, LabelShares(mean_kernel((3, 7, 7), 3)), ignore_index=-100)


SMOOTHINGS = {
    "label": LabelShares(),
    "uniform": LabelShares(smoothing=0.3),
    "scheduled": LabelShares(smoothing=torch.tensor(0.3, dtype=torch.float64, device=DEVICE)),
    "per-image": LabelShares(smoothing=torch.tensor([0.3, 0.1], dtype=torch.float64, device=DEVICE).reshape(2, 1, 1, 1)),
    "boundary": LabelShares(smoothing=0.5, boundary=(3, 5)),
    "window-and-boundary": LabelShares(svls_kernel(3, 1.0, 2), "zeros", 0.5, (3, 3)),
}


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_smoothing(name):
    found = hold(labels := label_map(2, 5, 7, ignored=0.1), SMOOTHINGS[name])
    if name == "boundary":  # both kinds of pixels are there
        largest = found.amax(1)[labels >= 0]
        assert set(largest.unique().tolist()) == {1.0, 0.5 + 0.5 / 3}


def test_boundary_in_3d():
    hold(label_map(1, 3, 4, 5, ignored=0.03), LabelShares(smoothing=0.5, boundary=(1, 3, 3)))


def test_spacing_per_image():
    hold(label_map(2, 9), LabelShares(svls_kernel(5, 1.0, 1, spacing=torch.tensor([[1.0], [2.5]]))))


LABEL_TYPES = {torch.float64: torch.int16, torch.float32: torch.uint8, torch.bfloat16: torch.float32, torch.float16: torch.int8}


@pytest.mark.parametrize("dtype", LABEL_TYPES, ids=str)
def test_types_and_strided_labels(dtype):
    ignore_index = 255 if LABEL_TYPES[dtype] == torch.uint8 else -100
    labels = label_map(2, 5, 7, ignore_index=ignore_index).to(LABEL_TYPES[dtype])
    for given in (labels, labels.mT, labels[:, ::2, 1:]):
        hold(given, LabelShares(svls_kernel(3, 1.0, 2), "zeros", 0.1), ignore_index=ignore_index, dtype=dtype)


def test_two_classes_of_bool():
    labels = label_map(1, 9, num_classes=2, ignored=0.0).bool()
    hold(labels, LabelShares(mean_kernel(3, 1)), num_classes=2)


def test_many_classes_over_several_programs(monkeypatch):
    from densecal.ops.triton import label_shares as module

    monkeypatch.setattr(module, "BLOCK", 16)
    hold(label_map(2, 5, 7, num_classes=11), LabelShares(svls_kernel(3, 1.0, 2)), num_classes=11)


def test_wide_offsets(monkeypatch):
    """Offsets in 64 bits, as for images beyond 2^31 pixels."""
    from densecal.ops.triton import layout

    monkeypatch.setattr(layout, "_FARTHEST", 0)
    hold(label_map(2, 5, 7), LabelShares(svls_kernel(3, 1.0, 2)))


def test_nothing_counts_and_nothing_is_there():
    assert not fused(torch.full((1, 4), 7, device=DEVICE), 2, LabelShares(mean_kernel(3, 1), smoothing=0.5), ignore_index=7).any()
    assert fused(torch.zeros(1, 0, 3, dtype=torch.long, device=DEVICE), 2, LabelShares(), ignore_index=7).shape == (1, 2, 0, 3)


def test_ignore_index_may_be_a_class_number():
    hold(label_map(1, 5, 7, ignore_index=1), LabelShares(mean_kernel(3, 2), "renormalize"), ignore_index=1)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_label_that_is_no_class_makes_its_shares_nan(wrong):
    labels = torch.tensor([[0, 1, 2, 0, wrong]], device=DEVICE)
    found = fused(labels, 3, LabelShares(smoothing=0.3), ignore_index=-100)
    assert found[..., 4].isnan().all()
    assert found[..., :4].isfinite().all()


@pytest.mark.parametrize("make", [one_hot_target, svls_target, label_smoothing_target, boundary_smoothing_target])
def test_probs_of_a_target(make, monkeypatch):
    """On a GPU a target takes the kernel, which reads labels as they are; here the interpreter is taken for one."""
    from densecal.targets.one_hot import LabelMap

    labels = label_map(1, 5, 7, ignore_index=255)
    reference = make(labels.cpu(), 3, ignore_index=255, dtype=torch.float64)
    reference = reference.recipe(reference.one_hot, reference.valid, "softmax")
    monkeypatch.setattr("densecal.targets.one_hot.may_look", lambda tensor: False)  # on a GPU labels are not looked at
    monkeypatch.setattr(LabelMap, "_once", lambda self: pytest.fail("the labels were converted"))
    if DEVICE == "cpu":
        monkeypatch.setattr(base, "_maker", lambda device, shares: fused)
    target = make(labels.to(torch.uint8), 3, ignore_index=255, dtype=torch.float64)
    torch.testing.assert_close(target.probs.cpu(), reference, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(target.one_hot.cpu(), one_hot_target(labels.cpu(), 3, ignore_index=255, dtype=torch.float64).probs, rtol=0, atol=0)
    assert (target.probs is target.one_hot) == (make is one_hot_target)  # one and the same where they are equal
