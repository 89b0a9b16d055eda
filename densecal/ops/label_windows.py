r"""Class shares around the pixels of a label map, box by box, without a one-hot map of the whole.

About 95 % of the pixels of real label maps lie among pixels of their own class, where the share is the label itself. The *mixed* others are found by
comparing labels, and their shares added up tap by tap. Where they are many, the shares of all pixels of a box come from the separable window instead.

Ignored pixels and the outside are codes of their own, so that no case needs another path: C is an ignored pixel, which has no weight (as the outside
with ``border="renormalize"``), C + 1 the outside that counts as no class (``border="zeros"``); a replicated border repeats codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from densecal.ops.neighbourhood import Border, Kernel

__all__ = ["Box", "LabelWindows", "boxes", "encode_labels"]

Box: TypeAlias = tuple[slice, ...]
"""A range per spatial axis."""

_WORK_OF_A_TAP = 3.0
"""A tap at one mixed pixel takes about three times as long as a class at one pixel of a box (3-wide windows in 3D, float32, 4 to 32 classes)."""

_CHUNK = 2**18
"""Numbers that are smoothed at once, 1 MiB in single precision, so that they stay in a core's cache."""


def encode_labels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Classes as the smallest integers that hold them and C + 1, ignored pixels as C; and which pixels are valid, None for all.

    Args:
        labels: ``(N, *spatial)``, classes in [0, C) or ``ignore_index``, any integer type, or whole numbers of a floating one.
        num_classes: C.
        ignore_index: Label of pixels to leave out.

    Example:
        >>> encode_labels(torch.tensor([[0, 255, 1]]), 2, 255)
        (tensor([[0, 2, 1]], dtype=torch.uint8), tensor([[ True, False,  True]]))
    """
    dtype = next(t for t in (torch.uint8, torch.int16, torch.int32) if num_classes + 1 <= torch.iinfo(t).max)
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        labels = labels.long()  # others are not compared everywhere
    codes = labels.to(dtype, memory_format=torch.contiguous_format)
    if codes.numel() == 0 or (int(codes.amin()) >= 0 and int(codes.amax()) < num_classes and not 0 <= _wrapped(ignore_index, dtype) < num_classes):
        return codes, None
    bounds = torch.iinfo(labels.dtype)
    if not bounds.min <= ignore_index <= bounds.max:
        return codes, None
    valid = labels != ignore_index
    return torch.where(valid, codes, num_classes), valid


def _wrapped(number: int, dtype: torch.dtype) -> int:
    """What remains of a number in an integer type that may be too small for it."""
    return int(torch.tensor(number, dtype=torch.int64).to(dtype))


def boxes(spatial: tuple[int, ...], size: int) -> Iterator[tuple[int, int, Box]]:
    """Cut an image into boxes of about ``size`` pixels that follow each other in memory: first and last pixel (exclusive) and box.

    Example:
        >>> [(start, stop) for start, stop, _ in boxes((3, 4), 8)]
        [(0, 8), (8, 12)]
    """
    length, plane = spatial[0], math.prod(spatial[1:])
    if plane > size and len(spatial) > 1:
        for i in range(length):
            for start, stop, box in boxes(spatial[1:], size):
                yield i * plane + start, i * plane + stop, (slice(i, i + 1), *box)
        return
    step = max(1, size // max(plane, 1))
    for i in range(0, length, step):
        end = min(i + step, length)
        yield i * plane, end * plane, (slice(i, end), *(slice(0, n) for n in spatial[1:]))


class LabelWindows:
    """The windows of a label map on a CPU (it looks at values).

    Args:
        codes: ``(N, *spatial)`` of :func:`encode_labels`.
        num_classes: C.
        kernel: The window.
        border: What lies outside.
        has_ignored: Whether a code is C.
        dtype: Floating type of the shares.
    """

    def __init__(self, codes: Tensor, num_classes: int, kernel: Kernel, border: Border, *, has_ignored: bool, dtype: torch.dtype) -> None:
        self.num_classes, self.kernel, self.dtype = num_classes, kernel, dtype
        self.reach = tuple(side // 2 for side in kernel.size)
        self.spatial = tuple(codes.shape[1:])
        self.padded = _pad(codes, self.reach, {"replicate": None, "renormalize": num_classes, "zeros": num_classes + 1}[border])
        self.sums_to_one = not has_ignored and border == "replicate"
        self.mixed = _differ(self.padded, kernel.size, num_classes if has_ignored or border == "renormalize" else None)
        if has_ignored:
            self.mixed &= codes != num_classes
        count = int(torch.count_nonzero(self.mixed))
        taps = math.prod(kernel.size)
        self.dense = _WORK_OF_A_TAP * taps * count > num_classes * codes.numel()
        strides = [math.prod(self.padded.shape[axis + 2 :]) for axis in range(len(self.spatial))]
        self._strides = strides
        place = torch.int32 if math.prod(self.padded.shape[1:]) < 2**31 else torch.int64
        offsets = torch.zeros(1, dtype=place)
        for side, stride in zip(kernel.size, strides, strict=True):
            offsets = (offsets[:, None] + torch.arange(side, dtype=place) * stride).flatten()
        self._offsets = offsets[:, None]
        self._weights = None if self.dense else kernel.dense().reshape(-1, taps).to(dtype)
        self._classes = torch.arange(num_classes, dtype=self.padded.dtype).reshape(-1, *[1] * len(self.spatial))

    def at(self, image: int, pixels: Tensor) -> Tensor:
        """Shares ``(C, M)`` at M pixels of an image, given by their place in its flattened map."""
        assert self._weights is not None
        shares = torch.empty(self.num_classes, pixels.shape[0], dtype=self.dtype)
        codes = self.padded[image].flatten()
        weights = self._weights[image if self._weights.shape[0] > 1 else 0]
        step = max(1, _CHUNK // self._offsets.shape[0])
        for some, result in zip(pixels.split(step), shares.split(step, dim=1), strict=True):
            places = self._place(some.to(self._offsets.dtype)) + self._offsets
            around = codes.index_select(0, places.flatten()).long().view_as(places)
            total = torch.zeros(self.num_classes + 2, some.shape[0], dtype=self.dtype)
            total.scatter_add_(0, around, weights[:, None].expand(around.shape))
            classes = total[: self.num_classes]
            if self.sums_to_one:
                result.copy_(classes)
            else:
                torch.div(classes, classes.sum(dim=0) + total[-1], out=result)
        return shares

    def _place(self, pixels: Tensor) -> Tensor:
        """Where in the padded map the windows of pixels begin."""
        place = torch.zeros_like(pixels)
        for axis, stride in enumerate(self._strides):
            plane = math.prod(self.spatial[axis + 1 :])
            place += torch.div(pixels, plane, rounding_mode="floor") * stride
            pixels = pixels % plane
        return place

    def near_ignored(self) -> Tensor:
        """Where a window holds an ignored pixel, ``(N, *spatial)``."""
        return _extreme(self.padded == self.num_classes, self.kernel.size, torch.logical_or)

    def over(self, image: int, box: Box) -> Tensor:
        """Shares ``(C, pixels)`` at all pixels of a box; of no meaning where not valid."""
        block = self.padded[image][tuple(slice(s.start, s.stop + 2 * r) for s, r in zip(box, self.reach, strict=True))]
        kernel = self.kernel.of_image(image)
        shares = torch.empty(self.num_classes, math.prod(s.stop - s.start for s in box), dtype=self.dtype)
        step = max(1, _CHUNK // block.numel())
        for first in range(0, self.num_classes, step):
            classes = self._classes[first : first + step]
            one_hot = torch.empty((1, classes.shape[0], *block.shape), dtype=self.dtype)
            torch.eq(block, classes, out=one_hot[0])
            shares[first : first + step] = kernel.convolve(one_hot, border="inside").flatten(2)[0]
        if not self.sums_to_one:
            weight = kernel.convolve((block != self.num_classes).to(self.dtype)[None, None], border="inside").flatten()
            shares.div_(weight.masked_fill_(weight == 0, 1.0))  # a window of ignored pixels only
        return shares


def _pad(codes: Tensor, reach: tuple[int, ...], outside: int | None) -> Tensor:
    """Codes with ``reach`` more on both sides of each spatial axis: the number ``outside``, or for None the outermost codes repeated."""
    n, *spatial = codes.shape
    shape = (n, *(length + 2 * r for length, r in zip(spatial, reach, strict=True)))
    inner = tuple(slice(r, r + length) for length, r in zip(spatial, reach, strict=True))
    padded = codes.new_empty(shape) if outside is None else codes.new_full(shape, outside)
    padded[(slice(None), *inner)] = codes
    if outside is None:
        for axis, (length, r) in enumerate(zip(spatial, reach, strict=True), start=1):
            if r:
                # Axes before this one are whole by now, those after it are still to come.
                rows = padded[(slice(None), *[slice(None)] * (axis - 1), slice(None), *inner[axis:])]
                rows.narrow(axis, 0, r).copy_(rows.narrow(axis, r, 1))
                rows.narrow(axis, r + length, r).copy_(rows.narrow(axis, r + length - 1, 1))
    return padded


def _differ(padded: Tensor, size: tuple[int, ...], unknown: int | None) -> Tensor:
    """Where the codes of a window are not all the same, those that are ``unknown`` aside."""
    low = high = padded
    if unknown is not None:
        mask = padded == unknown
        low, high = padded.masked_fill(mask, torch.iinfo(padded.dtype).max), padded.masked_fill(mask, 0)
    return _extreme(low, size, torch.minimum) != _extreme(high, size, torch.maximum)


def _extreme(values: Tensor, size: tuple[int, ...], choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    for axis, side in enumerate(size, start=1):
        length = values.shape[axis] - side + 1
        result = values.narrow(axis, 0, length)
        for shift in range(1, side):
            result = choose(result, values.narrow(axis, shift, length))
        values = result
    return values
