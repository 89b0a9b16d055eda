"""Where labels change: pixels whose window holds another class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_odd, per_axis

__all__ = ["boundary_region"]

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
    spatial_dims = labels.ndim - 2
    sides = per_axis("kernel_size", kernel_size, spatial_dims)
    for side in sides:
        check_odd("kernel_size", side)
    mask = valid.unsqueeze(1)
    lowest = torch.finfo(labels.dtype).min

    def largest(values: Tensor) -> Tensor:
        return _MAX_POOL[spatial_dims](torch.where(mask, values, lowest), sides, 1, [side // 2 for side in sides])

    return (largest(labels) != -largest(-labels)) & mask
