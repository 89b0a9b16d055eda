r"""What :func:`densecal.ops.label_losses.label_losses` computes, on a CPU, in slabs of pixels that stay in the cache.

With logits z, p = softmax(z), target q, class shares :math:`\tau` and class weights w, :math:`W = \sum_c w_c q_c`:

=============  =====================================================  ==========================================================================
part           value of a pixel                                       gradient for :math:`z_c`
=============  =====================================================  ==========================================================================
cross-entropy  :math:`W \log\sum_c e^{z_c} - \sum_c w_c q_c z_c`      :math:`W p_c - w_c q_c`
neighbour      :math:`\frac1C \sum_c |\tau_c - z_c|^d`                :math:`\frac1C \mathrm{sign}(z_c - \tau_c)`, :math:`\frac2C (z_c - \tau_c)`
=============  =====================================================  ==========================================================================

A distribution is :math:`a\, \delta_y + b` but at the pixels where it is not, whose shares are kept (:class:`densecal.ops.label_windows.LabelWindows`).
So a pass over the logits is that of plain cross-entropy, and a correction at those pixels. The forward pass keeps the log-sum-exp, one number per
pixel, and those shares; the backward pass writes the gradient of all parts into one new tensor, the only one of the logits' size unless labels are so
mixed that every pixel has its shares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, NeighbourPart, OverlapCounts, Part, PixelLoss, check_parts
from densecal.ops.label_losses import label_losses as dense_losses
from densecal.ops.label_windows import Box, LabelWindows, boxes, encode_labels
from densecal.ops.neighbourhood import mean_kernel

__all__ = ["check_part", "label_losses", "label_shares"]

_SLAB = 2**18
"""Logits of a slab, 1 MiB in single precision."""

_NOTHING = torch.empty(0)

_PLANES = 8
"""Pixels along the first axis that a slab has at least where windows are smoothed box by box, as it needs ``size - 1`` more of them."""


def label_losses(
    logits: Tensor, labels: Tensor, parts: Sequence[Part], *, ignore_index: int, per_pixel: bool = False
) -> list[PixelLoss | OverlapCounts]:
    """As :func:`densecal.ops.label_losses.label_losses`, for cross-entropy and neighbour parts on a CPU.

    Raises:
        NotCovered: If there is another part, or tensors are elsewhere.

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
    known = cast("Sequence[CrossEntropyPart | NeighbourPart]", parts)
    work = _Work(logits, labels, known, ignore_index)
    values = _LabelLosses.apply(logits, work, per_pixel)
    return [PixelLoss(value, work.count(part)) for part, value in zip(known, values, strict=True)]


def check_part(part: Part) -> None:
    """Refuse what is not computed in slabs.

    Raises:
        NotCovered: If the part is none of cross-entropy and neighbours, or the neighbours' shares are smoothed.
    """
    if not isinstance(part, (CrossEntropyPart, NeighbourPart)):
        raise NotCovered(f"there are no slabs for {type(part).__name__}")
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
            out.scatter_(1, piece.spread(num_classes), piece.rows)
        if slab.ignored is not None:
            out.masked_fill_(slab.ignored, 0.0)
    return result.unflatten(2, labels.shape[1:])


@dataclass(frozen=True, eq=False)
class _Slab:
    """Pixels ``start`` to ``stop`` of an image, which are a box of it; their labels ``(1, L)``, 0 where ``ignored`` ``(L,)``, None for nowhere."""

    number: int
    image: int
    start: int
    stop: int
    box: Box
    label: Tensor
    ignored: Tensor | None


