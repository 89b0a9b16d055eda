r"""What :func:`densecal.ops.label_losses.label_losses` computes, on a CPU, in slabs of pixels that stay in the cache.

A distribution is :math:`a\, \delta_y + b` but at the pixels where it is not, whose shares are kept (:class:`densecal.ops.label_windows.LabelWindows`).
So a loss is a pass over the logits that is the same for all classes, and corrections at the labels and at those pixels
(:mod:`densecal.ops.slab_parts`).

Where it is known in advance what the sums will be multiplied by, because they are added up to one number, the same visit writes their gradient; the
backward pass then has nothing to do, or to multiply by a number. Else it visits the slabs once more. Either way the gradient is the only tensor of the
logits' size, unless labels are so mixed that every pixel has its shares and a second visit needs them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, NeighbourPart, OverlapCounts, OverlapPart, Part, PixelLoss, check_parts
from densecal.ops.label_losses import label_losses as dense_losses
from densecal.ops.label_windows import LabelWindows, boxes, encode_labels
from densecal.ops.neighbourhood import mean_kernel
from densecal.ops.slab_parts import Factor, Piece, Slab, SlabPart, View, slab_part

__all__ = ["Objective", "check_part", "label_losses", "label_shares"]

Objective: TypeAlias = Callable[[Sequence[PixelLoss]], Tensor]
"""From the results of :func:`label_losses` to the number whose gradient will be wanted."""

_SLAB = 2**20
"""Logits of a slab, 4 MiB in single precision: enough to make the time to call an operation small, and few enough for a cache."""

_PIXELS = 2**17
"""Pixels of a slab at most, as with few classes numbers per pixel are what fills the cache."""

_PLANES = 8
"""Pixels along the first axis that a slab has where windows are smoothed box by box, as it needs ``size - 1`` more of them."""

_NOTHING = torch.empty(0)


def label_losses(
    logits: Tensor,
    labels: Tensor,
    parts: Sequence[Part],
    *,
    ignore_index: int,
    per_pixel: bool = False,
    objective: Objective | None = None,
) -> list[PixelLoss | OverlapCounts]:
    """As :func:`densecal.ops.label_losses.label_losses`, on a CPU.

    Args:
        logits: ``(N, C, *spatial)``, floating.
        labels: ``(N, *spatial)``: classes in [0, C) or ``ignore_index``.
        parts: What to compute.
        ignore_index: Label of pixels that do not count.
        per_pixel: One value per pixel.
        objective: What will be done with the results. It saves the second visit; where something else is done with them, the gradient is
            right all the same.

    Raises:
        NotCovered: If tensors are elsewhere, neighbours' shares are smoothed, or overlaps are wanted per pixel.

    Example:
        >>> (ce,) = label_losses(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 1]]), [CrossEntropyPart(LabelShares())], ignore_index=255)
        >>> ce.values / ce.count
        tensor(0.6931)
    """
    check_parts(parts, per_pixel)
    if logits.device.type != "cpu":
        raise NotCovered(f"tensors are on {logits.device.type!r}, and slabs are for a CPU")
    for part in parts:
        check_part(part)
    work = _Work(logits, labels, parts, ignore_index, per_pixel)
    slopes = None
    if objective is not None and work.differentiable and not per_pixel and not any(isinstance(part, OverlapPart) for part in parts):
        slopes = _expected_slopes(objective, [work.count(part) for part in parts])
    outputs = iter(_LabelLosses.apply(logits, work, slopes))
    results: list[PixelLoss | OverlapCounts] = []
    for number, part in enumerate(parts):
        if isinstance(part, OverlapPart):
            p, distance = next(outputs), next(outputs)
            q, largest = work.target_sums[number]
            tp = (p + q - distance) / 2
            results.append(OverlapCounts(tp, p - tp, q - tp, largest))
        else:
            results.append(PixelLoss(next(outputs), work.count(part)))
    return results


def check_part(part: Part) -> None:
    """Refuse what is not computed in slabs.

    Raises:
        NotCovered: If neighbours' shares are smoothed.
    """
    if isinstance(part, NeighbourPart) and (isinstance(part.shares.smoothing, Tensor) or part.shares.smoothing != 0):
        raise NotCovered("there are no slabs for neighbours' shares that are smoothed")


def label_shares(labels: Tensor, num_classes: int, shares: LabelShares, *, ignore_index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The distribution ``(N, C, *spatial)`` itself, 0 where not valid, with nothing else of its size.

    Args:
        labels: ``(N, *spatial)`` on a CPU: classes in [0, C) or ``ignore_index``, any integer type.
        num_classes: C.
        shares: What it is.
        ignore_index: Label of pixels to leave out.
        dtype: Floating type.

    Example:
        >>> label_shares(torch.tensor([[0, 1, 9]]), 2, LabelShares(smoothing=0.5), ignore_index=9)[0]
        tensor([[0.7500, 0.2500, 0.0000],
                [0.2500, 0.7500, 0.0000]])
    """
    codes, valid = encode_labels(labels, num_classes, ignore_index)
    distribution = _Distribution(codes, valid, num_classes, shares, dtype, keep=False)
    result = torch.empty(labels.shape[0], num_classes, math.prod(labels.shape[1:]), dtype=dtype)
    for slab in _slabs(codes, valid, num_classes, _PLANES if distribution.is_dense else 1):
        piece, out = distribution.of(slab), result[slab.image, :, slab.start : slab.stop]
        if piece.index is None:
            out.copy_(piece.rows)
        else:
            out.fill_(piece.even).scatter_(0, slab.label, piece.even + piece.hard)
            out.scatter_(1, piece.columns(num_classes), piece.rows)
        if slab.ignored is not None:
            out.masked_fill_(slab.ignored, 0.0)
    return result.unflatten(2, labels.shape[1:])


