"""The parts of an image over which a measure is taken."""

from __future__ import annotations

from torch import Tensor

from densecal.checks import check_non_negative, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.targets.one_hot import one_hot_target

__all__ = ["dilate", "foreground_region"]


def dilate(region: Tensor, radius: int) -> Tensor:
    """Grow a region by ``radius`` steps to the neighbours along the axes (2 in 1D, 4 in 2D, 6 in 3D).

    Args:
        region: ``(N, *spatial)``, bool.
        radius: Number of steps, in pixels or voxels, at least 0. After r steps a pixel belongs if its city-block distance to the region is at most r.

    Returns:
        The grown region, same shape; the region itself is part of it.

    Raises:
        ValueError: If ``radius`` is negative or ``region`` does not have 1 to 3 spatial dims.

    Example:
        >>> import torch
        >>> dilate(torch.tensor([[False, False, False, True, False]]), radius=2)
        tensor([[False,  True,  True,  True,  True]])
    """
    check_non_negative("radius", radius)
    if not 2 <= region.ndim <= 4:
        raise ValueError(f"Expected `region` of shape (N, *spatial) with 1 to 3 spatial dimensions, but got {tuple(region.shape)}.")
    for _ in range(radius):
        grown = region.clone()
        for axis in range(1, region.ndim):
            length = region.shape[axis] - 1
            if length > 0:
                grown.narrow(axis, 1, length).logical_or_(region.narrow(axis, 0, length))
                grown.narrow(axis, 0, length).logical_or_(region.narrow(axis, 1, length))
        region = grown
    return region


def foreground_region(label: Tensor, *, radius: int = 3, background: int = 0, ignore_index: int = DEFAULT_IGNORE_INDEX) -> Tensor:
    """The structure and what lies within ``radius`` steps of it, where a segmentation is hard and easy background does not hide errors.

    Args:
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)`` of any integer type, or a soft reference ``(N, C, *spatial)``, floating, whose structure
            is where ``background`` does not have the largest share.
        radius: Steps of dilation along the axes, in pixels or voxels, at least 0.
        background: The class that is not structure.
        ignore_index: Label of pixels that belong to no region. Dilation passes through them.

    Returns:
        ``(N, *spatial)``, bool. All False for a case without structure.

    Raises:
        ValueError: If ``radius`` is negative or the shape is not that of labels.

    Example:
        >>> import torch
        >>> foreground_region(torch.tensor([[0, 0, 0, 0, 1, -100, 0]]), radius=1)
        tensor([[False, False, False,  True,  True, False, False]])
    """
    label = plain(label)
    if label.is_floating_point() and label.ndim > 2 and label.shape[1] > 1:
        target = one_hot_target(label, label.shape[1], ignore_index=ignore_index, spatial_dims=label.ndim - 2)
        label_map, valid = target.one_hot.argmax(1), target.valid
    else:
        label_map = label.squeeze(1) if label.ndim > 2 and label.shape[1] == 1 else label
        valid = label_map != ignore_index
    return dilate((label_map != background) & valid, radius) & valid
