"""What :func:`densecal.ops.slab_losses.label_shares` gives, the distribution of a label map, in one kernel that reads labels and writes each share once.

A program takes some hundred pixels of one image, looks at their windows (:mod:`densecal.ops.triton.windows`) and writes their shares class by class, so
that there may be any number of classes and nothing but the result is made.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import LabelShares
from densecal.ops.triton.layout import check_reach, is_wide, strides, three
from densecal.ops.triton.windows import BORDERS, share_of, smoothing_of, survey, window_table

__all__ = ["label_shares"]

# No GPU was there to measure these on.
BLOCK = 512
"""Pixels of a program, a power of two."""
NUM_WARPS = 4
MOST_TAPS = 125
"""Larger windows, which a program would walk through once per class, are left to a pass along each axis."""


@triton.jit
def _kernel(
    # Read. The table of weights is that of the window, from its first corner to its last. Written: (N, C, D, H, W), without gaps.
    labels, table, smoothing, result,
    # Sizes and strides.
    C, D, H, W, size, blocks, ignore,
    labels_n, labels_d, labels_h, labels_w, table_n, smoothing_n,
    SMOOTH: tl.constexpr, BOUNDARY: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BORDER: tl.constexpr,
    BLOCK: tl.constexpr, REAL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK).to(INDEX)
    there = pixel < size
    w = pixel % W
    h = (pixel // W) % H
    d = pixel // W // H
    labels += image * labels_n
    given = tl.load(labels + (d * labels_d + h * labels_h + w * labels_w), mask=there, other=0)
    counts = there & (given != ignore)
    # A label that is no class makes the shares NaN: looking at it from outside would stall the device.
    wrong = counts & ((given < 0) | (given >= C))
    label = given.to(tl.int32)
    even = smoothing_of(
        smoothing, 0.0, image, smoothing_n, labels, label, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
        SMOOTH, BOUNDARY, BD, BH, BW, BLOCK, REAL,
    )  # fmt: skip
    if KD * KH * KW > 1:
        table += image * table_n
    lowest, highest, mixed, whole = survey(
        labels, table, label, counts, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore, KD, KH, KW, BORDER, BLOCK, REAL
    )
    plane = result + image * C * size
    for c in range(C):
        share = share_of(
            c, label, lowest, highest, mixed, whole, even, C, labels, table, d, h, w, D, H, W, labels_d, labels_h, labels_w, ignore,
            KD, KH, KW, BORDER, SMOOTH, BLOCK, REAL,
        )  # fmt: skip
        tl.store(plane + pixel, tl.where(counts, tl.where(wrong, float("nan"), share), 0.0), mask=there)
        plane += size


def label_shares(labels: Tensor, num_classes: int, shares: LabelShares, *, ignore_index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What :func:`densecal.ops.slab_losses.label_shares` gives, whose arguments it shares; computed in at least single precision.

    A pixel whose label is no class has NaN for its shares.

    Raises:
        NotCovered: If a window has more than 125 pixels, or sizes are beyond what the kernel can address.
    """
    if shares.kernel is not None and (taps := math.prod(shares.kernel.size)) > MOST_TAPS:
        raise NotCovered(f"a window of {taps} pixels is smoothed along one axis after the other")
    n, *sides = labels.shape
    spatial = three(sides, 1)
    size = math.prod(spatial)
    blocks = -(-size // BLOCK)
    check_reach(n * blocks, ignore_index)
    labels = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    device, real, steps = labels.device, torch.promote_types(dtype, torch.float32), strides(labels, 1, spatial)
    result = torch.empty(n, num_classes, *sides, dtype=dtype, device=device)
    if result.numel() == 0:
        return result
    window, table, table_n = window_table(shares.kernel, device, real)
    boundary = (1, 1, 1) if shares.boundary is None else three(shares.boundary, 1)
    smoothing: Tensor | None = None
    if isinstance(shares.smoothing, Tensor):
        smoothing = shares.smoothing.detach().to(device).reshape(-1)
    elif shares.smoothing != 0:
        smoothing = torch.full((1,), shares.smoothing, dtype=real, device=device)  # a kernel takes numbers in single precision
    with torch.cuda.device(device) if labels.is_cuda else contextlib.nullcontext():
        _kernel[(n * blocks,)](
            labels, table, smoothing, result,
            num_classes, *spatial, size, blocks, ignore_index,
            labels.stride(0), *steps, table_n, int(smoothing is not None and smoothing.numel() > 1),
            SMOOTH=0 if smoothing is None else 2, BOUNDARY=shares.boundary is not None, BD=boundary[0], BH=boundary[1], BW=boundary[2],
            KD=window[0], KH=window[1], KW=window[2], BORDER=BORDERS[shares.border],
            BLOCK=BLOCK, REAL=tl.float64 if real == torch.float64 else tl.float32,
            INDEX=tl.int64 if is_wide(spatial, steps) else tl.int32,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return result