def _slabs(codes: Tensor, valid: Tensor | None, num_classes: int, planes: int, classes: Tensor | None = None) -> Iterator[_Slab]:
    spatial = tuple(codes.shape[1:])
    size = max(_SLAB // num_classes, planes * math.prod(spatial[1:]) if planes > 1 else 1)
    number = 0
    for image in range(codes.shape[0]):
        flat, inside = (codes if classes is None else classes)[image].flatten(), None if valid is None else valid[image].flatten()
        for start, stop, box in boxes(spatial, size):
            label, ignored = flat[start:stop].long(), None
            if inside is not None and not bool(inside[start:stop].all()):
                ignored = ~inside[start:stop]
                label.masked_fill_(ignored, 0)
            yield _Slab(number, image, start, stop, box, label[None], ignored)
            number += 1


@dataclass(frozen=True, eq=False)
class _Piece:
    """A distribution over a slab: ``hard`` on the label plus ``even`` on each class but at the pixels ``index``, which have ``rows`` ``(C, M)``.

    Where ``index`` is None, all pixels have ``rows``. ``whole``: whether shares sum to 1 at every valid pixel.
    """

    hard: float
    even: float
    index: Tensor | None
    rows: Tensor
    whole: bool

    def spread(self, rows: int) -> Tensor:
        """The index as ``gather`` and ``scatter`` take it for M columns of that many rows."""
        assert self.index is not None
        return self.index.expand(rows, -1)


class _Distribution:
    """A :class:`LabelShares` on a label map. ``keep``: whether slabs are asked for again, by a backward pass."""

    def __init__(self, codes: Tensor, valid: Tensor | None, num_classes: int, shares: LabelShares, dtype: torch.dtype, *, keep: bool) -> None:
        self.num_classes, self.dtype, self.keep = num_classes, dtype, keep
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
        self.kept: dict[int, _Piece] = {}

    def of(self, slab: _Slab) -> _Piece:
        share = self.smoothing[slab.image]
        if self.special is None:
            return _Piece(1.0 - share, share / self.num_classes, self._nowhere, self._no_rows, True)
        if slab.number in self.kept:
            return self.kept[slab.number]
        elsewhere = 0.0 if self.boundary is not None else share
        index: Tensor | None = None
        if self.is_dense:
            assert self.windows is not None
            rows = self.windows.over(slab.image, slab.box)
        else:
            index = self.special[slab.image, slab.start : slab.stop].nonzero().flatten()
            if self.windows is not None:
                rows = self.windows.at(slab.image, index + slab.start)
            else:
                rows = torch.zeros(self.num_classes, index.shape[0], dtype=self.dtype).scatter_(0, slab.label[:, index], 1.0)
        piece = _Piece(1.0 - elsewhere, elsewhere / self.num_classes, index, self._smooth(slab, rows, index), self.whole)
        if self.keep:
            self.kept[slab.number] = piece
        return piece

    def _smooth(self, slab: _Slab, rows: Tensor, index: Tensor | None) -> Tensor:
        share: float | Tensor = self.smoothing[slab.image]
        if share == 0.0:
            return rows
        if self.boundary is not None:
            mask = self.boundary[slab.image, slab.start : slab.stop]
            share = share * (mask if index is None else mask[index]).to(self.dtype)
        return rows * (1.0 - share) + share / self.num_classes


def _boundary(codes: Tensor, valid: Tensor | None, num_classes: int, size: tuple[int, ...]) -> Tensor:
    """Pixels whose window holds another label and no ignored pixel."""
    windows = LabelWindows(codes, num_classes, mean_kernel(size, len(size)), "replicate", has_ignored=valid is not None, dtype=torch.float32)
    return windows.mixed if valid is None else windows.mixed & ~windows.near_ignored()


class _Work:
    """What both passes need to know."""

    def __init__(self, logits: Tensor, labels: Tensor, parts: Sequence[CrossEntropyPart | NeighbourPart], ignore_index: int) -> None:
        self.parts, self.labels, self.ignore_index = parts, labels, ignore_index
        self.num_classes = logits.shape[1]
        self.spatial = logits.shape[2:]
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self.codes, self.valid = encode_labels(labels, self.num_classes, ignore_index)
        # Classes as PyTorch's own functions index by them, where the labels are such already.
        self.classes = labels if labels.dtype == torch.int64 and self.valid is None and labels.is_contiguous() else None
        keep = logits.requires_grad and torch.is_grad_enabled()
        made: dict[int, _Distribution] = {}
        for part in parts:
            if id(part.shares) not in made:
                made[id(part.shares)] = _Distribution(self.codes, self.valid, self.num_classes, part.shares, self.dtype, keep=keep)
        self.unique = list(made.values())
        self.distributions = [made[id(part.shares)] for part in parts]
        self.weights = [self._weights(part) for part in parts]

    def _weights(self, part: CrossEntropyPart | NeighbourPart) -> Tensor | None:
        if not isinstance(part, CrossEntropyPart) or part.class_weights is None:
            return None
        return part.class_weights.detach().to(self.dtype)[:, None]

    def forget(self) -> None:
        """Let go of the shares that were kept."""
        for distribution in self.unique:
            distribution.kept = {}

    def slabs(self) -> Iterator[_Slab]:
        dense = any(distribution.is_dense for distribution in self.distributions)
        return _slabs(self.codes, self.valid, self.num_classes, _PLANES if dense else 1, self.classes)

    @functools.cached_property
    def _class_counts(self) -> Tensor:
        return torch.bincount(self.codes.flatten(), minlength=self.num_classes)[: self.num_classes]

    def count(self, part: CrossEntropyPart | NeighbourPart) -> Tensor:
        if isinstance(part, CrossEntropyPart) and part.class_weights is not None:
            return (part.class_weights.detach().double() * self._class_counts).sum().to(self.dtype)
        number = self.codes.numel() if self.valid is None else int(torch.count_nonzero(self.valid))
        return torch.tensor(float(number), dtype=self.dtype)


class _LabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Work, per_pixel: bool) -> tuple[Tensor, ...]:
        z, parts = logits.flatten(2), work.parts
        shape = (z.shape[0], z.shape[2])
        comparing = any(isinstance(part, CrossEntropyPart) for part in parts)
        log_sums = torch.empty(shape if comparing else 0, dtype=work.dtype)
        values = [torch.zeros(shape if per_pixel else (), dtype=work.dtype) for _ in parts]
        scratch = [_Scratch(work.dtype), _Scratch(work.dtype)]
        for slab in work.slabs():
            at = (slab.image, slice(slab.start, slab.stop))
            here = z[slab.image, :, slab.start : slab.stop].to(work.dtype)
            first, second = (buffer.like(here) for buffer in scratch)
            if comparing:
                largest = here.amax(dim=0)
                below = torch.sub(here, largest, out=first)
                log_sum = torch.exp(below, out=second).sum(dim=0).log_()
                torch.add(log_sum, largest, out=log_sums[at])
            for part, distribution, weights, total in zip(parts, work.distributions, work.weights, values, strict=True):
                piece = distribution.of(slab)
                if isinstance(part, CrossEntropyPart):
                    value = _cross_entropy(below, log_sum, slab, piece, weights, second)
                else:
                    value = _distance(here, slab, piece, part.distance, second).div_(work.num_classes)
                if slab.ignored is not None:
                    value.masked_fill_(slab.ignored, 0.0)
                if per_pixel:
                    total[at] = value
                else:
                    total += value.sum()
        # Through autograd, which lets go of them after the backward pass.
        ctx.kept = [{number: replace(piece, index=None, rows=_NOTHING) for number, piece in d.kept.items()} for d in work.unique]
        ctx.save_for_backward(logits, log_sums, *(tensor for d in work.unique for piece in d.kept.values() for tensor in (piece.index, piece.rows)))
        work.forget()
        ctx.work, ctx.per_pixel = work, per_pixel
        return tuple(value.unflatten(1, work.spatial) if per_pixel else value for value in values)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        logits, log_sums, *kept = ctx.saved_tensors
        work: _Work = ctx.work
        if torch.is_grad_enabled():  # there will be a second derivative, which the dense form has
            results = dense_losses(logits, work.labels, work.parts, ignore_index=work.ignore_index, per_pixel=ctx.per_pixel)
            values = [cast(PixelLoss, result).values for result in results]
            return torch.autograd.grad(values, logits, slopes, create_graph=True)[0], None, None
        tensors = iter(kept)
        for distribution, pieces in zip(work.unique, ctx.kept, strict=True):
            distribution.kept = {number: replace(piece, index=next(tensors), rows=next(tensors)) for number, piece in pieces.items()}
        z = logits.flatten(2)
        gradient = torch.empty_like(z)
        factors = [slope.flatten(1) if ctx.per_pixel else slope.item() for slope in slopes]
        scratch, wide = _Scratch(work.dtype), _Scratch(work.dtype)
        for slab in work.slabs():
            at = (slab.image, slice(slab.start, slab.stop))
            here, out = z[slab.image, :, slab.start : slab.stop], gradient[slab.image, :, slab.start : slab.stop]
            total = out if out.dtype == work.dtype else wide.like(here)
            factor = [f[at] if isinstance(f, Tensor) else f for f in factors]
            _gradient(total, here.to(work.dtype), log_sums[at] if log_sums.numel() else None, slab, work, factor, scratch.like(here))
            if slab.ignored is not None:
                total.masked_fill_(slab.ignored, 0.0)
            if total is not out:
                out.copy_(total)
        work.forget()
        return gradient.unflatten(2, work.spatial), None, None


