"""Slow references of targets: loops over the formula, pixel by pixel, in plain Python numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from reference import pixels
from torch import Tensor


def around(
    x: Sequence[int], sides: Sequence[int], spatial: Sequence[int], border: str = "renormalize"
) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """Each offset of the window and the pixel there; None where it lies outside, unless the outermost pixel is repeated."""
    result: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
    for offset in itertools.product(*[range(-(k // 2), k // 2 + 1) for k in sides]):
        y = tuple(a + d for a, d in zip(x, offset, strict=True))
        if border == "replicate":
            y = tuple(min(max(a, 0), size - 1) for a, size in zip(y, spatial, strict=True))
        inside = all(0 <= a < size for a, size in zip(y, spatial, strict=True))
        result.append((offset, y if inside else None))
    return result


def boundary(label_map: Tensor, sides: Sequence[int], ignore_index: int = -100) -> Tensor:
    """True where the window holds another label and no ignored pixel."""
    result = torch.zeros(label_map.shape, dtype=torch.bool)
    for image, *x in itertools.product(*map(range, label_map.shape)):
        window = [label_map[(image, *y)].item() for _, y in around(x, sides, label_map.shape[1:]) if y is not None]
        result[(image, *x)] = ignore_index not in window and len(set(window)) > 1
    return result


def smoothed(one_hot: Tensor, valid: Tensor, share: Tensor) -> Tensor:
    """(1 - eps(x)) delta_y + eps(x) / C at valid pixels, 0 elsewhere; ``share`` is eps ``(N, *spatial)``."""
    result, c = torch.zeros_like(one_hot), one_hot.shape[1]
    for image, *x in pixels(one_hot.shape):
        if valid[(image, *x)]:
            eps = share[(image, *x)].item()
            for k in range(c):
                result[(image, k, *x)] = (1 - eps) * one_hot[(image, k, *x)].item() + eps / c
    return result
