"""Label smoothing that fades with the distance to where labels change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.distance import nearest_distance
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget, Target, smooth_evenly
from densecal.targets.boundary_smoothing import boundary_mask, check_smoothing
from densecal.targets.neighbour_proportions import Unit, spacing_in
from densecal.targets.one_hot import make_target

__all__ = ["DistanceSmoothing", "DistanceSmoothingTarget", "distance_smoothing_target"]


@dataclass(frozen=True, eq=False)
class DistanceSmoothing(Recipe):
    """The share ``smoothing * exp(-distance / scale)`` spread evenly over the classes."""

    smoothing: float
    scale: float
    kernel_size: int | Sequence[int]
    reach: int | Sequence[int]
    spacing: Tensor | Sequence[float] | None = None

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        mask = boundary_mask(one_hot, valid, kernel_size=self.kernel_size, activation=activation)
        distance = nearest_distance(mask, reach=self.reach, spacing=self.spacing, dtype=one_hot.dtype)
        return smooth_evenly(one_hot, valid, activation, self.smoothing * torch.exp(-distance / self.scale))


def distance_smoothing_target(
    label: Tensor,
    num_classes: int,
    *,
    smoothing: float = 0.5,
    scale: float = 1.0,
    kernel_size: int | Sequence[int] = 3,
    reach: int | Sequence[int] | None = None,
    spacing: Tensor | Sequence[float] | None = None,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Smooth labels most where they change, and less the farther away that is.

    .. math:: q(x) = (1-\epsilon(x))\, \delta_{y(x)} + \epsilon(x) / C, \quad \epsilon(x) = \epsilon\, e^{-d(x)/s}

    where d is the Euclidean distance between pixel centres to the nearest pixel of :func:`densecal.targets.boundary_mask`: 0 for the pixels on both sides
    of a boundary, 1 for those behind them. Boundary label smoothing is the limit of a small scale. Ignored pixels make no boundary, nor do pixels whose
    window touches one, and beyond the reach nothing is smoothed.

    Args:
        label: Label map or soft labels, see :func:`densecal.targets.one_hot_target`.
        num_classes: Number of classes C.
        smoothing: The share epsilon given away at a boundary, in [0, 1].
        scale: Distance s at which the share has fallen to 1/e, > 0, in pixels or, with ``spacing``, in its unit.
        kernel_size: Odd side per axis of the window that looks for another label, in pixels.
        reach: How far the distance is followed per axis, in pixels, at least 1; see :func:`densecal.ops.nearest_distance`. None is four scales, where
            2 % of epsilon are left; with ``spacing`` it must be given.
        spacing: Distance between voxels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``.
        activation: ``"softmax"``, or ``"sigmoid"``, where each region has its own boundary and two outcomes (C = 2 in the formula).
        ignore_index: Label to leave out.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target with ``probs`` ``(N, C, *spatial)``.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1], ``scale`` is not positive, ``kernel_size`` even, or ``spacing`` given without ``reach``.

    Reference:
        Generalises Wang et al., "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666 (one share at the boundary, none elsewhere).

    Example:
        >>> distance_smoothing_target(torch.tensor([[0, 0, 0, 0, 1, 1]]), num_classes=2).probs[0, 1]
        tensor([0.0124, 0.0338, 0.0920, 0.2500, 0.7500, 0.9080])
    """
    check_smoothing(smoothing, kernel_size)
    recipe = DistanceSmoothing(smoothing, scale, kernel_size, _reach(reach, scale, in_voxels=spacing is None), spacing)
    return make_target(label, num_classes, recipe, activation=activation, ignore_index=ignore_index, spatial_dims=spatial_dims, dtype=dtype)


@TARGETS.register("distance_smoothing")
class DistanceSmoothingTarget(Target):
    """Module of :func:`distance_smoothing_target`.

    Args:
        smoothing: Share given away at a boundary, in [0, 1].
        scale: Distance at which the share has fallen to 1/e, > 0, in ``unit``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        kernel_size: Odd side per axis of the window that looks for another label, in pixels.
        reach: How far the distance is followed per axis, in pixels, at least 1. None is four scales; in mm it must be given.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> DistanceSmoothingTarget(reach=1)(torch.tensor([[0, 0, 0, 0, 1, 1]]), 2).probs[0, 1]
        tensor([0.0000, 0.0000, 0.0920, 0.2500, 0.7500, 0.9080])
    """

    def __init__(
        self,
        *,
        smoothing: float = 0.5,
        scale: float = 1.0,
        unit: Unit = "voxel",
        kernel_size: int | Sequence[int] = 3,
        reach: int | Sequence[int] | None = None,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        check_smoothing(smoothing, kernel_size)
        check_choice("unit", unit, ("voxel", "mm"))
        self.smoothing = smoothing
        self.scale = scale
        self.unit: Unit = unit
        self.kernel_size = kernel_size
        self.reach = _reach(reach, scale, in_voxels=unit == "voxel")
        self.needs = ("spacing",) if unit == "mm" else ()

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return distance_smoothing_target(
            label,
            num_classes,
            smoothing=self.smoothing,
            scale=self.scale,
            kernel_size=self.kernel_size,
            reach=self.reach,
            spacing=spacing_in(context, self.unit),
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"smoothing={self.smoothing}, scale={self.scale}, unit={self.unit!r}, kernel_size={self.kernel_size}, reach={self.reach}, "
            f"{super().extra_repr()}"
        )


def _reach(reach: int | Sequence[int] | None, scale: float, *, in_voxels: bool) -> int | Sequence[int]:
    check_positive("scale", scale)
    if reach is None:
        if not in_voxels:
            raise ValueError("Expected `reach` in pixels where the scale is in mm, but got None. Four scales over the smallest spacing lose little.")
        return math.ceil(4 * scale)
    for far in [reach] if isinstance(reach, int) else reach:
        if far < 1:
            raise ValueError(f"Expected `reach` to be 1 pixel or more per axis, but got {reach}.")
    return reach