def _slabs(codes: Tensor, valid: Tensor | None, num_classes: int, planes: int, classes: Tensor | None = None) -> Iterator[Slab]:
    spatial = tuple(codes.shape[1:])
    size = max(1, min(_SLAB // num_classes, _PIXELS))
    # Unless planes are so large that those would not stay in a cache of any size.
    if planes > 1 and planes * math.prod(spatial[1:]) <= 16 * size:
        size = max(size, planes * math.prod(spatial[1:]))
    number = 0
    for image in range(codes.shape[0]):
        flat, inside = (codes if classes is None else classes)[image].flatten(), None if valid is None else valid[image].flatten()
        for start, stop, box in boxes(spatial, size):
            label, ignored = flat[start:stop].long(), None
            if inside is not None and not bool(inside[start:stop].all()):
                ignored = ~inside[start:stop]
                label.masked_fill_(ignored, 0)
            yield Slab(number, image, start, stop, box, label[None], ignored)
            number += 1


class _Distribution:
    """A :class:`LabelShares` on a label map. ``keep``: whether shares are asked for again, by a second visit."""

    def __init__(self, codes: Tensor, valid: Tensor | None, num_classes: int, shares: LabelShares, dtype: torch.dtype, *, keep: bool) -> None:
        self.codes, self.num_classes, self.dtype, self.keep = codes.flatten(1), num_classes, dtype, keep
        has_ignored = valid is not None
        smoothing = torch.as_tensor(shares.smoothing, dtype=torch.float64).flatten()
        self.smoothing: list[float] = smoothing.expand(codes.shape[0]).tolist() if smoothing.numel() == 1 else smoothing.tolist()
        self.windows: LabelWindows | None = None
        special: Tensor | None = None
        if shares.kernel is not None:
            self.windows = LabelWindows(codes, num_classes, shares.kernel, shares.border, has_ignored=has_ignored, dtype=dtype)
            special = self.windows.mixed
        self.boundary: Tensor | None = None
        if shares.boundary is not None:
            self.boundary = _boundary(codes, valid, num_classes, shares.boundary)
            special = self.boundary if special is None else special | self.boundary
        self.whole = shares.kernel is None or shares.border != "zeros"
        self.is_dense = self.windows is not None and self.windows.dense
        self.special = None if special is None else special.flatten(1)
        self.boundary = None if self.boundary is None else self.boundary.flatten(1)
        self._nowhere, self._no_rows = torch.empty(0, dtype=torch.int64), torch.empty(num_classes, 0, dtype=dtype)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        """By number of the slab its shares or, where they are few, by number of the image the pixels that have their own and those."""

    def of(self, slab: Slab) -> Piece:
        share = self.smoothing[slab.image]
        if self.special is None:
            return Piece(1.0 - share, share / self.num_classes, self._nowhere, self._no_rows, True)
        elsewhere = 0.0 if self.boundary is not None else share
        make, number = (self._all, slab.number) if self.is_dense else (self._special, slab.image)
        if number not in self.kept:
            if not self.keep:
                self.kept.clear()
            self.kept[number] = make(slab)
        pixels, rows = self.kept[number]
        index: Tensor | None = None
        if not self.is_dense:
            first, last = torch.searchsorted(pixels, torch.tensor([slab.start, slab.stop])).tolist()
            index, rows = pixels[first:last] - slab.start, rows[:, first:last]
        return Piece(1.0 - elsewhere, elsewhere / self.num_classes, index, rows, self.whole)

    def _all(self, slab: Slab) -> tuple[Tensor, Tensor]:
        assert self.windows is not None
        return _NOTHING, self._smooth(slab.image, self.windows.over(slab.image, slab.box), slice(slab.start, slab.stop))

    def _special(self, slab: Slab) -> tuple[Tensor, Tensor]:
        assert self.special is not None
        pixels = self.special[slab.image].nonzero().flatten()
        if self.windows is not None:
            rows = self.windows.at(slab.image, pixels)
        else:
            labels = self.codes[slab.image].index_select(0, pixels).long()[None]
            rows = torch.zeros(self.num_classes, pixels.shape[0], dtype=self.dtype).scatter_(0, labels, 1.0)
        return pixels, self._smooth(slab.image, rows, pixels)

    def _smooth(self, image: int, rows: Tensor, pixels: Tensor | slice) -> Tensor:
        share: float | Tensor = self.smoothing[image]
        if share == 0.0:
            return rows
        if self.boundary is not None:
            share = share * self.boundary[image, pixels].to(self.dtype)
        return rows * (1.0 - share) + share / self.num_classes


def _boundary(codes: Tensor, valid: Tensor | None, num_classes: int, size: tuple[int, ...]) -> Tensor:
    """Pixels whose window holds another label and no ignored pixel."""
    windows = LabelWindows(codes, num_classes, mean_kernel(size, len(size)), "replicate", has_ignored=valid is not None, dtype=torch.float32)
    return windows.mixed if valid is None else windows.mixed & ~windows.near_ignored()


class _Work:
    """What both passes need to know."""

    def __init__(self, logits: Tensor, labels: Tensor, parts: Sequence[Part], ignore_index: int, per_pixel: bool) -> None:
        self.given, self.labels, self.ignore_index, self.per_pixel = parts, labels, ignore_index, per_pixel
        self.num_images, self.num_classes, *self.spatial = logits.shape
        self.num_pixels = math.prod(self.spatial)
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.differentiable = logits.requires_grad and torch.is_grad_enabled()
        self.codes, self.valid = encode_labels(labels, self.num_classes, ignore_index)
        # Classes as PyTorch's own functions index by them, where the labels are such already.
        self.classes = labels if labels.dtype == torch.int64 and self.valid is None and labels.is_contiguous() else None
        self.target_sums: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, *, keep: bool) -> None:
        """Look at the labels. ``keep``: for a second visit."""
        made: dict[int, _Distribution] = {}

        def distribution(shares: LabelShares) -> _Distribution:
            if id(shares) not in made:
                made[id(shares)] = _Distribution(self.codes, self.valid, self.num_classes, shares, self.dtype, keep=keep)
            return made[id(shares)]

        self.parts = [slab_part(part, self.num_images, self.num_classes, self.dtype) for part in self.given]
        self.sources = [distribution(part.shares) if hasattr(part, "shares") else None for part in self.given]
        self.distributions = list(made.values())

    def visit(self, logits: Tensor) -> Iterator[tuple[Slab, View, list[tuple[SlabPart, Piece | None]]]]:
        """Each slab with its logits, and the parts with their distributions there."""
        z = logits.flatten(2)
        dense = any(distribution.is_dense for distribution in self.distributions)
        buffers = [_Buffer(self.dtype) for _ in range(3)]
        for slab in _slabs(self.codes, self.valid, self.num_classes, _PLANES if dense else 1, self.classes):
            here = z[slab.image, :, slab.start : slab.stop].to(self.dtype)
            view = View(slab, here, *(buffer.like(here) for buffer in buffers))
            yield slab, view, [(part, None if source is None else source.of(slab)) for part, source in zip(self.parts, self.sources, strict=True)]

    @functools.cached_property
    def _class_counts(self) -> Tensor:
        return torch.bincount(self.codes.flatten(), minlength=self.num_classes)[: self.num_classes]

    def count(self, part: Part) -> Tensor:
        if isinstance(part, CrossEntropyPart) and part.class_weights is not None:
            return (part.class_weights.detach().double() * self._class_counts).sum().to(self.dtype)
        number = self.codes.numel() if self.valid is None else int(torch.count_nonzero(self.valid))
        return torch.tensor(float(number), dtype=self.dtype)


class _Buffer:
    """Memory for intermediate values, used again for every slab: a fresh tensor would be cleared by the system each time."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.values = torch.empty(0, dtype=dtype)

    def like(self, values: Tensor) -> Tensor:
        if self.values.numel() < values.numel():
            self.values = self.values.new_empty(values.numel())
        return self.values[: values.numel()].view(values.shape)


class _Gradient:
    """The gradient for the logits, written slab by slab."""

    def __init__(self, logits: Tensor, work: _Work) -> None:
        self.values = torch.empty(logits.shape[0], logits.shape[1], work.num_pixels, dtype=logits.dtype)
        self._wide = _Buffer(work.dtype)
        self._spatial = work.spatial

    def write(self, slab: Slab, view: View, parts: Sequence[tuple[SlabPart, Piece | None]], factors: Sequence[Factor]) -> None:
        out = self.values[slab.image, :, slab.start : slab.stop]
        total = out if out.dtype == view.here.dtype else self._wide.like(view.here)
        scale: Tensor | float | None = None
        for (part, piece), factor in zip(parts, factors, strict=True):
            if (more := part.softmax_share(view, piece, factor)) is not None:
                scale = more if scale is None else scale + more
        if scale is None:
            total.zero_()
        else:
            view.write_softmax(total, scale)
        at_labels: Tensor | None = None
        for (part, piece), factor in zip(parts, factors, strict=True):
            if (change := part.add_gradient(total, view, piece, factor)) is not None:
                at_labels = change if at_labels is None else at_labels.add_(change)
        if at_labels is not None:
            total.scatter_add_(0, slab.label, at_labels)
        if slab.ignored is not None:
            total.masked_fill_(slab.ignored, 0.0)
        if total is not out:
            out.copy_(total)

    def done(self) -> Tensor:
        return self.values.unflatten(2, self._spatial)


class _LabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Work, slopes: list[float] | None) -> tuple[Tensor, ...]:
        ctx.work = work
        work.prepare(keep=work.differentiable and slopes is None)
        gradient: _Gradient | None = None
        if slopes is not None:
            # Below single precision small numbers would vanish; what is missing is multiplied by afterwards.
            ctx.slopes, ctx.unit = slopes, 1.0 if logits.dtype == work.dtype else max(map(abs, slopes)) or 1.0
            gradient, factors = _Gradient(logits, work), [slope / ctx.unit for slope in slopes]
        per_pixel = (work.num_images, work.num_pixels) if work.per_pixel else None
        for part in work.parts:
            part.begin(per_pixel)
        for slab, view, parts in work.visit(logits):
            for part, piece in parts:
                part.add_value(view, piece)
            if gradient is not None:
                gradient.write(slab, view, parts, factors)
        ctx.gradient = gradient
        # Through autograd, which lets go of them after the backward pass.
        ctx.kept = [list(distribution.kept) for distribution in work.distributions]
        ctx.save_for_backward(logits, *(tensor for d in work.distributions for pair in d.kept.values() for tensor in pair))
        for distribution in work.distributions:
            distribution.kept = {}
        work.target_sums = {number: sums for number, part in enumerate(work.parts) if (sums := part.target_sums()) is not None}
        values = [value for part in work.parts for value in part.hand_over()]
        return tuple(value.unflatten(1, work.spatial) if work.per_pixel else value for value in values)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        logits, *kept = ctx.saved_tensors
        work: _Work = ctx.work
        if torch.is_grad_enabled():  # there will be a second derivative, which the dense form has
            return torch.autograd.grad(_dense_values(logits, work), logits, slopes, create_graph=True)[0], None, None
        made, ctx.gradient = ctx.gradient, None
        if made is not None and (factor := _common_factor([slope.item() for slope in slopes], ctx.slopes)) is not None:
            gradient = made.done()
            return gradient if factor * ctx.unit == 1.0 else gradient.mul_(factor * ctx.unit), None, None
        tensors = iter(kept)
        for distribution, numbers in zip(work.distributions, ctx.kept, strict=True):
            distribution.kept = {number: (next(tensors), next(tensors)) for number in numbers}
        given = iter(slopes)
        taken = [[next(given) for _ in range(part.num_values)] for part in work.parts]
        gradient = _Gradient(logits, work)
        for slab, view, parts in work.visit(logits):
            gradient.write(slab, view, parts, [part.factor(slab, its) for part, its in zip(work.parts, taken, strict=True)])
        for distribution in work.distributions:
            distribution.kept = {}
        return gradient.done(), None, None


def _dense_values(logits: Tensor, work: _Work) -> list[Tensor]:
    results = dense_losses(logits, work.labels, work.given, ignore_index=work.ignore_index, per_pixel=work.per_pixel)
    return [
        value
        for result in results
        for value in ((result.values,) if isinstance(result, PixelLoss) else (result.tp + result.fp, result.fp + result.fn))
    ]


def _expected_slopes(objective: Objective, counts: Sequence[Tensor]) -> list[float]:
    """What the sums of an objective are multiplied by, if it is linear in them."""
    with torch.enable_grad():
        values = [torch.zeros((), dtype=count.dtype, requires_grad=True) for count in counts]
        total = objective([PixelLoss(value, count) for value, count in zip(values, counts, strict=True)])
        slopes = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else [None] * len(values)
    return [0.0 if slope is None else slope.item() for slope in slopes]


def _common_factor(slopes: Sequence[float], expected: Sequence[float]) -> float | None:
    """The number that all expected slopes are off by, None if there is none."""
    largest = max(range(len(expected)), key=lambda i: abs(expected[i]))
    if expected[largest] == 0.0:
        return None
    factor = slopes[largest] / expected[largest]
    if all(abs(slope - factor * other) <= 1e-6 * abs(slope) for slope, other in zip(slopes, expected, strict=True)):
        return factor
    return None
