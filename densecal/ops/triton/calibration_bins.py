r"""What :func:`densecal.ops.calibration_bins.calibration_bins` computes, in one kernel: softmax, largest, confidence, correctness and bins of a read of the prediction.

A program takes some hundred pixels of one image and goes through their classes. The largest value, the first class that has it and
:math:`\sum_c e^{z_c - \max_j z_j}` are found online, so that the top label takes one loop; a second one bins each class, whose values are in the cache then. A
bin takes the confidences above its lower edge and not above its upper one, by comparison with the edges themselves, so that no arithmetic decides where an
edge belongs. Sums are kept per program and added up in double precision in a fixed order, with no atomics: the same input gives the same bits.

Of probabilities the counts are those of PyTorch. Of logits a confidence is rounded differently, by a few units in its last place: one that lies so near to an
edge may fall to its other side.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.ops.binning import Bins, bin_edges
from densecal.ops.calibration_bins import CALIBRATION_KINDS, CalibrationKind
from densecal.ops.triton.layout import check_reach, is_flat, is_wide, strides, three

__all__ = ["calibration_bins"]

# No GPU was there to measure these on.
BLOCK = 512
"""Pixels of a program, a power of two."""
GROUP = 16
"""Bins that a program fills at a time, a power of two."""
NUM_WARPS = 4
STAGES = 3
"""Classes whose values are on their way while one is worked on, and that one."""


@triton.jit
def _fill(sums, edges, confidence, right, counted, BINS: tl.constexpr, GROUP: tl.constexpr, REAL: tl.constexpr):
    """Count, sum of confidence and of what was right of each bin, written to ``sums``, ``(3, BINS)``."""
    # What is not a number goes to the last bin, where its sum shows it.
    place = tl.where(confidence == confidence, confidence, 2.0)[None, :]
    for first in range(0, BINS, GROUP):
        number = first + tl.arange(0, GROUP)
        lower = tl.load(edges + number, mask=number < BINS, other=float("inf"))
        upper = tl.load(edges + number + 1, mask=number < BINS, other=float("inf"))
        within = counted[None, :] & (place > lower[:, None]) & (place <= upper[:, None])
        tl.store(sums + number, tl.sum(within.to(REAL), 1), mask=number < BINS)
        tl.store(sums + BINS + number, tl.sum(tl.where(within, confidence[None, :], 0.0), 1), mask=number < BINS)
        tl.store(sums + 2 * BINS + number, tl.sum(tl.where(within, right[None, :], 0.0), 1), mask=number < BINS)


@triton.jit
def _kernel(
    # Read; edges are BINS + 1 numbers, the first and last infinite. Written: (programs, rows, 3, BINS).
    values, labels, mask, edges, sums,
    # Sizes and strides.
    C, D, H, W, size, blocks, ignore, threshold,
    values_n, values_c, values_d, values_h, values_w,
    labels_n, labels_d, labels_h, labels_w,
    mask_n, mask_d, mask_h, mask_w,
    CLASSWISE: tl.constexpr, LOGITS: tl.constexpr, THRESHOLD: tl.constexpr, BINS: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    there = pixel < size
    w = pixel % W
    h = (pixel // W) % H
    d = pixel // W // H
    offset = pixel * values_w if FLAT else d * values_d + h * values_h + w * values_w
    values += image * values_n
    given = tl.load(labels + image * labels_n + (d * labels_d + h * labels_h + w * labels_w), mask=there, other=0)
    counts = there & (given != ignore)
    if mask is not None:
        counts = counts & (tl.load(mask + image * mask_n + (d * mask_d + h * mask_h + w * mask_w), mask=there, other=0) != 0)
    # A label that is no class makes what is right NaN: looking at it from outside would stall the device.
    wrong = counts & ((given < 0) | (given >= C))
    label = given.to(tl.int32)

    largest = tl.full((BLOCK,), -1.0e30, REAL)
    total = tl.zeros((BLOCK,), REAL)
    first = tl.zeros((BLOCK,), tl.int32)
    if LOGITS or not CLASSWISE:
        plane = values
        for c in tl.range(0, C, num_stages=STAGES):
            z = tl.where(counts, tl.load(plane + offset, mask=there, other=0.0), 0.0).to(REAL)
            plane += values_c
            larger = z > largest
            first = tl.where(larger, c, first)
            if LOGITS:
                decay = tl.exp(-tl.abs(z - largest))
                total = tl.where(larger, total * decay + 1.0, total + decay)
            else:
                total += z
            largest = tl.where(larger, z, largest)

    if CLASSWISE:
        plane = values
        row = sums + program * C * 3 * BINS
        for c in tl.range(0, C, num_stages=STAGES):
            p = tl.where(counts, tl.load(plane + offset, mask=there, other=0.0), 0.0).to(REAL)
            plane += values_c
            if LOGITS:
                p = tl.exp(p - largest) / total
            counted = counts
            if THRESHOLD:
                counted = counts & (p > threshold)
            right = tl.where(wrong, float("nan"), (label == c).to(REAL))
            _fill(row, edges, p, right, counted, BINS, GROUP, REAL)
            row += 3 * BINS
    else:
        # The sum tells of what is not a number, which no comparison finds.
        confidence = tl.where(largest < float("inf"), 1.0 / total, float("nan")) if LOGITS else tl.where(total == total, largest, float("nan"))
        counted = counts
        if THRESHOLD:
            counted = counts & (confidence > threshold)
        right = tl.where(wrong, float("nan"), (label == first).to(REAL))
        _fill(sums + program * 3 * BINS, edges, confidence, right, counted, BINS, GROUP, REAL)


def calibration_bins(
    values: Tensor,
    labels: Tensor,
    *,
    num_bins: int,
    kind: CalibrationKind = "top_label",
    from_logits: bool = False,
    ignore_index: int,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Bins:
    """What :func:`densecal.ops.calibration_bins.calibration_bins` gives, whose arguments it shares.

    A label that is no class makes the sum of what was right NaN; so does a value that is not finite the sum of confidences.

    Raises:
        ValueError: As there.
        NotCovered: If sizes are beyond what the kernel can address.
    """
    check_positive("num_bins", num_bins)
    check_choice("kind", kind, CALIBRATION_KINDS)
    values = values.detach()
    n, c, *sides = values.shape
    spatial = three(sides, 1)
    size = math.prod(spatial)
    blocks, rows = -(-size // BLOCK), 1 if kind == "top_label" else c
    programs = n * blocks
    check_reach(programs, ignore_index)
    if look is not None and values.numel():
        look(values.flatten(2), values.flatten(2).amax(1))
    labels = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    mask = None if mask is None else mask.view(torch.uint8)
    real = torch.promote_types(values.dtype, torch.float32)
    sums = values.new_empty(programs, rows, 3, num_bins, dtype=real)
    steps, label_steps = strides(values, 2, spatial), strides(labels, 1, spatial)
    mask_steps = (0, 0, 0) if mask is None else strides(mask, 1, spatial)
    if programs:
        with torch.cuda.device(values.device) if values.is_cuda else contextlib.nullcontext():
            _kernel[(programs,)](
                values, labels, mask, _edges(num_bins, real, values.device), sums,
                c, *spatial, size, blocks, ignore_index, float(threshold),
                values.stride(0), values.stride(1), *steps,
                labels.stride(0), *label_steps,
                0 if mask is None else mask.stride(0), *mask_steps,
                CLASSWISE=kind == "classwise", LOGITS=from_logits, THRESHOLD=threshold > 0, BINS=num_bins, GROUP=GROUP,
                FLAT=is_flat(steps, spatial), BLOCK=BLOCK, STAGES=STAGES,
                REAL=tl.float64 if real == torch.float64 else tl.float32,
                INDEX=tl.int64 if is_wide(spatial, steps, label_steps, mask_steps) else tl.int32,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    count, confidence, correct = sums.view(n, blocks, rows, 3, num_bins).sum(1, dtype=torch.float64).unbind(2)
    return Bins(count.long(), confidence, correct)


@functools.lru_cache(maxsize=64)
def _edges(num_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Edges as they are compared with: nothing lies outside of the first and last bin."""
    edges = bin_edges(num_bins, dtype=dtype, device=device)
    edges[0], edges[-1] = -math.inf, math.inf
    return edges
