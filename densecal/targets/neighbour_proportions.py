"""The share of each class around a pixel, the pixel itself included."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from densecal.checks import check_choice, check_odd, check_positive, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.guided_neighbourhood import Similarity
from densecal.ops.neighbourhood import BORDERS, Border, Kernel, gaussian_kernel, mean_kernel, svls_kernel
from densecal.registry import TARGETS
from densecal.targets.base import Neighbourhood, Recipe, SoftTarget, Target
from densecal.targets.image_guided import ImageGuided
from densecal.targets.label_statistic import STATISTICS, LabelStatistic, Statistic
from densecal.targets.one_hot import make_target, spatial_dims_of

__all__ = [
    "NEIGHBOURS",
    "NeighbourProportionsTarget",
    "Neighbours",
    "Unit",
    "Window",
    "WindowTarget",
    "image_in",
    "neighbour_needs",
    "neighbour_proportions_target",
    "neighbour_recipe",
    "spacing_in",
    "window_kernel",
]

Unit: TypeAlias = Literal["voxel", "mm"]
Window: TypeAlias = Literal["mean", "gaussian", "svls"]
Neighbours: TypeAlias = Literal[
    "mean",
    "gaussian",
    "svls",
    "max",
    "min",
    "median",
    "mode",
    "image_l1",
    "image_l2",
    "bilateral",
    "bilateral_as_published",
    "gradient_as_published",
]
NEIGHBOURS: tuple[Neighbours, ...] = get_args(Neighbours)
_GUIDED = ("image_l1", "image_l2", "bilateral", "bilateral_as_published", "gradient_as_published")


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


def neighbour_recipe(
    kernel: Neighbours,
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float],
    spatial_dims: int,
    *,
    intensity_scale: float = 1.0,
    border: Border = "replicate",
    spacing: Tensor | Sequence[float] | None = None,
    image: Tensor | None = None,
) -> Recipe:
    """What the neighbours of a pixel say about its class, by name; arguments as :func:`neighbour_proportions_target`.

    Raises:
        ValueError: If the name is unknown or needs an ``image`` and there is none.

    Example:
        >>> neighbour_recipe("median", 3, 1.0, 2).statistic
        'median'
    """
    check_choice("kernel", kernel, NEIGHBOURS)
    if kernel in ("mean", "gaussian", "svls"):
        return Neighbourhood(window_kernel(kernel, kernel_size, sigma, spatial_dims, spacing=spacing), border)
    if kernel in STATISTICS:
        return LabelStatistic(mean_kernel(kernel_size, spatial_dims), cast(Statistic, kernel), border)
    if image is None:
        raise ValueError(f"Expected an `image` for kernel={kernel!r}, but got none.")
    if kernel in ("image_l1", "image_l2"):
        similarity: Similarity = "l1" if kernel == "image_l1" else "l2"
        return ImageGuided(mean_kernel(kernel_size, spatial_dims), image, similarity, intensity_scale, border)
    if kernel == "gradient_as_published":
        window = mean_kernel(kernel_size, spatial_dims)
        return ImageGuided(window, image, "difference", intensity_scale, border, divisor=math.prod(window.size))
    window = gaussian_kernel(kernel_size, sigma, spatial_dims, spacing=spacing)
    if kernel == "bilateral":
        return ImageGuided(window, image, "l2", intensity_scale, border)
    # Published: the Gaussian is normalised to 1, and the mean over the window is taken on top.
    divisor = math.prod(window.size) * functools.reduce(operator.mul, [sum(axis) for axis in window.taps])
    return ImageGuided(window, image, "difference", intensity_scale, border, divisor=divisor)


def neighbour_needs(kernel: Neighbours, unit: Unit) -> tuple[str, ...]:
    """Side inputs: the ``image`` for weights that follow it, ``spacing`` for sigma in mm.

    Example:
        >>> neighbour_needs("bilateral", "mm")
        ('image', 'spacing')
    """
    return (("image",) if kernel in _GUIDED else ()) + (("spacing",) if unit == "mm" else ())


def image_in(context: Mapping[str, Any] | None, kernel: Neighbours) -> Tensor | None:
    """The side input ``image`` where the kernel follows it; else None."""
    if kernel not in _GUIDED:
        return None
    if context is None or "image" not in context:
        raise ValueError(f"Expected the side input 'image' for kernel={kernel!r}, but got none. Pass context={{'image': ...}}.")
    image: Tensor = context["image"]
    return image


def neighbour_proportions_target(
    label: Tensor,
    num_classes: int,
    *,
    kernel: Neighbours = "mean",
    kernel_size: int | Sequence[int] = 3,
    sigma: float | Sequence[float] = 1.0,
    intensity_scale: float = 1.0,
    spacing: Tensor | Sequence[float] | None = None,
    image: Tensor | None = None,
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
        kernel: What the weights w are:

            - ``"mean"``, a sampled ``"gaussian"``, or the ``"svls"`` stencil, whose centre holds one half;
            - ``"image_l1"`` :math:`\exp(-|d|)` and ``"image_l2"`` :math:`\exp(-d^2)`, with the difference of intensities
              :math:`d = (I(x+\delta) - I(x)) / s`; ``"bilateral"``, the latter times a Gaussian in space. Several channels: the mean over them of
              :math:`|d|` or :math:`d^2`;
            - ``"gradient_as_published"`` :math:`|d|` and ``"bilateral_as_published"``, the same times a Gaussian in space, as the authors' code has
              them: unlike pixels count more, the centre not at all, and the shares do not sum to 1;

            or a statistic of the class numbers in the window, which takes all of the share: ``"max"``, ``"min"``, ``"median"`` (the lower of two), for
            classes with an order only, and ``"mode"`` (ties to the smallest). Under sigmoid they act on each region's 0 and 1.
        kernel_size: Odd side of the window per axis, in pixels or voxels.
        sigma: Standard deviation per axis of a Gaussian, in pixels or, with ``spacing``, in its unit.
        intensity_scale: Unit s of the differences of intensity, > 0, in the image's unit.
        spacing: Distance between voxels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``.
        image: ``(N, channels, *spatial)``, for the kernels that follow it.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"`` (the image is zero there too).
        activation: ``"softmax"``, or ``"sigmoid"`` for regions, each by itself.
        ignore_index: Label to leave out; it gives no weight to its neighbours.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target whose ``probs`` ``(N, C, *spatial)`` sum to 1 over C where ``valid`` is True (less at a ``"zeros"`` border, anything as published).

    Raises:
        ValueError: If ``kernel`` or ``border`` is unknown, ``kernel_size`` is even, ``sigma`` or ``intensity_scale`` is not positive, or the kernel
            follows an image and there is none or one of another shape.

    Reference:
        Murugesan et al., "Trust your neighbours", MICCAI 2023, arXiv:2303.06268; MedIA 2024, arXiv:2401.14487.
        Differs from the code: it pads labels with class 0 at the border, MONAI's version the one-hot with zeros (here ``border="zeros"``); its
        "gaussian" is ``"svls"``, its "bilateral" and "gradient" are the two ``as_published``, and it takes images of one channel.

    Example:
        >>> neighbour_proportions_target(torch.tensor([[0, 0, 1]]), num_classes=2).probs[0, 1]
        tensor([0.0000, 0.3333, 0.6667])
    """
    dims = spatial_dims_of(label, num_classes) if spatial_dims is None else spatial_dims
    recipe = neighbour_recipe(
        kernel,
        kernel_size,
        sigma,
        dims,
        intensity_scale=intensity_scale,
        border=border,
        spacing=spacing,
        image=None if image is None else plain(image),
    )
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
        kernel: ``"mean"``, ``"gaussian"``, ``"svls"``; ``"max"``, ``"min"``, ``"median"`` (for classes with an order), ``"mode"``; or, with the side
            input ``image``, ``"image_l1"``, ``"image_l2"``, ``"bilateral"``, ``"bilateral_as_published"``, ``"gradient_as_published"``.
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation per axis of a Gaussian, in ``unit``.
        intensity_scale: Unit of the differences of intensity, > 0.
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
        kernel: Neighbours = "mean",
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        intensity_scale: float = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index)
        check_choice("kernel", kernel, NEIGHBOURS)
        check_positive("intensity_scale", intensity_scale)
        self.kernel: Neighbours = kernel
        self.intensity_scale = intensity_scale
        self.needs = neighbour_needs(kernel, unit)

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
            intensity_scale=self.intensity_scale,
            spacing=self.spacing(context),
            image=image_in(context, self.kernel),
            border=self.border,
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, {super().extra_repr()}"