class _Scratch:
    """Memory for intermediate values, used again for every slab: a fresh tensor would be cleared by the system each time."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.buffer = torch.empty(0, dtype=dtype)

    def like(self, values: Tensor) -> Tensor:
        if self.buffer.numel() < values.numel():
            self.buffer = self.buffer.new_empty(values.numel())
        return self.buffer[: values.numel()].view(values.shape)


def _cross_entropy(below: Tensor, log_sum: Tensor, slab: _Slab, piece: _Piece, weights: Tensor | None, scratch: Tensor) -> Tensor:
    """Values ``(L,)`` from the logits less the largest one, and the logarithm of the sum of their exponentials."""
    rows = piece.rows if weights is None else piece.rows * weights
    if piece.index is None:
        share = torch.mul(rows, below, out=scratch).sum(dim=0)
        return log_sum - share if piece.whole and weights is None else log_sum * rows.sum(dim=0) - share
    value = log_sum - below.gather(0, slab.label)[0]
    if weights is not None:
        value *= weights[:, 0].take(slab.label[0])
    if piece.even:
        evenly = log_sum * below.shape[0] - below.sum(dim=0) if weights is None else log_sum * weights.sum() - (below * weights).sum(dim=0)
        value = piece.hard * value + piece.even * evenly
    if piece.index.numel():
        others = (rows * below.gather(1, piece.spread(below.shape[0]))).sum(dim=0)
        value.index_copy_(0, piece.index, log_sum.index_select(0, piece.index) * rows.sum(dim=0) - others)
    return value


def _distance(here: Tensor, slab: _Slab, piece: _Piece, distance: str, scratch: Tensor) -> Tensor:
    """Sums over classes ``(L,)`` of the distance between logits and distribution."""
    measure = torch.abs if distance == "l1" else torch.square
    if piece.index is None:
        gap = torch.sub(here, piece.rows, out=scratch)
        return measure(gap, out=gap).sum(dim=0)
    value = measure(here, out=scratch).sum(dim=0)
    at_label = here.gather(0, slab.label)[0]
    value += measure(at_label - 1.0) - measure(at_label)
    if piece.index.numel():
        value.index_copy_(0, piece.index, measure(here.gather(1, piece.spread(here.shape[0])) - piece.rows).sum(dim=0))
    return value


def _gradient(
    out: Tensor, here: Tensor, log_sum: Tensor | None, slab: _Slab, work: _Work, factors: Sequence[Tensor | float], scratch: Tensor
) -> None:
    """Write the gradient of all parts for the logits of a slab: what all classes have alike, then corrections at labels and at mixed pixels."""
    parts = list(zip(work.parts, [d.of(slab) for d in work.distributions], work.weights, factors, strict=True))
    if log_sum is None:
        out.zero_()
    else:
        scale: Tensor | float = 0.0
        for part, piece, weights, factor in parts:
            if isinstance(part, CrossEntropyPart):
                scale = scale + factor * _total_weight(slab, piece, weights)
        torch.sub(here, log_sum, out=out).exp_().mul_(scale)
    at_labels: Tensor | None = None
    label_logits: Tensor | None = None
    for part, piece, weights, factor in parts:
        if isinstance(part, CrossEntropyPart):
            rows = piece.rows if weights is None else piece.rows * weights
            if piece.index is None:
                _accumulate(out, rows, factor, -1.0)
                continue
            change = piece.hard * (torch.ones_like(slab.label, dtype=out.dtype) if weights is None else weights[:, 0].take(slab.label))
            change *= -factor
            if piece.even:
                even = piece.even if weights is None else piece.even * weights
                out.sub_(even * factor)
                rows = rows - even
            others = rows * -_at(factor, piece.index)
        else:
            slope = torch.sign if part.distance == "l1" else torch.mul
            step = (1.0 if part.distance == "l1" else 2.0) / work.num_classes
            operand = () if part.distance == "l1" else (1.0,)
            if piece.index is None:
                gap = torch.sub(here, piece.rows, out=scratch)
                _accumulate(out, slope(gap, *operand, out=gap), factor, step)
                continue
            _accumulate(out, slope(here, *operand, out=scratch), factor, step)
            if label_logits is None:
                label_logits = here.gather(0, slab.label)
            change = (slope(label_logits - 1.0, *operand) - slope(label_logits, *operand)) * (step * factor)
            there = here.gather(1, piece.spread(here.shape[0]))
            others = (slope(there - piece.rows, *operand) - slope(there, *operand)) * (step * _at(factor, piece.index))
        if piece.index.numel():
            change.index_fill_(1, piece.index, 0.0)
            out.scatter_add_(1, piece.spread(out.shape[0]), others)
        at_labels = change if at_labels is None else at_labels.add_(change)
    if at_labels is not None:
        out.scatter_add_(0, slab.label, at_labels)


def _accumulate(out: Tensor, values: Tensor, factor: Tensor | float, step: float) -> None:
    if isinstance(factor, Tensor):
        out.addcmul_(values, factor, value=step)
    else:
        out.add_(values, alpha=step * factor)


def _at(factor: Tensor | float, index: Tensor) -> Tensor | float:
    return factor.index_select(0, index) if isinstance(factor, Tensor) else factor


def _total_weight(slab: _Slab, piece: _Piece, weights: Tensor | None) -> Tensor | float:
    """Sum over classes of weight times share: a number where it is the same at all pixels."""
    if weights is None and piece.whole:
        return 1.0
    rows = piece.rows if weights is None else piece.rows * weights
    if piece.index is None:
        return rows.sum(dim=0)
    if weights is None:
        total = torch.ones(slab.label.shape[1], dtype=rows.dtype)
    else:
        total = piece.hard * weights[:, 0].take(slab.label[0]) + piece.even * weights.sum()
    return total.index_copy_(0, piece.index, rows.sum(dim=0))
