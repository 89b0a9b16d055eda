r"""Parts of a loss in a slab: their values, and what they add to the gradient for the logits.

With logits z, p = softmax(z), target q, class shares :math:`\tau`, class weights w, :math:`W = \sum_c w_c q_c`, and the slopes a of :math:`\sum_x p`
and b of :math:`\sum_x |p - q|`:

=============  ==========================================================  =====================================================================
part           value of a pixel                                            gradient for :math:`z_c`
=============  ==========================================================  =====================================================================
cross-entropy  :math:`W \log\sum_c e^{z_c} - \sum_c w_c q_c z_c`           :math:`W p_c - w_c q_c`
neighbour      :math:`\frac1C \sum_c |\tau_c - z_c|^d`                     :math:`\frac1C \mathrm{sign}(z_c - \tau_c)`, :math:`\frac2C (z_c - \tau_c)`
margin         :math:`s \sum_c e_c^d + t\, e_{max}^2`,                     :math:`-s\, [e_c > 0]`, :math:`-2 s\, e_c`, and at the largest logit what
               :math:`e_c = (z_{max} - z_c - m)_+`                         these add up to, and :math:`2 t\, e_{max}`, with :math:`e_{max} = (z_{max} - m)_+`
overlap        sums per class of :math:`p`, :math:`q` and :math:`|p - q|`  :math:`p_c (g_c - \sum_k p_k g_k)`, :math:`g_c = a_c + b_c\, \mathrm{sign}(p_c - q_c)`
=============  ==========================================================  =====================================================================

Each is computed as if the distribution were the same ``even`` share for all classes; then where it is ``hard``, at the labels, and at the pixels that
have shares of their own, it is put right.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from densecal.ops.label_losses import CrossEntropyPart, MarginPart, NeighbourPart, OverlapPart, Part
from densecal.ops.label_windows import Box

__all__ = ["Factor", "Piece", "Slab", "SlabPart", "View", "slab_part"]

Factor: TypeAlias = "float | Tensor | tuple[Tensor, Tensor]"
"""What a part's gradient is multiplied by: a number, one per pixel ``(L,)`` or, of overlaps, the slopes ``(C, 1)`` of both sums."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Pixels ``start`` to ``stop`` of an image, which are a box of it; their labels ``(1, L)``, 0 where ``ignored`` ``(L,)``, None for nowhere."""

    number: int
    image: int
    start: int
    stop: int
    box: Box
    label: Tensor
    ignored: Tensor | None


@dataclass(frozen=True, eq=False)
class Piece:
    """A distribution over a slab: ``hard`` on the label plus ``even`` on each class but at the pixels ``index``, which have ``rows`` ``(C, M)``.

    Where ``index`` is None, all pixels have ``rows``. ``whole``: whether shares sum to 1 at every valid pixel.
    """

    hard: float
    even: float
    index: Tensor | None
    rows: Tensor
    whole: bool

    def columns(self, num_classes: int) -> Tensor:
        """The index as ``gather`` and ``scatter`` take it."""
        assert self.index is not None
        return self.index.expand(num_classes, -1)


