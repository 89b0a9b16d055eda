"""Where labels change: pixels whose window, or whose neighbour, holds another class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_odd, per_axis

__all__ = ["boundary_region", "face_boundary", "window_maximum"]

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def boundary_region(labels: Tensor, valid: Tensor, *, kernel_size: int | Sequence[int] = 3) -> Tensor:
    """Valid pixels in whose window the labels are not all the same, channel by channel.

    Labels are compared, nothing is summed, so there is no rounding to decide about. Ignored pixels and the outside of the image take no part.

    Args:
        labels: Class numbers ``(N, 1, *spatial)``, or class shares ``(N, C, *spatial)``, floating, 1 to 3 spatial dims.
        valid: False where a pixel is ignored, ``(N, *spatial)``, bool.
        kernel_size: Odd side of the window per axis, in pixels.

    Returns:
        Bool, of the shape of ``labels``; False where not valid.

    Raises:
        ValueError: If ``kernel_size`` is even.

    Example:
        >>> boundary_region(torch.tensor([[[0.0, 0.0, 2.0, 2.0, 1.0]]]), torch.tensor([[True, True, True, True, False]]))
        tensor([[[False,  True,  True, False, False]]])
    """
    mask = valid.unsqueeze(1)
    lowest = torch.finfo(labels.dtype).min
    largest, minus_smallest = (window_maximum(torch.where(mask, values, lowest), kernel_size) for values in (labels, -labels))
    return (largest != -minus_smallest) & mask


def face_boundary(labels: Tensor, valid: Tensor) -> Tensor:
    """Valid pixels that share a face with a valid pixel of another label, channel by channel: 2 neighbours in 1D, 4 in 2D, 6 in 3D.

    Args:
        labels: ``(N, channels, *spatial)``, any dtype.
        valid: False where a pixel is ignored, ``(N, *spatial)``, bool.

    Returns:
        Bool, of the shape of ``labels``; False where not valid.

    Example:
        >>> face_boundary(torch.tensor([[[0, 0, 2, 2, 1]]]), torch.tensor([[True, True, True, True, False]]))
        tensor([[[False,  True,  True, False, False]]])
    """
    mask = valid.unsqueeze(1)
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(2, labels.ndim):
        length = labels.shape[axis] - 1
        if length > 0:
            sides = [(0, length), (1, length)]
            differs = labels.narrow(axis, *sides[0]) != labels.narrow(axis, *sides[1])
            for side in sides:
                differs = differs & mask.narrow(axis, *side)
            for side in sides:
                boundary.narrow(axis, *side).logical_or_(differs)
    return boundary


def window_maximum(values: Tensor, kernel_size: int | Sequence[int]) -> Tensor:
    """Largest value in the window around each pixel, channel by channel; the outside of the image takes no part.

    Args:
        values: ``(N, channels, *spatial)``, floating, 1 to 3 spatial dims.
        kernel_size: Odd side of the window per axis, in pixels.

    Returns:
        Of the same shape.

    Raises:
        ValueError: If ``kernel_size`` is even or has not one side per axis.

    Example:
        >>> window_maximum(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), 3)
        tensor([[[1., 1., 1., 0.]]])
    """
    spatial_dims = values.ndim - 2
    sides = per_axis("kernel_size", kernel_size, spatial_dims)
    for side in sides:
        check_odd("kernel_size", side)
    return _MAX_POOL[spatial_dims](values, sides, 1, [side // 2 for side in sides])
