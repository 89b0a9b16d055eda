"""What lies around a pixel of a label map, for kernels: the share of a class in a window, and where labels change.

About 95 % of real pixels lie among pixels of their own class. A program looks at the smallest and largest class in its windows first; where they are the
same the share is the label's. Elsewhere only the classes between them take a walk through the window.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from densecal.ops.neighbourhood import Kernel
from densecal.ops.triton.layout import three

__all__ = ["BORDERS", "look", "share_of", "smoothing_of", "survey", "weigh", "window_table"]

BORDERS = {"replicate": 0, "renormalize": 1, "zeros": 2}


@triton.jit
def look(labels, label, d, h, w, D, H, W, sd, sh, sw, ignore, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Smallest and largest class in the window of each pixel, and whether it holds an ignored pixel. The outside takes no part: what a neighbour
    outside is moved to lies in the window, too."""
    lowest, highest = label, label
    ignored = label != label
    for i in range(KD):
        z = tl.minimum(tl.maximum(d + (i - KD // 2), 0), D - 1) * sd
        for j in range(KH):
            zy = z + tl.minimum(tl.maximum(h + (j - KH // 2), 0), H - 1) * sh
            for k in range(KW):
                x = tl.minimum(tl.maximum(w + (k - KW // 2), 0), W - 1)
                other = tl.load(labels + (zy + x * sw)).to(tl.int32)
                unknown = other == ignore
                other = tl.where(unknown, label, other)
                lowest = tl.minimum(lowest, other)
                highest = tl.maximum(highest, other)
                ignored = ignored | unknown
    return lowest, highest, ignored


@triton.jit
def weigh(
    labels, table, sought, ignore, fill, d, h, w, D, H, W, sd, sh, sw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BORDER: tl.constexpr, ONE_CLASS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Weight in the window of each pixel of the class that is sought, or of all that is not ignored; the outside is taken for the label ``fill``."""
    weight = tl.zeros((BLOCK,), REAL)
    tap = table
    for i in range(KD):
        z = tl.minimum(tl.maximum(d + (i - KD // 2), 0), D - 1)
        for j in range(KH):
            y = tl.minimum(tl.maximum(h + (j - KH // 2), 0), H - 1)
            zy = z * sd + y * sh
            if BORDER > 0:
                inside_zy = (z == d + (i - KD // 2)) & (y == h + (j - KH // 2))
            for k in range(KW):
                x = tl.minimum(tl.maximum(w + (k - KW // 2), 0), W - 1)
                other = tl.load(labels + (zy + x * sw)).to(tl.int32)
                if BORDER > 0:
                    other = tl.where(inside_zy & (x == w + (k - KW // 2)), other, fill)
                taken = other == sought if ONE_CLASS else other != ignore
                weight += tl.where(taken, tl.load(tap), 0.0).to(REAL)
                tap += 1
    return weight


@triton.jit
def survey(
    labels, table, label, counts, d, h, w, D, H, W, sd, sh, sw, ignore,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What the windows of a program hold: smallest and largest class, whether a target may differ from the label, and the weight of what counts."""
    whole = tl.full((BLOCK,), 1.0, REAL)
    if KD * KH * KW > 1:
        low, high, _ = look(labels, label, d, h, w, D, H, W, sd, sh, sw, ignore, KD, KH, KW)
        lowest = tl.min(tl.where(counts, low, 2147483647))
        highest = tl.max(tl.where(counts, high, -1))
        mixed = highest > lowest
        if BORDER == 2:  # the outside counts as pixels of no class
            rim = (d < KD // 2) | (d >= D - KD // 2) | (h < KH // 2) | (h >= H - KH // 2) | (w < KW // 2) | (w >= W - KW // 2)
            mixed = mixed | (tl.max((counts & rim).to(tl.int32)) > 0)
        if mixed:
            fill = ignore if BORDER < 2 else ignore + 1
            whole = weigh(labels, table, 0, ignore, fill, d, h, w, D, H, W, sd, sh, sw, KD, KH, KW, BORDER, False, BLOCK, REAL)
            whole = tl.where(counts, whole, 1.0)
    else:
        lowest, highest, mixed = 0, 0, False
    return lowest, highest, mixed, whole


@triton.jit
def share_of(
    c, label, lowest, highest, mixed, whole, even, C, labels, table, d, h, w, D, H, W, sd, sh, sw, ignore,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BORDER: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Share of class ``c`` at each pixel."""
    share = (label == c).to(REAL)
    if KD * KH * KW > 1:  # noqa: SIM102 - known when compiled
        if mixed & (c >= lowest) & (c <= highest) & (c != ignore):
            share = weigh(labels, table, c, ignore, ignore, d, h, w, D, H, W, sd, sh, sw, KD, KH, KW, BORDER, True, BLOCK, REAL) / whole
    if SMOOTH:
        share = (1.0 - even) * share + even / C
    return share


@triton.jit
def smoothing_of(
    smoothing, number, image, smoothing_n, labels, label, d, h, w, D, H, W, sd, sh, sw, ignore,
    SMOOTH: tl.constexpr, BOUNDARY: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What is taken from each pixel and spread over the classes: nothing, a number (``SMOOTH`` 1) or that of the image (2); only at a ``BOUNDARY``."""
    even = tl.zeros((BLOCK,), REAL)
    if SMOOTH == 1:
        even += number
    elif SMOOTH == 2:
        even += tl.load(smoothing + image * smoothing_n).to(REAL)
    if BOUNDARY:
        low, high, ignored = look(labels, label, d, h, w, D, H, W, sd, sh, sw, ignore, BD, BH, BW)
        even = tl.where((low != high) & (ignored == 0), even, 0.0)
    return even


def window_table(kernel: Kernel | None, device: torch.device, dtype: torch.dtype) -> tuple[tuple[int, int, int], Tensor | None, int]:
    """Sides of a window, its weights on the device, and how far those of the next image lie."""
    if kernel is None:
        return (1, 1, 1), None, 0
    fixed = all(isinstance(weight, float) for axis in kernel.taps for weight in axis)
    table = (_fixed_table if fixed else _weights)(kernel, device, dtype)
    return three(kernel.size, 1), table, table.stride(0) if table.ndim > len(kernel.size) else 0


def _weights(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Tensor:
    return kernel.dense(device).to(dtype)


_fixed_table = functools.lru_cache(maxsize=64)(_weights)