class View:
    """The logits ``here`` ``(C, L)`` of a slab and what parts share of them, each computed when it is first asked for.

    ``scratch`` is free for whoever holds the view; the other buffers belong to it.
    """

    def __init__(self, slab: Slab, here: Tensor, first: Tensor, second: Tensor, scratch: Tensor) -> None:
        self.slab, self.here, self.scratch = slab, here, scratch
        self._first, self._second = first, second
        self._is_softmax = False
        self._columns: dict[int, Tensor] = {}

    @functools.cached_property
    def largest(self) -> Tensor:
        return self.here.amax(dim=0)

    @functools.cached_property
    def below(self) -> Tensor:
        """The logits less the largest one, so that no exponential overflows and no digits are lost."""
        return torch.sub(self.here, self.largest, out=self._first)

    @functools.cached_property
    def _exponentials(self) -> Tensor:
        return torch.exp(self.below, out=self._second)

    @functools.cached_property
    def _total(self) -> Tensor:
        return self._exponentials.sum(dim=0)

    @functools.cached_property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum of exponentials of :attr:`below`."""
        return self._total.log()

    @property
    def softmax(self) -> Tensor:
        if not self._is_softmax:
            self._exponentials.mul_(self._total.reciprocal())
            self._is_softmax = True
        return self._exponentials

    def write_softmax(self, out: Tensor, scale: Tensor | float) -> None:
        """``scale`` times the softmax."""
        if not self._is_softmax:
            scale = scale / self._total
        torch.mul(self._exponentials, scale, out=out)

    @functools.cached_property
    def label_logit(self) -> Tensor:
        return self.here.gather(0, self.slab.label)[0]

    def logits_of(self, piece: Piece) -> Tensor:
        """Logits ``(C, M)`` at the pixels that have shares of their own."""
        if id(piece.index) not in self._columns:
            self._columns[id(piece.index)] = self.here.gather(1, piece.columns(self.here.shape[0]))
        return self._columns[id(piece.index)]


class SlabPart:
    """A part of the loss: its value summed up slab by slab, and its gradient."""

    num_values = 1

    def begin(self, per_pixel: tuple[int, int] | None) -> None:
        """Values start at 0; ``per_pixel`` is their shape ``(N, pixels)``, None for a sum."""
        raise NotImplementedError

    def add_value(self, view: View, piece: Any) -> None:
        raise NotImplementedError

    def hand_over(self) -> tuple[Tensor, ...]:
        """What can be differentiated, and is kept no longer: a part that held on to its values would hold on to the graph behind them, and the graph to it."""
        raise NotImplementedError

    def target_sums(self) -> tuple[Tensor, Tensor] | None:
        """Sums of the target's shares, and the largest of them, per image and class; None where nobody asks."""
        return None

    def factor(self, slab: Slab, slopes: Sequence[Tensor]) -> Factor:
        """What the gradient of a slab is multiplied by, from the gradients of the values."""
        raise NotImplementedError

    def softmax_share(self, view: View, piece: Any, factor: Any) -> Tensor | float | None:
        """What the softmax is multiplied by in the gradient, None if it does not occur by itself."""
        return None

    def add_gradient(self, out: Tensor, view: View, piece: Any, factor: Any) -> Tensor | None:
        """Add the rest of the gradient to ``out`` but for a change ``(1, L)`` at the labels, which is returned."""
        raise NotImplementedError


def slab_part(part: Part, num_images: int, num_classes: int, dtype: torch.dtype) -> SlabPart:
    """How a part is computed."""
    if isinstance(part, CrossEntropyPart):
        return _CrossEntropy(part, dtype)
    if isinstance(part, NeighbourPart):
        return _Neighbour(part, dtype)
    if isinstance(part, MarginPart):
        return _Margin(part, dtype)
    return _Overlap(part, num_images, num_classes, dtype)


