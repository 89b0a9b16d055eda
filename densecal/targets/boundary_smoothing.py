"""Boundary label smoothing: labels are smoothed where they change, and one-hot elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_odd, per_axis
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.boundary import boundary_region, window_maximum
from densecal.ops.label_losses import LabelShares
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget, Target, smooth_evenly
from densecal.targets.one_hot import make_target

__all__ = ["BoundarySmoothing", "BoundarySmoothingTarget", "boundary_mask", "boundary_smoothing_target"]


def boundary_mask(one_hot: Tensor, valid: Tensor, *, kernel_size: int | Sequence[int] = 3, activation: Activation = "softmax") -> Tensor:
    """Where the window around a pixel holds another label than the pixel's.

    What lies outside the image makes no boundary, nor does an ignored pixel: a pixel whose window touches one is not on a boundary, since what
    label stands there is unknown.

    Args:
        one_hot: One-hot labels ``(N, C, *spatial)``, 0 where not valid (:attr:`densecal.targets.SoftTarget.one_hot`). The label of a pixel with soft
            labels is its largest class, under sigmoid whether a region has more than one half.
        valid: False where a pixel is ignored, ``(N, *spatial)``, bool.
        kernel_size: Odd side of the window per axis, in pixels.
        activation: ``"softmax"``, or ``"sigmoid"``, where each region has its own boundary.

    Returns:
        Bool, ``(N, 1, *spatial)`` under softmax, ``(N, C, *spatial)`` under sigmoid; False where not valid.

    Raises:
        ValueError: If ``kernel_size`` is even or has not one side per axis.

    Reference:
        Wang et al., "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666.

    Example:
        >>> one_hot = torch.tensor([[[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0]]])
        >>> boundary_mask(one_hot, torch.tensor([[True, True, True, True, False]]))[0, 0]
        tensor([False,  True,  True, False, False])
    """
    labels = (one_hot.argmax(dim=1, keepdim=True) if activation == "softmax" else one_hot > 0.5).to(torch.float32)
    near_ignored = window_maximum((~valid).unsqueeze(1).to(labels.dtype), kernel_size) > 0
    return boundary_region(labels, valid, kernel_size=kernel_size) & ~near_ignored


@dataclass(frozen=True)
class BoundarySmoothing(Recipe):
    """The share ``smoothing`` spread evenly over the classes where the window holds another label."""

    smoothing: float = 0.5
    kernel_size: int | Sequence[int] = 3

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        mask = boundary_mask(one_hot, valid, kernel_size=self.kernel_size, activation=activation)
        return smooth_evenly(one_hot, valid, activation, self.smoothing * mask.to(one_hot.dtype))

    def label_shares(self, spatial_dims: int) -> LabelShares:
        return LabelShares(smoothing=self.smoothing, boundary=per_axis("kernel_size", self.kernel_size, spatial_dims))


def boundary_smoothing_target(
    label: Tensor,
    num_classes: int,
    *,
    smoothing: float = 0.5,
    kernel_size: int | Sequence[int] = 3,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Smooth labels at boundaries and leave them one-hot elsewhere.

    .. math:: q(x) = (1-\epsilon(x))\, \delta_{y(x)} + \epsilon(x) / C, \quad
              \epsilon(x) = \epsilon\, \mathbf{1}[\exists\, \delta : y(x+\delta) \ne y(x)]

    with :math:`\delta` in the window. A pixel whose window touches an ignored pixel stays one-hot, and the outside of the image makes no boundary; see
    :func:`boundary_mask`.

    Args:
        label: Label map or soft labels, see :func:`densecal.targets.one_hot_target`.
        num_classes: Number of classes C.
        smoothing: The share epsilon given away at a boundary, in [0, 1].
        kernel_size: Odd side of the window per axis, in pixels.
        activation: ``"softmax"``, or ``"sigmoid"``, where each region has its own boundary and two outcomes (C = 2 in the formula).
        ignore_index: Label to leave out.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target with ``probs`` ``(N, C, *spatial)``.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1] or ``kernel_size`` even.

    Reference:
        Wang et al., "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666.

    Example:
        >>> boundary_smoothing_target(torch.tensor([[0, 0, 1, 1]]), num_classes=2).probs[0, 1]
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    check_smoothing(smoothing, kernel_size)
    recipe = BoundarySmoothing(smoothing, kernel_size)
    return make_target(label, num_classes, recipe, activation=activation, ignore_index=ignore_index, spatial_dims=spatial_dims, dtype=dtype)


@TARGETS.register("boundary_smoothing")
class BoundarySmoothingTarget(Target):
    """Module of :func:`boundary_smoothing_target`.

    Args:
        smoothing: Share given away at a boundary, in [0, 1].
        kernel_size: Odd side of the window per axis, in pixels.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> BoundarySmoothingTarget(smoothing=0.2)(torch.tensor([[0, 0, 1, 1]]), 2).probs[0, 1]
        tensor([0.0000, 0.1000, 0.9000, 1.0000])
    """

    def __init__(
        self,
        *,
        smoothing: float = 0.5,
        kernel_size: int | Sequence[int] = 3,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        check_smoothing(smoothing, kernel_size)
        self.smoothing = smoothing
        self.kernel_size = kernel_size

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return boundary_smoothing_target(
            label,
            num_classes,
            smoothing=self.smoothing,
            kernel_size=self.kernel_size,
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, kernel_size={self.kernel_size}, {super().extra_repr()}"


def check_smoothing(smoothing: float, kernel_size: int | Sequence[int]) -> None:
    """Check the options when they are given, not at the first batch."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"Expected `smoothing` in [0, 1], but got {smoothing}.")
    for side in [kernel_size] if isinstance(kernel_size, int) else kernel_size:
        check_odd("kernel_size", side)
