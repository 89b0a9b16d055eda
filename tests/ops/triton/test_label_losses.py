"""The fused losses against their twin of plain PyTorch, in double precision: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernels import DEVICE, needs_kernels
from torch import Tensor

from densecal.ops import gaussian_kernel, label_losses, mean_kernel, svls_kernel
from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, MarginPart, NeighbourPart, OverlapCounts, OverlapPart, Part, PixelLoss

pytestmark = needs_kernels

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # numbers such as a margin are passed in single
ENTROPY_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25] * 5, device=DEVICE)


@dataclass(frozen=True)
class Input:
    """Shape, types and layout of an input; a tenth of the pixels and the whole first corner are ignored."""

    spatial: tuple[int, ...] = (5, 4)
    num_classes: int = 3
    batch: int = 2
    dtype: torch.dtype = torch.float64
    label_dtype: torch.dtype = torch.int64
    ignore_index: int = -100
    layout: str = "contiguous"

    def make(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.num_classes, *self.spatial)
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, self.num_classes, (self.batch, *self.spatial), generator=generator)
        # Regions rather than noise: neighbours mostly agree, so that programs with and without a boundary occur.
        labels = labels.flatten().sort().values.reshape(labels.shape)
        labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.2, labels.flip(-1), labels)
        ignored = torch.rand(labels.shape, generator=generator) < 0.1
        ignored[(0,) * labels.ndim] = True
        labels = labels.masked_fill(ignored, self.ignore_index)
        logits, labels = logits.to(DEVICE, self.dtype), labels.to(DEVICE, self.label_dtype)
        if self.layout == "channels_last":
            logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
        elif self.layout == "strided":
            logits = torch.stack([logits, logits], -1).transpose(-2, 2).contiguous().transpose(-2, 2)[..., 1]  # no axis beside its neighbour
            labels = labels.transpose(-1, 1).contiguous().transpose(-1, 1)
        return logits, labels


def numbers(results) -> list[Tensor]:
    return [n for r in results for n in ((r.values, r.count) if isinstance(r, PixelLoss) else (r.tp, r.fp, r.fn, r.largest))]


def evaluate(function, logits: Tensor, labels: Tensor, parts: list[Part], **options) -> tuple[list[Tensor], Tensor]:
    """Everything that a function gives, and the gradient of a sum of it with weights of both signs."""
    logits = logits.detach().requires_grad_()
    given = numbers(function(logits, labels, parts, **options))
    generator = torch.Generator().manual_seed(1)
    total = sum((n * torch.randn(n.shape, generator=generator, dtype=torch.float64).to(n)).sum() for n in given if n.requires_grad)
    total.backward()
    return [n.detach() for n in given], logits.grad


def fused(*args, **options):
    from densecal.ops.triton import label_losses as module

    return module.label_losses(*args, **options)


def hold(given: Input, parts: list[Part], *, per_pixel: bool = False) -> None:
    logits, labels = given.make()
    options = {"ignore_index": given.ignore_index, "per_pixel": per_pixel}
    expected, expected_gradient = evaluate(label_losses, logits.double(), labels, parts, **options)
    found, gradient = evaluate(fused, logits, labels, parts, **options)
    tolerance = TOLERANCE[given.dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.promote_types(given.dtype, torch.float32)
        torch.testing.assert_close(a.double(), b, rtol=max(tolerance / 10, 1e-7), atol=max(tolerance / 10, 1e-7))
    assert gradient.dtype == given.dtype
    assert gradient.stride() == logits.stride() or given.layout == "strided"
    largest = expected_gradient.abs().max()
    torch.testing.assert_close(gradient.double() / largest, expected_gradient / largest, rtol=tolerance, atol=tolerance)
    ignored = labels == given.ignore_index
    assert ignored.any()
    assert not gradient.movedim(1, -1)[ignored].any()


def entropy(shares: LabelShares, weights: bool = True, num_classes: int = 3) -> CrossEntropyPart:
    return CrossEntropyPart(shares, ENTROPY_WEIGHTS[:num_classes] if weights else None)


# Windows, borders and dimensions of the target, under cross-entropy.
TARGETS = {
    "label": (Input((401,), 2, batch=1), LabelShares()),
    "uniform": (Input((41,), 17, batch=1), LabelShares(smoothing=0.3)),
    "scheduled": (Input((7,)), LabelShares(smoothing=torch.tensor(0.3, device=DEVICE))),
    "per-image": (Input((7,)), LabelShares(smoothing=torch.tensor([0.3, 0.1], device=DEVICE).reshape(2, 1, 1))),
    "boundary-2d": (Input((5, 4)), LabelShares(smoothing=0.5, boundary=(3, 3))),
    "boundary-3d": (Input((3, 3, 4), batch=1), LabelShares(smoothing=0.5, boundary=(1, 3, 3))),
    "svls-replicate-1d": (Input((41,)), LabelShares(svls_kernel(5, 1.0, 1))),
    "svls-replicate-2d": (Input(), LabelShares(svls_kernel(3, 1.0, 2))),
    "svls-renormalize-2d": (Input(), LabelShares(svls_kernel(3, 1.0, 2), "renormalize")),
    "svls-zeros-2d": (Input(), LabelShares(svls_kernel(3, 1.0, 2), "zeros")),
    "gaussian-renormalize-2d-5x3": (Input((5, 7), batch=1), LabelShares(gaussian_kernel((5, 3), 1.5, 2), "renormalize")),
    "mean-zeros-1d": (Input((7,)), LabelShares(mean_kernel(5, 1), "zeros")),
    "svls-replicate-3d": (Input((3, 4, 3), batch=1), LabelShares(svls_kernel(3, (1.0, 2.0, 0.5), 3))),
    "mean-zeros-3d": (Input((2, 3, 3), 2, batch=1), LabelShares(mean_kernel((1, 3, 3), 3), "zeros")),
    "spacing-per-image": (Input((7,)), LabelShares(svls_kernel(5, 1.0, 1, spacing=torch.tensor([[1.0], [2.5]])))),
    "one-pixel": (Input((1, 1), ignore_index=1), LabelShares(svls_kernel(3, 1.0, 2))),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    given, shares = TARGETS[name]
    hold(given, [entropy(shares, num_classes=given.num_classes)], per_pixel=name.startswith("svls"))


@pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])
def test_one_class_everywhere(border):
    """The target is the label, but for a border of zeros, of which it takes a part."""
    logits, labels = Input((7,), 2).make()
    labels = torch.where(labels == -100, labels, 1)
    part = CrossEntropyPart(LabelShares(mean_kernel(3, 1), border))
    expected, found = (evaluate(f, logits, labels, [part], ignore_index=-100) for f in (label_losses, fused))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_pixel", [False, True], ids=["sum", "pixels"])
def test_types_and_layouts(dtype, per_pixel):
    """Each type of logits with another type of labels and another layout; windows on the labels in that layout."""
    labels = {torch.float64: torch.int16, torch.float32: torch.uint8, torch.bfloat16: torch.int64, torch.float16: torch.float32}[dtype]
    layout = {torch.float64: "strided", torch.float32: "channels_last", torch.bfloat16: "channels_last", torch.float16: "strided"}[dtype]
    given = Input(dtype=dtype, label_dtype=labels, ignore_index=255 if labels == torch.uint8 else -100, layout=layout)
    hold(given, [entropy(LabelShares(svls_kernel(3, 1.0, 2)), weights=False), MarginPart(0.5, True, 0.2)], per_pixel=per_pixel)


MARGINS = {
    "mbls": MarginPart(1.0, False, 0.25),
    "mbls-squared": MarginPart(1.0, True, 0.25),
    "maxsup": MarginPart(0.0, False, 0.25),
    "acls": MarginPart(0.5, True, 0.1, 0.7, detached=True),
}


@pytest.mark.parametrize("name", MARGINS)
def test_margins(name):
    hold(Input((41,), 4), [MARGINS[name]], per_pixel=name == "mbls")


@pytest.mark.parametrize("name", MARGINS)
def test_tied_logits_share_the_gradient_of_the_largest(name):
    logits = torch.tensor([[3.0, 3.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64, device=DEVICE).unsqueeze(-1)
    labels = torch.zeros(2, 1, dtype=torch.long, device=DEVICE)
    expected, found = (evaluate(f, logits, labels, [MARGINS[name]], ignore_index=-100) for f in (label_losses, fused))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("kernel", [mean_kernel(3, 2), gaussian_kernel(3, 1.0, 2), None], ids=["mean", "gaussian", "label"])
def test_neighbour_penalty(distance, kernel):
    border = "zeros" if distance == "l2" else "replicate"
    hold(Input(batch=1), [NeighbourPart(LabelShares(kernel, border), distance)], per_pixel=distance == "l2")


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(
    "shares", [LabelShares(), LabelShares(svls_kernel(3, 1.0, 1), "zeros"), LabelShares(smoothing=0.4)], ids=["label", "svls", "smooth"]
)
def test_overlap(norm, shares):
    hold(Input((41,)), [OverlapPart(shares, norm)])


def test_all_parts_in_one_launch(monkeypatch):
    from densecal.ops.triton import label_losses as module

    shares = LabelShares(svls_kernel(3, 1.0, 2))
    parts = [entropy(shares), OverlapPart(shares), NeighbourPart(LabelShares(mean_kernel(3, 2))), MARGINS["acls"]]
    launches = []
    run = module._Launch.run
    monkeypatch.setattr(module._Launch, "run", lambda self, *args: launches.append(self) or run(self, *args))
    hold(Input((4, 3), batch=1), parts)
    assert len(launches) == 1
    # A second part of a kind, or an overlap with another target, takes another launch.
    launches.clear()
    hold(Input((7,), batch=1), [entropy(LabelShares()), OverlapPart(LabelShares(smoothing=0.1)), MARGINS["mbls"], MARGINS["acls"]])
    assert len(launches) == 2


def test_many_classes_over_several_programs(monkeypatch):
    from densecal.ops.triton import label_losses as module

    monkeypatch.setattr(module, "BLOCK", 32)
    shares = LabelShares(svls_kernel(3, 1.0, 1))
    hold(Input((41,), 17, batch=1), [entropy(shares, False, 17), OverlapPart(shares)])


@pytest.mark.parametrize("upwards", [True, False], ids=["up", "down"])
def test_a_boundary_between_programs(monkeypatch, upwards):
    """Pixels of one class whose windows reach the other one in another program."""
    from densecal.ops.triton import label_losses as module

    monkeypatch.setattr(module, "BLOCK", 4)
    logits, _ = Input((8,), 2, batch=1).make()
    labels = (torch.arange(8, device=DEVICE).unsqueeze(0) < 4) != upwards
    part = CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 1)))
    expected, found = (evaluate(f, logits, labels.long(), [part], ignore_index=-100) for f in (label_losses, fused))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


MANY = LabelShares(svls_kernel(3, 1.0, 1))
ZEROS = LabelShares(svls_kernel(3, 1.0, 1), "zeros")


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        (True, [entropy(MANY, False, 17), OverlapPart(MANY)]),
        (True, [OverlapPart(LabelShares())]),
        (False, [entropy(MANY, True, 17)]),
        (False, [entropy(ZEROS, False, 17)]),
        (False, [entropy(MANY, False, 17), MARGINS["mbls"]]),
        (False, [NeighbourPart(MANY)]),
    ],
    ids=["plain", "overlap", "weights", "zeros", "margin", "neighbour"],
)
def test_log_sum_exp_is_kept_where_it_is_all_that_the_gradient_takes(kept, parts):
    from densecal.ops.triton import label_losses as module

    given = Input((7,), 17, batch=1)
    launch = module._Launch(-100, False)
    for part in parts:
        launch.add(part)
    assert module._Call(launch, *given.make()).kept == kept
    hold(given, parts)


def test_wide_offsets(monkeypatch):
    """Offsets in 64 bits, as for images beyond 2^31 elements."""
    from densecal.ops.triton import layout

    monkeypatch.setattr(layout, "_FARTHEST", 0)
    hold(Input(layout="channels_last"), [entropy(LabelShares(mean_kernel(3, 2))), MARGINS["mbls"]])


def test_nothing_at_an_ignored_pixel_has_influence():
    logits, labels = Input((7,), batch=1).make()
    labels[0, :4] = -100
    junk = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE)
    shares = LabelShares(svls_kernel(3, 1.0, 1))
    parts = [entropy(shares), OverlapPart(shares), MARGINS["acls"], NeighbourPart(LabelShares())]
    dirty = torch.where((labels == -100).unsqueeze(1), junk, logits)
    clean, found = (evaluate(fused, z, labels, parts, ignore_index=-100) for z in (logits, dirty))
    torch.testing.assert_close(found, clean, rtol=0, atol=0)


def test_no_valid_pixel_is_zero_with_zero_gradient():
    logits, labels = Input((7,)).make()
    parts = [entropy(LabelShares(mean_kernel(3, 1))), MARGINS["mbls"], OverlapPart(LabelShares())]
    values, gradient = evaluate(fused, logits, torch.full_like(labels, -100), parts, ignore_index=-100)
    assert not any(value.any() for value in values)
    assert not gradient.any()


def test_no_pixel_at_all():
    logits = torch.zeros(2, 3, 0, device=DEVICE, requires_grad=True)
    (result,) = fused(logits, torch.zeros(2, 0, dtype=torch.long, device=DEVICE), [entropy(LabelShares())], ignore_index=-100)
    result.values.backward()
    assert result.values.item() == result.count.item() == 0.0


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_label_that_is_no_class_makes_the_loss_nan(wrong):
    logits, labels = Input((7,)).make()
    labels[1, 3] = wrong
    parts = [entropy(LabelShares(mean_kernel(3, 1))), MARGINS["mbls"], NeighbourPart(LabelShares()), OverlapPart(LabelShares())]
    *losses, overlap = fused(logits, labels, parts, ignore_index=-100)
    assert all(loss.values.isnan() for loss in losses)
    assert isinstance(overlap, OverlapCounts)
    assert overlap.tp[1].isnan().all()
    assert not overlap.tp[0].isnan().any()


def test_ignore_index_may_be_a_class_number():
    hold(Input((41,), batch=1, ignore_index=1), [entropy(LabelShares(mean_kernel(3, 1))), NeighbourPart(LabelShares(mean_kernel(5, 1), "zeros"))])


def test_the_same_bits_twice(monkeypatch):
    from densecal.ops.triton import label_losses as module

    monkeypatch.setattr(module, "BLOCK", 16)
    logits, labels = Input((41,), 2, batch=1, dtype=torch.float32).make()
    parts = [entropy(shares := LabelShares(smoothing=0.1), num_classes=2), MARGINS["acls"], OverlapPart(shares)]
    first, second = (evaluate(fused, logits, labels, parts, ignore_index=-100) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradient_is_the_derivative():
    logits, labels = Input((3,), 2, batch=1).make()
    shares = LabelShares(mean_kernel(3, 1))
    parts = [entropy(shares, num_classes=2), OverlapPart(shares, "l2"), MarginPart(0.5, True, 0.3, 0.7)]
    function = lambda z: tuple(numbers(fused(z, labels, parts, ignore_index=-100)))  # noqa: E731
    assert torch.autograd.gradcheck(
        lambda z: [n for n in function(z) if n.requires_grad], logits.requires_grad_(), eps=1e-4, atol=1e-5, fast_mode=True
    )


def test_overlaps_have_no_value_per_pixel():
    logits, labels = Input((7,)).make()
    for function in (fused, label_losses):
        with pytest.raises(NotCovered, match="no value per pixel"):
            function(logits, labels, [OverlapPart(LabelShares())], ignore_index=-100, per_pixel=True)


def test_ignore_index_beyond_32_bits_is_not_covered():
    logits, labels = Input((7,)).make()
    with pytest.raises(NotCovered, match="does not fit 32 bits"):
        fused(logits, labels, [entropy(LabelShares())], ignore_index=2**40)
