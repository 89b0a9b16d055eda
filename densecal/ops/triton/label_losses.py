r"""Several losses of one prediction against one label map in one pass over the logits; see :mod:`densecal.ops.label_losses` for what they are.

Nothing of the size of the logits is made but their gradient: the target of a pixel and class is computed from the labels around the pixel when it is
needed. With logits z, p = softmax(z), target q, class shares :math:`\tau`, largest logit :math:`z_*` (t of them tied) and class weights w:

===============  =====================================================  =====================================================================
part             value of a pixel                                       gradient for :math:`z_c`
===============  =====================================================  =====================================================================
cross-entropy    :math:`\sum_j w_j q_j (z_* - z_j) + W \log S`          :math:`W p_c - w_c q_c`
neighbour        :math:`\frac1C \sum_j |\tau_j - z_j|^d`                :math:`\frac1C \mathrm{sign}(z_c - \tau_c)`, or
                                                                        :math:`\frac2C (z_c - \tau_c)`
margin           :math:`a \sum_j e_j^d + b\, e_*^2`                     :math:`-a d e_c^{d-1}`; where :math:`z_c = z_*` besides
                                                                        :math:`\frac1t (a \sum_j d e_j^{d-1} + 2 b e_*)`
overlap          :math:`\sum p,\ \sum q,\ \sum |p - q|` per class       :math:`p_c (g_c - \sum_j p_j g_j)`,
                                                                        :math:`g_c = G_c + D_c\, \mathrm{sign}(p_c - q_c)`
===============  =====================================================  =====================================================================

with :math:`S = \sum_j e^{z_j - z_*}`, :math:`W = \sum_j w_j q_j`, :math:`e_j = \max(0, z_* - z_j - m)` (0 to the power 0 is 0),
:math:`e_* = \max(0, z_* - m)` and G, D the gradients that come for the sums of p and of :math:`|p - q|`.

One program takes some hundred pixels of one image and goes through their classes one after the other, so that there may be any number of them and
each lane keeps a few numbers per pixel. :math:`z_*` and S are found online, and so is the cross-entropy, as a sum of terms that are not negative.
Margins and overlaps need :math:`z_*` or S first and go through the classes once more, as the gradient does; a program's own logits are in the cache
then. Where they are many, the forward pass keeps :math:`\log \sum_j e^{z_j}`, one number per pixel, which is little beside C logits; where they are few
that number would be much, and the loop that finds it again is cheap. Sums are kept per program and added up in a fixed order, with no atomics: the same
input gives the same bits.

The target's windows are those of :mod:`densecal.ops.triton.windows`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from densecal.ops.label_losses import (
    CrossEntropyPart,
    LabelShares,
    MarginPart,
    NeighbourPart,
    OverlapCounts,
    OverlapPart,
    Part,
    PixelLoss,
    check_parts,
)
from densecal.ops.triton.layout import check_reach, is_flat, is_wide, strides, three
from densecal.ops.triton.windows import BORDERS, share_of, smoothing_of, survey, window_table

__all__ = ["INTERPRETED", "label_losses"]

# The next three were chosen for 16-byte accesses and enough bytes in flight; no GPU was there to measure them on.
BLOCK = 512
"""Pixels of a program, a power of two."""
NUM_WARPS = 4
STAGES = 3
"""Classes whose logits are on their way while one is worked on, and that one."""
KEPT_FROM = 7
"""The forward pass keeps the log-sum-exp of each pixel where its logits take at least so many times as much memory."""

_NORMS = {"l1": 1, "l2": 2}


@triton.jit
def _kernel(
    # Read. Tables of weights are those of the window, from its first corner to its last.
    logits, labels, class_weights, target_table, prior_table, smoothing, smoothing_number,
    # Written: sums of each program, or values of each pixel; per class of each program; log-sum-exp; gradient. What the backward pass is handed.
    sums, values, overlaps, kept, gradient, value_gradient, mass_gradient, distance_gradient,
    # Sizes and strides.
    C, D, H, W, size, blocks, images, ignore,
    logits_n, logits_c, logits_d, logits_h, logits_w,
    labels_n, labels_d, labels_h, labels_w,
    gradient_n, gradient_c, gradient_d, gradient_h, gradient_w,
    target_n, prior_n, smoothing_n,
    # The parts: -1 for one that is not there, else its row among the values.
    margin, scale_others, scale_largest,
    CROSS_ENTROPY: tl.constexpr, NEIGHBOUR: tl.constexpr, MARGIN: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr,
    DISTANCE: tl.constexpr, POWER: tl.constexpr, DETACHED: tl.constexpr,
    SMOOTH: tl.constexpr, BOUNDARY: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TARGET_BORDER: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PRIOR_BORDER: tl.constexpr,
    BACKWARD: tl.constexpr, KEPT: tl.constexpr, PER_PIXEL: tl.constexpr, FLAT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    there = pixel < size
    w = pixel % W
    h = (pixel // W) % H
    d = pixel // W // H
    if FLAT:
        offset, gradient_offset = pixel * logits_w, pixel * gradient_w
    else:
        offset = d * logits_d + h * logits_h + w * logits_w
        gradient_offset = d * gradient_d + h * gradient_h + w * gradient_w
    logits += image * logits_n
    labels += image * labels_n
    given = tl.load(labels + (d * labels_d + h * labels_h + w * labels_w), mask=there, other=0)
    counts = there & (given != ignore)
    # A label that is no class makes the loss NaN: looking at it from outside would stall the device.
    wrong = counts & ((given < 0) | (given >= C))
    label = given.to(tl.int32)

    even = smoothing_of(
        smoothing, smoothing_number, image, smoothing_n, labels, label, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
        SMOOTH, BOUNDARY, BD, BH, BW, BLOCK, REAL,
    )  # fmt: skip

    target = target_table
    if TD * TH * TW > 1:
        target += image * target_n
    t_low, t_high, t_mixed, t_whole = survey(
        labels, target, label, counts, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore, TD, TH, TW, TARGET_BORDER, BLOCK, REAL
    )
    if NEIGHBOUR >= 0:
        prior = prior_table
        if PD * PH * PW > 1:
            prior += image * prior_n
        p_low, p_high, p_mixed, p_whole = survey(
            labels, prior, label, counts, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore, PD, PH, PW, PRIOR_BORDER, BLOCK, REAL
        )

    # First loop over the classes: largest logit, sum of exponentials, and what can be summed on the way.
    largest = tl.full((BLOCK,), -1.0e30, REAL)
    total = tl.zeros((BLOCK,), REAL)
    entropy, mass, gap = tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL)
    if KEPT and BACKWARD:
        # Without class weights and with shares that sum to 1: see `_Launch.kept`.
        largest = tl.load(kept + image * size + pixel, mask=there, other=0.0)
        total += 1.0
        mass += 1.0
    else:
        plane = logits
        for c in tl.range(0, C, num_stages=STAGES):
            z = tl.where(counts, tl.load(plane + offset, mask=there, other=0.0), 0.0).to(REAL)
            plane += logits_c
            larger = tl.maximum(largest, z)
            decay = tl.exp(-tl.abs(z - largest))
            total = tl.where(z > largest, total * decay + 1.0, total + decay)
            if CROSS_ENTROPY >= 0:
                share = share_of(
                    c, label, t_low, t_high, t_mixed, t_whole, even, C, labels, target, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
                    TD, TH, TW, TARGET_BORDER, SMOOTH, BLOCK, REAL,
                )  # fmt: skip
                if class_weights is not None:
                    share *= tl.load(class_weights + c).to(REAL)
                if not BACKWARD:
                    entropy += mass * (larger - largest) + tl.where(share > 0, share * (larger - z), 0.0)
                mass += share
            if NEIGHBOUR >= 0 and not BACKWARD:
                around = share_of(
                    c, label, p_low, p_high, p_mixed, p_whole, even, C, labels, prior, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
                    PD, PH, PW, PRIOR_BORDER, 0, BLOCK, REAL,
                )  # fmt: skip
                gap += tl.abs(around - z) if DISTANCE == 1 else (around - z) * (around - z)
            largest = larger

    # Second loop: what needs the largest logit or the probabilities.
    excess, ties, dot = tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL)
    if MARGIN >= 0 or OVERLAP > 0:
        plane = logits
        per_class = overlaps
        if OVERLAP > 0 and not BACKWARD:
            per_class += program * 4 * C
        for c in tl.range(0, C, num_stages=STAGES):
            z = tl.where(counts, tl.load(plane + offset, mask=there, other=0.0), 0.0).to(REAL)
            plane += logits_c
            if MARGIN >= 0:
                over = tl.maximum(largest - z - margin, 0.0)
                if BACKWARD:
                    excess += 2.0 * over if POWER == 2 else (over > 0).to(REAL)
                    ties += (z == largest).to(REAL)
                else:
                    excess += over * over if POWER == 2 else over
            if OVERLAP > 0:
                p = tl.exp(z - largest) / total
                q = share_of(
                    c, label, t_low, t_high, t_mixed, t_whole, even, C, labels, target, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
                    TD, TH, TW, TARGET_BORDER, SMOOTH, BLOCK, REAL,
                )  # fmt: skip
                if BACKWARD:
                    slope_p = tl.load(mass_gradient + image * C + c).to(REAL)
                    slope_d = tl.load(distance_gradient + image * C + c).to(REAL)
                    if OVERLAP == 1:
                        dot += p * (slope_p + slope_d * ((p > q).to(REAL) - (p < q).to(REAL)))
                    else:
                        dot += p * 2.0 * (slope_p * p + slope_d * (p - q))
                else:
                    p, q = tl.where(counts, tl.where(wrong, float("nan"), p), 0.0), tl.where(counts, q, 0.0)
                    tl.store(per_class, tl.sum(p) if OVERLAP == 1 else tl.sum(p * p))
                    tl.store(per_class + C, tl.sum(q) if OVERLAP == 1 else tl.sum(q * q))
                    tl.store(per_class + 2 * C, tl.sum(tl.abs(p - q)) if OVERLAP == 1 else tl.sum((p - q) * (p - q)))
                    tl.store(per_class + 3 * C, tl.max(q))
                    per_class += 1

    if not BACKWARD:
        if KEPT:
            tl.store(kept + image * size + pixel, largest + tl.log(total), mask=there)
        column = sums + program * (ROWS + 2)
        row = values + image * size + pixel
        if CROSS_ENTROPY >= 0:
            value = tl.where(counts, tl.where(wrong, float("nan"), entropy + mass * tl.log(total)), 0.0)
            if PER_PIXEL:
                tl.store(row + CROSS_ENTROPY * images * size, value, mask=there)
            else:
                tl.store(column + CROSS_ENTROPY, tl.sum(value))
        if NEIGHBOUR >= 0:
            value = tl.where(counts, tl.where(wrong, float("nan"), gap / C), 0.0)
            if PER_PIXEL:
                tl.store(row + NEIGHBOUR * images * size, value, mask=there)
            else:
                tl.store(column + NEIGHBOUR, tl.sum(value))
        if MARGIN >= 0:
            above = tl.maximum(largest - margin, 0.0)
            value = tl.where(counts, tl.where(wrong, float("nan"), scale_others * excess + scale_largest * above * above), 0.0)
            if PER_PIXEL:
                tl.store(row + MARGIN * images * size, value, mask=there)
            else:
                tl.store(column + MARGIN, tl.sum(value))
        tl.store(column + ROWS, tl.sum(counts.to(REAL)))
        if class_weights is not None:
            weight = tl.load(class_weights + label, mask=counts & (wrong == 0), other=0.0).to(REAL)
            tl.store(column + ROWS + 1, tl.sum(weight))
        else:
            tl.store(column + ROWS + 1, tl.sum(counts.to(REAL)))
    else:
        entropy_slope, gap_slope, margin_slope = tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL)
        if PER_PIXEL:
            row = value_gradient + image * size + pixel
            if CROSS_ENTROPY >= 0:
                entropy_slope = tl.load(row + CROSS_ENTROPY * images * size, mask=there, other=0.0).to(REAL)
            if NEIGHBOUR >= 0:
                gap_slope = tl.load(row + NEIGHBOUR * images * size, mask=there, other=0.0).to(REAL)
            if MARGIN >= 0:
                margin_slope = tl.load(row + MARGIN * images * size, mask=there, other=0.0).to(REAL)
        else:
            if CROSS_ENTROPY >= 0:
                entropy_slope += tl.load(value_gradient + CROSS_ENTROPY).to(REAL)
            if NEIGHBOUR >= 0:
                gap_slope += tl.load(value_gradient + NEIGHBOUR).to(REAL)
            if MARGIN >= 0:
                margin_slope += tl.load(value_gradient + MARGIN).to(REAL)
        if MARGIN >= 0:
            pull = 2.0 * scale_largest * tl.maximum(largest - margin, 0.0)
            if not DETACHED:
                pull += scale_others * excess
            pull /= tl.maximum(ties, 1.0)

        # Last loop: the gradient.
        plane = logits
        out = gradient + image * gradient_n
        for c in tl.range(0, C, num_stages=STAGES):
            z = tl.where(counts, tl.load(plane + offset, mask=there, other=0.0), 0.0).to(REAL)
            plane += logits_c
            slope = tl.zeros((BLOCK,), REAL)
            if CROSS_ENTROPY >= 0 or OVERLAP > 0:
                p = tl.exp(z - largest) / total
                q = share_of(
                    c, label, t_low, t_high, t_mixed, t_whole, even, C, labels, target, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
                    TD, TH, TW, TARGET_BORDER, SMOOTH, BLOCK, REAL,
                )  # fmt: skip
                if CROSS_ENTROPY >= 0:
                    if class_weights is not None:
                        slope += entropy_slope * (mass * p - q * tl.load(class_weights + c).to(REAL))
                    else:
                        slope += entropy_slope * (mass * p - q)
                if OVERLAP > 0:
                    slope_p = tl.load(mass_gradient + image * C + c).to(REAL)
                    slope_d = tl.load(distance_gradient + image * C + c).to(REAL)
                    if OVERLAP == 1:
                        slope += p * (slope_p + slope_d * ((p > q).to(REAL) - (p < q).to(REAL)) - dot)
                    else:
                        slope += p * (2.0 * (slope_p * p + slope_d * (p - q)) - dot)
            if NEIGHBOUR >= 0:
                around = share_of(
                    c, label, p_low, p_high, p_mixed, p_whole, even, C, labels, prior, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
                    PD, PH, PW, PRIOR_BORDER, 0, BLOCK, REAL,
                )  # fmt: skip
                if DISTANCE == 1:
                    slope += gap_slope * ((z > around).to(REAL) - (z < around).to(REAL)) / C
                else:
                    slope += gap_slope * 2.0 * (z - around) / C
            if MARGIN >= 0:
                over = tl.maximum(largest - z - margin, 0.0)
                slope -= margin_slope * scale_others * (2.0 * over if POWER == 2 else (over > 0).to(REAL))
                slope += tl.where(z == largest, margin_slope * pull, 0.0)
            tl.store(out + gradient_offset, tl.where(counts, slope, 0.0), mask=there)
            out += gradient_c


INTERPRETED = not isinstance(_kernel, triton.JITFunction)
"""Whether the kernels run on a CPU, for tests."""


def label_losses(
    logits: Tensor, labels: Tensor, parts: Sequence[Part], *, ignore_index: int, per_pixel: bool = False
) -> list[PixelLoss | OverlapCounts]:
    """What :func:`densecal.ops.label_losses.label_losses` gives, whose arguments it shares, from one kernel for parts that fit together.

    A kernel takes one part of each kind; cross-entropy and overlap share their target. A label that is no class makes the values NaN.

    Raises:
        NotCovered: If overlaps are wanted per pixel, or sizes are beyond what the kernel can address.
    """
    check_parts(parts, per_pixel)
    launches: list[_Launch] = []
    places: list[_Launch] = []
    for part in parts:
        launch = next((candidate for candidate in launches if candidate.takes(part)), None)
        if launch is None:
            launch = _Launch(ignore_index, per_pixel)
            launches.append(launch)
        launch.add(part)
        places.append(launch)
    outputs = {id(launch): launch.run(logits, labels) for launch in launches}
    return [outputs[id(launch)][id(part)] for part, launch in zip(parts, places, strict=True)]


@dataclass(eq=False)
class _Launch:
    """The parts that one kernel computes."""

    ignore_index: int
    per_pixel: bool
    entropy: CrossEntropyPart | None = None
    neighbour: NeighbourPart | None = None
    margin: MarginPart | None = None
    overlap: OverlapPart | None = None
    shares: LabelShares = field(default_factory=LabelShares)

    def takes(self, part: Part) -> bool:
        if isinstance(part, NeighbourPart):
            return self.neighbour is None
        if isinstance(part, MarginPart):
            return self.margin is None
        if isinstance(part, CrossEntropyPart):
            return self.entropy is None and (self.overlap is None or self.shares is part.shares)
        return self.overlap is None and (self.entropy is None or self.shares is part.shares)

    def add(self, part: Part) -> None:
        if isinstance(part, NeighbourPart):
            self.neighbour = part
        elif isinstance(part, MarginPart):
            self.margin = part
        elif isinstance(part, CrossEntropyPart):
            self.entropy, self.shares = part, part.shares
        else:
            self.overlap, self.shares = part, part.shares

    @property
    def rows(self) -> list[Part]:
        """The parts that have a value per pixel, in the order of their rows."""
        return [part for part in (self.entropy, self.neighbour, self.margin) if part is not None]

    def run(self, logits: Tensor, labels: Tensor) -> dict[int, PixelLoss | OverlapCounts]:
        values, counts, overlaps, largest = _LabelLosses.apply(logits, labels, self)
        results: dict[int, PixelLoss | OverlapCounts] = {}
        for value, part in zip(values, self.rows, strict=True):
            weighted = part is self.entropy and self.entropy.class_weights is not None
            value = value.reshape(labels.shape) if self.per_pixel else value
            results[id(part)] = PixelLoss(value, counts[1] if weighted else counts[0])
        if self.overlap is not None:
            p, q, distance = overlaps
            tp = (p + q - distance) / 2
            results[id(self.overlap)] = OverlapCounts(tp, p - tp, q - tp, largest)
        return results


class _LabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, launch: _Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if labels.dtype == torch.bool:
            labels = labels.view(torch.uint8)
        call = _Call(launch, logits, labels)
        n, c, rows, real = logits.shape[0], logits.shape[1], len(launch.rows), call.real
        sums = logits.new_zeros(call.programs, rows + 2, dtype=real)
        values = logits.new_empty(rows, n, call.size, dtype=real) if launch.per_pixel else sums
        overlaps = logits.new_empty(call.programs, 4, c, dtype=real) if launch.overlap is not None else sums
        kept = logits.new_empty(n, call.size, dtype=real) if call.kept and ctx.needs_input_grad[0] else None
        call(backward=False, sums=sums, values=values, overlaps=overlaps, kept=kept)
        # Sums of programs are added in double precision, which costs nothing here, in an order that does not change.
        totals = sums.sum(0, dtype=torch.float64).to(real)
        per_image, largest = totals.new_empty(0), totals.new_empty(0)
        if launch.overlap is not None:
            per_program = overlaps.reshape(n, call.blocks, 4, c)
            per_image = per_program[:, :, :3].sum(1, dtype=torch.float64).to(real).movedim(1, 0)
            largest = per_program[:, :, 3].amax(1)
        ctx.launch = launch
        ctx.save_for_backward(logits, labels, kept)
        counts = totals[rows:]
        ctx.mark_non_differentiable(counts, largest)
        return (values if launch.per_pixel else totals[:rows]), counts, per_image, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor, _counts: Tensor, overlap_gradient: Tensor, _largest: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, kept = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        call = _Call(ctx.launch, logits, labels, gradient)
        mass_gradient = distance_gradient = value_gradient
        if ctx.launch.overlap is not None:
            mass_gradient, distance_gradient = overlap_gradient[0].contiguous(), overlap_gradient[2].contiguous()
        call(
            backward=True,
            kept=kept,
            value_gradient=value_gradient.contiguous(),
            mass_gradient=mass_gradient,
            distance_gradient=distance_gradient,
        )
        return gradient, None, None


class _Call:
    """What a launch needs to know of its tensors."""

    def __init__(self, launch: _Launch, logits: Tensor, labels: Tensor, gradient: Tensor | None = None) -> None:
        self.launch, self.logits, self.labels, self.gradient = launch, logits, labels, gradient
        n, _, *spatial = logits.shape
        self.spatial = three(spatial, 1)
        self.size = self.spatial[0] * self.spatial[1] * self.spatial[2]
        self.blocks = -(-self.size // BLOCK)
        self.programs = n * self.blocks
        check_reach(self.programs, launch.ignore_index)
        self.real = torch.promote_types(logits.dtype, torch.float32)
        self.strides = [strides(tensor, 2, self.spatial) for tensor in (logits, logits if gradient is None else gradient)]
        self.label_strides = strides(labels, 1, self.spatial)
        self.wide = is_wide(self.spatial, *self.strides, self.label_strides)
        self.flat = all(is_flat(steps, self.spatial) for steps in self.strides)
        # Where the log-sum-exp alone gives the gradient: margins need the largest logit, and class weights or a border of zeros the sum of the target.
        weighted = launch.entropy is not None and launch.entropy.class_weights is not None
        open_border = launch.shares.kernel is not None and launch.shares.border == "zeros"
        enough = launch.margin is None and not weighted and not open_border and bool(launch.entropy or launch.overlap)
        self.kept = enough and logits.shape[1] * logits.element_size() >= KEPT_FROM * self.real.itemsize

    def __call__(
        self,
        *,
        backward: bool,
        sums: Tensor | None = None,
        values: Tensor | None = None,
        overlaps: Tensor | None = None,
        kept: Tensor | None = None,
        value_gradient: Tensor | None = None,
        mass_gradient: Tensor | None = None,
        distance_gradient: Tensor | None = None,
    ) -> None:
        if self.programs == 0:
            return
        launch, logits, labels = self.launch, self.logits, self.labels
        shares = launch.shares
        prior = LabelShares() if launch.neighbour is None else launch.neighbour.shares
        weights = None if launch.entropy is None else launch.entropy.class_weights
        target_size, target_table, target_n = window_table(shares.kernel, logits.device, self.real)
        prior_size, prior_table, prior_n = window_table(prior.kernel, logits.device, self.real)
        smoothing = shares.smoothing.detach().to(logits.device).reshape(-1) if isinstance(shares.smoothing, Tensor) else None
        boundary = (1, 1, 1) if shares.boundary is None else three(shares.boundary, 1)
        margin = launch.margin or MarginPart(0.0, False, 0.0)
        rows = {id(part): row for row, part in enumerate(launch.rows)}
        device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
        (logit_strides, gradient_strides), gradient = self.strides, self.gradient
        with device:
            _kernel[(self.programs,)](
                logits, labels, weights, target_table, prior_table, smoothing, 0.0 if smoothing is not None else float(shares.smoothing),
                sums, values, overlaps, kept, gradient, value_gradient, mass_gradient, distance_gradient,
                logits.shape[1], *self.spatial, self.size, self.blocks, logits.shape[0], launch.ignore_index,
                logits.stride(0), logits.stride(1), *logit_strides,
                labels.stride(0), *self.label_strides,
                *(logits if gradient is None else gradient).stride()[:2], *gradient_strides,
                target_n, prior_n, int(smoothing is not None and smoothing.numel() > 1),
                float(margin.margin), float(margin.scale_others), float(margin.scale_largest),
                CROSS_ENTROPY=rows.get(id(launch.entropy), -1), NEIGHBOUR=rows.get(id(launch.neighbour), -1), MARGIN=rows.get(id(launch.margin), -1),
                OVERLAP=0 if launch.overlap is None else _NORMS[launch.overlap.norm], ROWS=len(rows),
                DISTANCE=1 if launch.neighbour is None else _NORMS[launch.neighbour.distance], POWER=1 + margin.squared, DETACHED=margin.detached,
                SMOOTH=2 if smoothing is not None else int(shares.smoothing != 0), BOUNDARY=shares.boundary is not None,
                BD=boundary[0], BH=boundary[1], BW=boundary[2],
                TD=target_size[0], TH=target_size[1], TW=target_size[2], TARGET_BORDER=BORDERS[shares.border],
                PD=prior_size[0], PH=prior_size[1], PW=prior_size[2], PRIOR_BORDER=BORDERS[prior.border],
                BACKWARD=backward, KEPT=kept is not None, PER_PIXEL=launch.per_pixel, FLAT=self.flat,
                BLOCK=BLOCK, STAGES=STAGES, REAL=tl.float64 if self.real == torch.float64 else tl.float32, INDEX=tl.int64 if self.wide else tl.int32,
                num_warps=NUM_WARPS,
            )  # fmt: skip