class _PixelPart(SlabPart):
    """One number per pixel ``(L,)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def begin(self, per_pixel: tuple[int, int] | None) -> None:
        self._values = torch.zeros(per_pixel or (), dtype=self.dtype)

    def add_value(self, view: View, piece: Any) -> None:
        value, slab = self.value(view, piece), view.slab
        if slab.ignored is not None:
            value.masked_fill_(slab.ignored, 0.0)
        if self._values.ndim:
            self._values[slab.image, slab.start : slab.stop] = value
        else:
            self._values += value.sum()

    def value(self, view: View, piece: Any) -> Tensor:
        raise NotImplementedError

    def hand_over(self) -> tuple[Tensor, ...]:
        values = self._values
        del self._values
        return (values,)

    def factor(self, slab: Slab, slopes: Sequence[Tensor]) -> Factor:
        (slope,) = slopes
        return slope.flatten(1)[slab.image, slab.start : slab.stop] if slope.ndim else slope.item()


class _CrossEntropy(_PixelPart):
    def __init__(self, part: CrossEntropyPart, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.weights = None if part.class_weights is None else part.class_weights.detach().to(dtype)[:, None]

    def value(self, view: View, piece: Piece) -> Tensor:
        rows, weights, below, log_sum = self._rows(piece), self.weights, view.below, view.log_sum
        if piece.index is None:
            share = torch.mul(rows, below, out=view.scratch).sum(dim=0)
            return log_sum - share if piece.whole and weights is None else log_sum * rows.sum(dim=0) - share
        value = log_sum - (view.label_logit - view.largest)
        if weights is not None:
            value *= weights[:, 0].take(view.slab.label[0])
        if piece.even:
            evenly = log_sum * below.shape[0] - below.sum(dim=0) if weights is None else log_sum * weights.sum() - (below * weights).sum(dim=0)
            value = piece.hard * value + piece.even * evenly
        if piece.index.numel():
            others = (rows * (view.logits_of(piece) - view.largest.index_select(0, piece.index))).sum(dim=0)
            value.index_copy_(0, piece.index, log_sum.index_select(0, piece.index) * rows.sum(dim=0) - others)
        return value

    def softmax_share(self, view: View, piece: Piece, factor: Tensor | float) -> Tensor | float:
        return factor * self._total_weight(view.slab, piece)

    def add_gradient(self, out: Tensor, view: View, piece: Piece, factor: Tensor | float) -> Tensor | None:
        rows, weights = self._rows(piece), self.weights
        if piece.index is None:
            _accumulate(out, rows, factor, -1.0)
            return None
        label = view.slab.label
        change = piece.hard * (torch.ones_like(label, dtype=out.dtype) if weights is None else weights[:, 0].take(label))
        change *= -factor
        if piece.even:
            even = piece.even if weights is None else piece.even * weights
            out.sub_(even * factor)
            rows = rows - even
        _correct(out, change, piece, rows * -_at(factor, piece.index))
        return change

    def _rows(self, piece: Piece) -> Tensor:
        return piece.rows if self.weights is None else piece.rows * self.weights

    def _total_weight(self, slab: Slab, piece: Piece) -> Tensor | float:
        """Sum over classes of weight times share: a number where it is the same at all pixels."""
        weights = self.weights
        if weights is None and piece.whole:
            return 1.0
        rows = self._rows(piece)
        if piece.index is None:
            return rows.sum(dim=0)
        if weights is None:
            total = torch.ones(slab.label.shape[1], dtype=rows.dtype)
        else:
            total = piece.hard * weights[:, 0].take(slab.label[0]) + piece.even * weights.sum()
        return total.index_copy_(0, piece.index, rows.sum(dim=0))


class _Neighbour(_PixelPart):
    def __init__(self, part: NeighbourPart, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.squared = part.distance == "l2"

    def value(self, view: View, piece: Piece) -> Tensor:
        measure = torch.square if self.squared else torch.abs
        here, num_classes = view.here, view.here.shape[0]
        if piece.index is None:
            gap = torch.sub(here, piece.rows, out=view.scratch)
            return measure(gap, out=gap).sum(dim=0).div_(num_classes)
        value = measure(here, out=view.scratch).sum(dim=0)
        value += measure(view.label_logit - 1.0) - measure(view.label_logit)
        if piece.index.numel():
            value.index_copy_(0, piece.index, measure(view.logits_of(piece) - piece.rows).sum(dim=0))
        return value.div_(num_classes)

    def add_gradient(self, out: Tensor, view: View, piece: Piece, factor: Tensor | float) -> Tensor | None:
        here = view.here
        step = (2.0 if self.squared else 1.0) / here.shape[0]
        if piece.index is None:
            gap = torch.sub(here, piece.rows, out=view.scratch)
            _accumulate(out, gap if self.squared else gap.sign_(), factor, step)
            return None
        _accumulate(out, self._slope(here, view.scratch), factor, step)
        label, there = view.label_logit[None], view.logits_of(piece)
        change = (self._slope(label - 1.0) - self._slope(label)) * (step * factor)
        _correct(out, change, piece, (self._slope(there - piece.rows) - self._slope(there)) * (step * _at(factor, piece.index)))
        return change

    def _slope(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        return values if self.squared else torch.sign(values, out=out)


class _Margin(_PixelPart):
    def __init__(self, part: MarginPart, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.part = part

    def value(self, view: View, piece: None) -> Tensor:
        part, excess = self.part, self._negative_excess(view)
        value = excess.square_().sum(dim=0).mul_(part.scale_others) if part.squared else excess.sum(dim=0).mul_(-part.scale_others)
        if part.scale_largest:
            value += part.scale_largest * (view.largest - part.margin).relu_().square_()
        return value

    def add_gradient(self, out: Tensor, view: View, piece: None, factor: Tensor | float) -> None:
        part, excess = self.part, self._negative_excess(view)
        slope, step = (excess, 2.0 * part.scale_others) if part.squared else (excess.sign_(), part.scale_others)
        pull = None if part.detached else slope.sum(dim=0).mul_(-step)
        if part.scale_largest:
            of_largest = 2.0 * part.scale_largest * (view.largest - part.margin).relu_()
            pull = of_largest if pull is None else pull.add_(of_largest)
        _accumulate(out, slope, factor, step)
        if pull is not None:
            is_largest = torch.eq(view.below, 0.0, out=view.scratch)
            out.addcmul_(is_largest, pull.div_(is_largest.sum(dim=0)).mul_(factor))

    def _negative_excess(self, view: View) -> Tensor:
        return torch.add(view.below, self.part.margin, out=view.scratch).clamp_(max=0.0)


class _Overlap(SlabPart):
    num_values = 2

    def __init__(self, part: OverlapPart, num_images: int, num_classes: int, dtype: torch.dtype) -> None:
        self.squared = part.norm == "l2"
        self.shape, self.dtype = (num_images, num_classes), dtype

    def begin(self, per_pixel: tuple[int, int] | None) -> None:
        self._p, self._distance, self._q, self._largest = (torch.zeros(self.shape, dtype=self.dtype) for _ in range(4))

    def hand_over(self) -> tuple[Tensor, ...]:
        values = self._p, self._distance
        del self._p, self._distance
        return values

    def target_sums(self) -> tuple[Tensor, Tensor]:
        return self._q, self._largest

    def factor(self, slab: Slab, slopes: Sequence[Tensor]) -> Factor:
        of_p, of_distance = slopes
        return of_p[slab.image, :, None], of_distance[slab.image, :, None]

    def add_value(self, view: View, piece: Piece) -> None:
        slab, p = view.slab, view.softmax
        if slab.ignored is not None:
            p.masked_fill_(slab.ignored, 0.0)
        image, size = slab.image, p.shape[1]
        mass = (torch.square(p, out=view.scratch) if self.squared else p).sum(dim=1)
        self._p[image] += mass
        if piece.index is None:
            rows = piece.rows if slab.ignored is None else piece.rows.masked_fill(slab.ignored, 0.0)
            self._distance[image] += self._measure(torch.sub(p, rows, out=view.scratch)).sum(dim=1)
            self._count(image, rows)
            return
        # The even share everywhere; then at labels, where those are not mixed and not ignored, and at mixed pixels what it is instead.
        self._distance[image] += self._measure(torch.sub(p, piece.even, out=view.scratch)).sum(dim=1) if piece.even else mass
        of_label = p.gather(0, slab.label)[0]
        change = self._measure(of_label - (piece.even + piece.hard)) - self._measure(of_label - piece.even)
        plain = torch.ones(size, dtype=torch.bool)
        plain[piece.index] = False
        if slab.ignored is not None:
            plain &= ~slab.ignored
            if piece.even:
                self._distance[image] -= float(torch.count_nonzero(slab.ignored)) * (piece.even**2 if self.squared else piece.even)
        label = slab.label[0]
        self._distance[image].index_add_(0, label, change * plain)
        counts = torch.zeros_like(self._q[image]).index_add_(0, label, plain.to(self.dtype))
        self._count_plain(image, piece, counts)
        if piece.index.numel():
            there = p.gather(1, piece.columns(p.shape[0]))
            self._distance[image] += (self._measure(there - piece.rows) - self._measure(there - piece.even)).sum(dim=1)
            self._count(image, piece.rows)

    def _measure(self, values: Tensor) -> Tensor:
        return values.square_() if self.squared else values.abs_()

    def _count(self, image: int, rows: Tensor) -> None:
        self._q[image] += (rows.square() if self.squared else rows).sum(dim=1)
        torch.maximum(self._largest[image], rows.amax(dim=1), out=self._largest[image])

    def _count_plain(self, image: int, piece: Piece, counts: Tensor) -> None:
        power, number = 2 if self.squared else 1, counts.sum()
        top = piece.even + piece.hard
        self._q[image] += counts * top**power + (number - counts) * piece.even**power
        largest = torch.where(counts > 0, top, torch.where(number > 0, piece.even, 0.0))
        torch.maximum(self._largest[image], largest.to(self.dtype), out=self._largest[image])

    def add_gradient(self, out: Tensor, view: View, piece: Piece, factor: tuple[Tensor, Tensor]) -> Tensor | None:
        p, label = view.softmax, view.slab.label
        if piece.index is None:
            slope = self._slope(p, piece.rows, factor, view.scratch)
            out.addcmul_(p, slope.sub_((p * slope).sum(dim=0)))
            return None
        slope = self._slope(p, piece.even, factor, view.scratch)
        of_label = p.gather(0, label)
        its = tuple(f[:, 0].take(label) for f in factor)
        change = (self._slope(of_label, piece.even + piece.hard, its) - self._slope(of_label, piece.even, its)).mul_(of_label)
        mean = (p * slope).sum(dim=0).add_(change[0])
        there = p.gather(1, piece.columns(p.shape[0]))
        others = self._slope(there, piece.rows, factor)
        mean.index_copy_(0, piece.index, (there * others).sum(dim=0))
        out.addcmul_(p, torch.sub(slope, mean, out=view.scratch))
        _correct(out, change, piece, there * (others - self._slope(there, piece.even, factor)))
        return change

    def _slope(self, p: Tensor, q: Tensor | float, factor: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
        """Derivative for p of both sums, each times its slope."""
        of_p, of_distance = factor
        if isinstance(q, float) and q == 0.0:  # |p - 0| is p
            return torch.mul(p, 2.0 * (of_p + of_distance), out=out) if self.squared else (of_p + of_distance).expand_as(p)
        gap = torch.sub(p, q, out=out)
        if self.squared:
            return gap.mul_(2.0 * of_distance).addcmul_(p, 2.0 * of_p)
        return gap.sign_().mul_(of_distance).add_(of_p)


def _correct(out: Tensor, change: Tensor, piece: Piece, others: Tensor) -> None:
    """At the pixels with shares of their own, add ``others`` and drop the change at the label."""
    assert piece.index is not None
    if piece.index.numel():
        change.index_fill_(1, piece.index, 0.0)
        out.scatter_add_(1, piece.columns(out.shape[0]), others)


def _accumulate(out: Tensor, values: Tensor, factor: Tensor | float, step: float) -> None:
    if isinstance(factor, Tensor):
        out.addcmul_(values, factor, value=step)
    else:
        out.add_(values, alpha=step * factor)


def _at(factor: Tensor | float, index: Tensor) -> Tensor | float:
    return factor.index_select(0, index) if isinstance(factor, Tensor) else factor
