"""Spatially varying label smoothing: labels soften where they change, and stay hard inside a region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.neighbourhood import Border, svls_kernel
from densecal.registry import TARGETS
from densecal.targets.base import Neighbourhood, SoftTarget
from densecal.targets.neighbour_proportions import Unit, WindowTarget
from densecal.targets.one_hot import make_target, spatial_dims_of

__all__ = ["SVLSTarget", "svls_target"]


def svls_target(
    label: Tensor,
    num_classes: int,
    *,
    kernel_size: int | Sequence[int] = 3,
    sigma: float | Sequence[float] = 1.0,
    spacing: Tensor | Sequence[float] | None = None,
    border: Border = "replicate",
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Spread each label over its neighbourhood: one half stays, the neighbours give the other half by a Gaussian.

    .. math:: q_c(x) = \frac{\sum_\delta w(\delta)\, v(x+\delta)\, \mathbf{1}[y(x+\delta) = c]}{\sum_\delta w(\delta)\, v(x+\delta)}, \quad
              w(0) = \tfrac12, \; w(\delta \ne 0) = \tfrac12\, \frac{e^{-|\delta|^2/2\sigma^2}}{\sum_{\delta' \ne 0} e^{-|\delta'|^2/2\sigma^2}}

    Ignored neighbours (v = 0) drop out of both sums, so the centre's share grows with their number and a pixel alone stays one-hot.

    Args:
        label: Label map or soft labels (of several raters, say), see :func:`densecal.targets.one_hot_target`. The map is linear, so soft labels are
            smoothed by the same window.
        num_classes: Number of classes C.
        kernel_size: Odd side of the window per axis, in pixels or voxels.
        sigma: Standard deviation per axis, > 0, in pixels or, with ``spacing``, in its unit. Larger weighs far neighbours more like near ones.
        spacing: Distance between voxels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``.
        border: ``"replicate"`` repeats the outermost pixel, ``"renormalize"`` leaves the outside out, ``"zeros"`` counts it as no class.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions, each smoothed by itself.
        ignore_index: Label to leave out; it gives no weight to its neighbours.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target whose ``probs`` ``(N, C, *spatial)`` sum to 1 over C where ``valid`` is True (less at a ``"zeros"`` border).

    Raises:
        ValueError: If ``kernel_size`` is even, ``sigma`` is not positive, or ``label`` does not have 1 to 3 spatial dims.

    Reference:
        Islam and Glocker, "Spatially Varying Label Smoothing", IPMI 2021, arXiv:2104.05788.
        The published filters take element [1, 1(, 1)] for the centre at every size; here the centre holds one half at every size.

    Example:
        >>> svls_target(torch.zeros(1, 4, 4, dtype=torch.long), num_classes=2).probs[0, :, 0, 0]
        tensor([1., 0.])
        >>> svls_target(torch.tensor([[0, 0, 1]]), num_classes=2).probs[0, 1]
        tensor([0.0000, 0.2500, 0.7500])
    """
    dims = spatial_dims_of(label, num_classes) if spatial_dims is None else spatial_dims
    recipe = Neighbourhood(svls_kernel(kernel_size, sigma, dims, spacing=spacing), border)
    return make_target(label, num_classes, recipe, activation=activation, ignore_index=ignore_index, spatial_dims=dims, dtype=dtype)


@TARGETS.register("svls")
class SVLSTarget(WindowTarget):
    """Module of :func:`svls_target`.

    Args:
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation per axis, in ``unit``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> SVLSTarget(sigma=2.0)(torch.tensor([[0, 0, 1]]), 2).probs[0, 1]
        tensor([0.0000, 0.2500, 0.7500])
    """

    def __init__(
        self,
        *,
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index)

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return svls_target(
            label,
            num_classes,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
            spacing=self.spacing(context),
            border=self.border,
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )
