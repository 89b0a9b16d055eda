"""The parts of an image over which a measure is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densecal.checks import check_choice, check_non_negative, check_positive, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.boundary import face_boundary
from densecal.ops.distance import nearest_distance, read_spacing
from densecal.targets.one_hot import one_hot_target

__all__ = ["boundary_band", "boundary_distance", "dilate", "foreground_region"]


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
    label_map, valid = _label_map(plain(label), ignore_index)
    return dilate((label_map != background) & valid, radius) & valid


def boundary_distance(
    label: Tensor,
    *,
    reach: float,
    spacing: Tensor | Sequence[float] | None = None,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
) -> Tensor:
    """Distance from each pixel's centre to that of the nearest boundary pixel: one that shares a face with a pixel of another class.

    Both sides of a boundary have distance 0, their neighbours behind them 1, and so on. Ignored pixels make no boundary, nor does the edge of the image.

    Args:
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)`` of any integer type, 1 to 3 spatial dims, or a soft reference ``(N, C, *spatial)``,
            floating, whose class of largest share is taken. With ``"sigmoid"`` regions ``(N, R, *spatial)``, 0 and 1 or shares (above 1/2 is inside);
            a single region has its channel axis, too.
        reach: How far to look, greater than 0: in pixels or, with ``spacing``, in its unit.
        spacing: Distance between pixels per axis, for example in millimetres, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``; None is 1.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap: then the boundary of any region counts.
        ignore_index: Label of pixels that have no class.

    Returns:
        ``(N, *spatial)``, float32, in pixels or the unit of ``spacing``; inf beyond ``reach`` and at ignored pixels.

    Raises:
        ValueError: If ``reach`` is not positive, ``activation`` unknown, or the shape is not that of labels.

    Example:
        >>> boundary_distance(torch.tensor([[0, 0, 0, 0, 1, 1, -100]]), reach=2)
        tensor([[inf, 2., 1., 0., 0., 1., inf]])
    """
    check_positive("reach", reach)
    check_choice("activation", activation, ("softmax", "sigmoid"))
    label = plain(label)
    if activation == "sigmoid":
        target = one_hot_target(label, label.shape[1], activation=activation, ignore_index=ignore_index, spatial_dims=label.ndim - 2)
        labels, valid = target.one_hot > 0.5, target.valid
    else:
        label_map, valid = _label_map(label, ignore_index)
        labels = label_map.unsqueeze(1)
    spatial_dims = labels.ndim - 2
    if not 1 <= spatial_dims <= 3:
        raise ValueError(f"Expected labels with 1 to 3 spatial dimensions, (N, *spatial) or (N, channels, *spatial), but got {tuple(label.shape)}.")
    finest = [1.0] * spatial_dims if spacing is None else read_spacing(spacing, spatial_dims).view(-1, spatial_dims).amin(0).tolist()
    boundary = face_boundary(labels, valid).any(1, keepdim=True)
    distance = nearest_distance(boundary, reach=[math.ceil(reach / step) for step in finest], spacing=spacing).squeeze(1)
    # A hair more, so that rounding does not cut what lies on the limit.
    return torch.where(valid & (distance <= reach * (1 + 1e-5)), distance, math.inf)


def boundary_band(
    label: Tensor,
    *,
    width: float = 3.0,
    spacing: Tensor | Sequence[float] | None = None,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
) -> Tensor:
    """The pixels close to where the class changes: those whose :func:`boundary_distance` is less than ``width``.

    A width of 1 pixel are the pixels that touch another class, on either side. Arguments and errors as :func:`boundary_distance`.

    Args:
        label: Label map, soft reference or regions.
        width: Width of the band on each side, greater than 0: in pixels or, with ``spacing``, in its unit.
        spacing: Distance between pixels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``; None is 1.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels that belong to no region.

    Returns:
        ``(N, *spatial)``, bool. All False for a case of one class.

    Example:
        >>> boundary_band(torch.tensor([[0, 0, 0, 0, 1, 1, -100]]), width=2)
        tensor([[False, False,  True,  True,  True,  True, False]])
    """
    check_positive("width", width)
    distance = boundary_distance(label, reach=width, spacing=spacing, activation=activation, ignore_index=ignore_index)
    # A hair less, so that rounding does not take in what lies on the limit.
    return distance < width * (1 - 1e-5)


def _label_map(label: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Class of each pixel and where it has one, ``(N, *spatial)``, of a label map or a soft reference."""
    if label.is_floating_point() and label.ndim > 2 and label.shape[1] > 1:
        target = one_hot_target(label, label.shape[1], ignore_index=ignore_index, spatial_dims=label.ndim - 2)
        return target.one_hot.argmax(1), target.valid
    label_map = label.squeeze(1) if label.ndim > 2 and label.shape[1] == 1 else label
    return label_map, label_map != ignore_index
