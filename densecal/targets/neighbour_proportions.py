"""The share of each class around a pixel, the pixel itself included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice, check_odd, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.neighbourhood import BORDERS, Border, Kernel, gaussian_kernel, mean_kernel, svls_kernel
from densecal.registry import TARGETS
from densecal.targets.base import Neighbourhood, SoftTarget, Target
from densecal.targets.one_hot import make_target, spatial_dims_of

__all__ = ["NeighbourProportionsTarget", "Unit", "Window", "WindowTarget", "neighbour_proportions_target", "spacing_in", "window_kernel"]

Unit: TypeAlias = Literal["voxel", "mm"]
Window: TypeAlias = Literal["mean", "gaussian", "svls"]


def window_kernel(
    kernel: Window,
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float],
    spatial_dims: int,
    *,
    spacing: Tensor | Sequence[float] | None = None,
) -> Kernel:
    """The window of a name: ``"mean"`` (``sigma`` and ``spacing`` play no part), ``"gaussian"`` or ``"svls"``.

    Raises:
        ValueError: If the name is unknown, a side even or ``sigma`` not positive.

    Example:
        >>> window_kernel("mean", 3, 1.0, 1).size
        (3,)
    """
    check_choice("kernel", kernel, ("mean", "gaussian", "svls"))
    if kernel == "mean":
        return mean_kernel(kernel_size, spatial_dims)
    make = gaussian_kernel if kernel == "gaussian" else svls_kernel
    return make(kernel_size, sigma, spatial_dims, spacing=spacing)


def neighbour_proportions_target(
    label: Tensor,
    num_classes: int,
    *,
    kernel: Window = "mean",
    kernel_size: int | Sequence[int] = 3,
    sigma: float | Sequence[float] = 1.0,
    spacing: Tensor | Sequence[float] | None = None,
    border: Border = "replicate",
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Share of each class in the window, the centre included: the prior of NACL.

    .. math:: \tau_c(x) = \frac{\sum_\delta w(\delta)\, v(x+\delta)\, \mathbf{1}[y(x+\delta) = c]}{\sum_\delta w(\delta)\, v(x+\delta)}

    Args:
        label: Label map or soft labels, see :func:`densecal.targets.one_hot_target`.
        num_classes: Number of classes C.
        kernel: ``"mean"``, a sampled ``"gaussian"``, or the ``"svls"`` stencil, whose centre holds one half.
        kernel_size: Odd side of the window per axis, in pixels or voxels.
        sigma: Standard deviation per axis for the last two, in pixels or, with ``spacing``, in its unit.
        spacing: Distance between voxels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions, each by itself.
        ignore_index: Label to leave out; it gives no weight to its neighbours.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target whose ``probs`` ``(N, C, *spatial)`` sum to 1 over C where ``valid`` is True (less at a ``"zeros"`` border).

    Raises:
        ValueError: If ``kernel`` or ``border`` is unknown, ``kernel_size`` is even, or ``sigma`` is not positive.

    Reference:
        Murugesan et al., "Trust your neighbours", MICCAI 2023, arXiv:2303.06268; MedIA 2024, arXiv:2401.14487.
        Differs from the code: it pads labels with class 0 at the border, MONAI's version the one-hot with zeros (here ``border="zeros"``).

    Example:
        >>> neighbour_proportions_target(torch.tensor([[0, 0, 1]]), num_classes=2).probs[0, 1]
        tensor([0.0000, 0.3333, 0.6667])
    """
    dims = spatial_dims_of(label, num_classes) if spatial_dims is None else spatial_dims
    recipe = Neighbourhood(window_kernel(kernel, kernel_size, sigma, dims, spacing=spacing), border)
    return make_target(label, num_classes, recipe, activation=activation, ignore_index=ignore_index, spatial_dims=dims, dtype=dtype)


def check_window(kernel_size: int | Sequence[int], sigma: float | Sequence[float], unit: str, border: str) -> None:
    """Check a window's options when it is built, not at the first batch."""
    for side in [kernel_size] if isinstance(kernel_size, int) else kernel_size:
        check_odd("kernel_size", side)
    for value in [sigma] if isinstance(sigma, (int, float)) else sigma:
        check_positive("sigma", value)
    check_choice("unit", unit, ("voxel", "mm"))
    check_choice("border", border, BORDERS)


def spacing_in(context: Mapping[str, Any] | None, unit: str) -> Tensor | Sequence[float] | None:
    """The side input ``spacing`` where sigma is in mm; else None."""
    if unit == "voxel":
        return None
    if context is None or "spacing" not in context:
        raise ValueError("Expected the side input 'spacing' for unit='mm', but got none. Pass context={'spacing': ...} or use unit='voxel'.")
    return context["spacing"]


class WindowTarget(Target):
    """Base of targets with a window: checks and keeps its options.

    Args:
        kernel_size: Odd side per axis.
        sigma: Standard deviation per axis, > 0.
        unit: Unit of ``sigma``; ``"mm"`` needs the side input ``spacing``.
        border: What lies outside.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.
    """

    def __init__(
        self,
        *,
        kernel_size: int | Sequence[int],
        sigma: float | Sequence[float],
        unit: Unit,
        border: Border,
        activation: Activation,
        ignore_index: int,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        check_window(kernel_size, sigma, unit, border)
        self.kernel_size = kernel_size
        self.sigma = sigma
        self.unit: Unit = unit
        self.border: Border = border
        self.needs = ("spacing",) if unit == "mm" else ()

    def spacing(self, context: Mapping[str, Any] | None) -> Tensor | Sequence[float] | None:
        """Voxel spacing from the side inputs, or None for sigma in voxels."""
        return spacing_in(context, self.unit)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, sigma={self.sigma}, unit={self.unit!r}, border={self.border!r}, {super().extra_repr()}"


@TARGETS.register("neighbour_proportions")
class NeighbourProportionsTarget(WindowTarget):
    """Module of :func:`neighbour_proportions_target`.

    Args:
        kernel: ``"mean"``, ``"gaussian"`` or ``"svls"``.
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation per axis, in ``unit``; plays no part for ``"mean"``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> NeighbourProportionsTarget()(torch.tensor([[0, 0, 1]]), 2).probs[0, 1]
        tensor([0.0000, 0.3333, 0.6667])
    """

    def __init__(
        self,
        *,
        kernel: Window = "mean",
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index)
        check_choice("kernel", kernel, ("mean", "gaussian", "svls"))
        self.kernel: Window = kernel

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return neighbour_proportions_target(
            label,
            num_classes,
            kernel=self.kernel,
            kernel_size=self.kernel_size,
            sigma=self.sigma,
            spacing=self.spacing(context),
            border=self.border,
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, {super().extra_repr()}"
