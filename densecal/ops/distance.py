r"""Exact Euclidean distance to the nearest marked pixel, up to a limit, on any device.

The squared distance separates over axes (Felzenszwalb and Huttenlocher): one pass per axis of
:math:`d^2(x) \leftarrow \min_o d^2(x + o e) + (s\, o)^2`. Passes of a limited number of offsets o give every distance up to that limit exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.checks import per_axis

__all__ = ["nearest_distance", "read_spacing"]


def nearest_distance(
    mask: Tensor, *, reach: int | Sequence[int], spacing: Tensor | Sequence[float] | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Distance from each pixel's centre to that of the nearest pixel where ``mask`` is True.

    Args:
        mask: ``(N, channels, *spatial)``, bool; each channel has its own distances.
        reach: How far to look per axis, in pixels, at least 1.
        spacing: Distance between pixels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``; None is 1.
        dtype: Floating type of the distances.

    Returns:
        Same shape, in the unit of ``spacing``; inf beyond the limit, which is the smallest over the axes of ``reach`` times spacing.

    Raises:
        ValueError: If ``reach`` is below 1, or ``reach`` or ``spacing`` has not one value per axis.

    Reference:
        Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled Functions", Theory of Computing 2012.

    Example:
        >>> nearest_distance(torch.tensor([[[True, False, False, False]]]), reach=2)
        tensor([[[0., 1., 2., inf]]])
    """
    spatial_dims = mask.ndim - 2
    reaches = per_axis("reach", reach, spatial_dims)
    if min(reaches) < 1:
        raise ValueError(f"Expected `reach` to be 1 pixel or more per axis, but got {reach}.")
    steps = _steps(spacing, mask, dtype)
    squared = torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), math.inf)
    for axis, (far, step) in enumerate(zip(reaches, steps, strict=True), start=2):
        before, length = squared, squared.shape[axis]
        squared = before.clone()
        for offset in range(1, min(far, length - 1) + 1):
            for start, end in ((0, offset), (offset, 0)):  # from the left, from the right
                moved = before.narrow(axis, start, length - offset) + (step * offset) ** 2
                squared.narrow(axis, end, length - offset).clamp_(max=moved)
    limits = [far * step for far, step in zip(reaches, steps, strict=True)]
    limit = torch.stack(limits).amin(dim=0) if isinstance(limits[0], Tensor) else min(limits)
    # A hair more than the limit, so that rounding does not cut what lies on it.
    return torch.where(squared <= limit * limit * (1 + 1e-5), squared.sqrt(), math.inf)


def _steps(spacing: Tensor | Sequence[float] | None, mask: Tensor, dtype: torch.dtype) -> list[Any]:
    """Distance between pixels along each axis: 1, or a tensor that broadcasts against ``mask``."""
    spatial_dims = mask.ndim - 2
    if spacing is None:
        return [1.0] * spatial_dims
    distances = read_spacing(spacing, spatial_dims).to(device=mask.device, dtype=dtype)
    return [step.reshape(-1, *[1] * (mask.ndim - 1)) for step in distances.unbind(-1)]


def read_spacing(spacing: Tensor | Sequence[float], spatial_dims: int) -> Tensor:
    """Distance between pixels as a tensor, ``(spatial_dims,)`` or ``(N, spatial_dims)``.

    Raises:
        ValueError: If it has another shape.
    """
    distances = torch.as_tensor(spacing)
    if distances.ndim not in (1, 2) or distances.shape[-1] != spatial_dims:
        raise ValueError(
            f"Expected `spacing` of shape ({spatial_dims},) or (N, {spatial_dims}), one distance per spatial axis, but got {tuple(distances.shape)}."
        )
    return distances
