r"""Normalised convolution of a class map with a separable window, in 1 to 3 spatial dimensions.

.. math:: t_c(x) = \frac{\sum_\delta w(\delta)\, v(x+\delta)\, q_c(x+\delta)}{\sum_\delta w(\delta)\, v(x+\delta)}

with the validity v (0 where a pixel is ignored). Ignored pixels drop out of both sums, so the shares of the others add up to 1.

A pass over one axis is a handful of shifted multiply-adds. They run in the tensor's own dtype (autocast would turn a convolution of labels into half
precision), on any device, and ``torch.compile`` fuses them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from densecal.checks import check_choice, check_odd, check_positive, per_axis

__all__ = ["BORDERS", "Border", "Kernel", "gaussian_kernel", "mean_kernel", "normalized_convolution", "svls_kernel"]

Border: TypeAlias = Literal["replicate", "renormalize", "zeros"]
BORDERS = ("replicate", "renormalize", "zeros")

Padding: TypeAlias = Literal["replicate", "zeros", "inside"]
"""What a convolution finds outside; ``"inside"``: nothing, it stays inside."""

Weight: TypeAlias = "float | Tensor"
"""One weight for the whole batch, or one per image of shape ``(N,)``."""


@dataclass(frozen=True)
class Kernel:
    """A window as a product of one-dimensional weights, with the centre of an SVLS stencil as an option.

    Made by :func:`mean_kernel`, :func:`gaussian_kernel` and :func:`svls_kernel`.

    Args:
        taps: Per axis, the weights from one end of the window to the other, the centre in the middle and equal to 1. A weight is a number or, where
            the images of a batch differ in voxel spacing, a tensor of shape ``(N,)``.
        half_centre: Replace the centre by the sum of all other weights, so that it holds one half (SVLS).
        side_taps: For ``half_centre``, the weights beside the centre (whose own entry is 0) in units of ``side_unit``, which keeps those of a narrow
            Gaussian from vanishing in single precision.
        side_unit: The largest weight beside the centre.
    """

    taps: tuple[tuple[Weight, ...], ...]
    half_centre: bool = False
    side_taps: tuple[tuple[Weight, ...], ...] = ()
    side_unit: Weight = 1.0

    @property
    def size(self) -> tuple[int, ...]:
        """Side of the window per axis."""
        return tuple(len(axis) for axis in self.taps)

    def of_image(self, image: int) -> Kernel:
        """The window of one image of the batch, its weights numbers."""

        def number(weight: Weight) -> float:
            return float(weight[image]) if isinstance(weight, Tensor) else weight

        taps, side_taps = (tuple(tuple(number(w) for w in axis) for axis in axes) for axes in (self.taps, self.side_taps))
        return Kernel(taps, self.half_centre, side_taps, number(self.side_unit))

    def convolve(self, values: Tensor, *, border: Padding) -> Tensor:
        """Weighted mean of ``values`` ``(N, channels, *spatial)`` over the window; the weights sum to 1.

        With ``border="inside"`` only over windows that lie in the image, so that each axis loses ``size - 1``.
        """
        if self.half_centre:
            beside, total = self._beside_centre(values, border)
            for axis, weights in enumerate(self.taps):
                values = _crop(values, axis + 2, weights, border)
            return values if beside is None else _add(0.5 * values, beside, 0.5 / total)
        total = 1.0
        for axis, weights in enumerate(self.taps):
            values = _axis_pass(values, axis + 2, weights, border)
            total = total * sum(weights)
        return values * _broadcast(1.0 / total, values)

    def _beside_centre(self, values: Tensor, border: Padding) -> tuple[Tensor | None, Any]:
        # With centre weight 1 on every axis: all weights so far = full, all but the central one = beside. One more axis with weights n beside its
        # centre gives beside' = n * full + beside and full' = full + n * full. Nothing is subtracted, so a narrow Gaussian loses no digits.
        beside: Tensor | None = None
        total: Any = 0.0
        full_total: Any = 1.0
        full = values
        last = max((axis for axis, weights in enumerate(self.taps) if len(weights) > 1), default=-1)
        for axis, (weights, side) in enumerate(zip(self.taps, self.side_taps, strict=True)):
            if len(weights) == 1:
                continue
            new = _axis_pass(full, axis + 2, side, border)
            beside = new if beside is None else _crop(beside, axis + 2, side, border) + new
            total = total + sum(side) * full_total
            if axis < last:
                full = _add(_crop(full, axis + 2, side, border), new, self.side_unit)
                full_total = full_total * sum(weights)
        return beside, total

    def dense(self, device: torch.device | None = None) -> Tensor:
        """The whole stencil, shape ``size`` (``(N, *size)`` for one spacing per image), float64, sum 1.

        Args:
            device: Where to make it; None is PyTorch's default.

        Example:
            >>> mean_kernel(3, 2).dense().sum()
            tensor(1., dtype=torch.float64)
        """
        batch = max((w.shape[0] for axis in self.taps for w in axis if isinstance(w, Tensor)), default=0)
        impulse = torch.zeros(batch or 1, 1, *self.size, dtype=torch.float64, device=device)
        impulse.view(impulse.shape[0], -1)[:, math.prod(self.size) // 2] = 1.0
        # The stencil is symmetric, so its response to an impulse is the stencil itself.
        response = self.convolve(impulse, border="zeros")[:, 0]
        return response if batch else response[0]


def mean_kernel(kernel_size: int | Sequence[int], spatial_dims: int) -> Kernel:
    """Equal weights over the window.

    Args:
        kernel_size: Odd side per axis, in pixels.
        spatial_dims: 1, 2 or 3.

    Raises:
        ValueError: If a side is even or there is not one per axis.

    Example:
        >>> mean_kernel(3, 1).dense()
        tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
    """
    return Kernel(tuple((1.0,) * side for side in _sides(kernel_size, spatial_dims)))


def gaussian_kernel(
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float],
    spatial_dims: int,
    *,
    spacing: Tensor | Sequence[float] | None = None,
) -> Kernel:
    r"""Sampled Gaussian :math:`\exp(-r^2 / 2\sigma^2)`, its centre included.

    Args:
        kernel_size: Odd side per axis, in pixels.
        sigma: Standard deviation per axis, > 0, in pixels, or in the unit of ``spacing`` where that is given.
        spatial_dims: 1, 2 or 3.
        spacing: Distance between pixels per axis, ``(spatial_dims,)``, or per image ``(N, spatial_dims)``.

    Raises:
        ValueError: If a side is even, ``sigma`` is not positive, or there is not one value per axis.

    Example:
        >>> gaussian_kernel(3, 1.0, 1).dense()
        tensor([0.2741, 0.4519, 0.2741], dtype=torch.float64)
    """
    exponents = _exponents(kernel_size, sigma, spatial_dims, spacing)
    return Kernel(tuple(tuple(_exp(e) for e in axis) for axis in exponents))


def svls_kernel(
    kernel_size: int | Sequence[int],
    sigma: float | Sequence[float],
    spatial_dims: int,
    *,
    spacing: Tensor | Sequence[float] | None = None,
) -> Kernel:
    """Gaussian whose centre is replaced by the sum of its neighbours: the centre holds 1/2, the neighbours share 1/2.

    Arguments and errors as :func:`gaussian_kernel`. A window of one pixel has no neighbours and changes nothing.

    Example:
        >>> svls_kernel(5, 1.0, 1).dense()
        tensor([0.0456, 0.2044, 0.5000, 0.2044, 0.0456], dtype=torch.float64)
    """
    exponents = _exponents(kernel_size, sigma, spatial_dims, spacing)
    beside = [axis[len(axis) // 2 - 1] for axis in exponents if len(axis) > 1] or [0.0]
    nearest = functools.reduce(_maximum, beside)
    taps = tuple(tuple(_exp(e) for e in axis) for axis in exponents)
    side = tuple(tuple(0.0 if i == len(axis) // 2 else _exp(e - nearest) for i, e in enumerate(axis)) for axis in exponents)
    return Kernel(taps, half_centre=True, side_taps=side, side_unit=_exp(nearest))


def normalized_convolution(shares: Tensor, valid: Tensor, kernel: Kernel, *, border: Border = "replicate") -> Tensor:
    r"""Share of each class in the window around every pixel, over valid pixels only.

    Args:
        shares: Class shares per pixel (a one-hot map or soft labels), 0 where not valid, shape ``(N, C, *spatial)``, floating.
        valid: False where a pixel is ignored, shape ``(N, *spatial)``, bool.
        kernel: The window.
        border: What lies outside: ``"replicate"`` repeats the outermost pixel, ``"renormalize"`` leaves the outside out like an ignored pixel,
            ``"zeros"`` counts it as a pixel of no class, so shares sum to less than 1 there.

    Returns:
        ``(N, C, *spatial)`` of the dtype of ``shares``; 0 where not valid.

    Raises:
        ValueError: If ``border`` is none of these, or the kernel has another number of axes than ``shares``.

    Reference:
        Knutsson and Westin, "Normalized and differential convolution", CVPR 1993.

    Example:
        >>> one_hot = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
        >>> valid = torch.tensor([[True, True, True, False]])
        >>> normalized_convolution(one_hot, valid, mean_kernel(3, 1))[0, 0]
        tensor([1.0000, 0.6667, 0.5000, 0.0000])
    """
    check_choice("border", border, BORDERS)
    if len(kernel.taps) != shares.ndim - 2:
        raise ValueError(f"Expected a kernel of {shares.ndim - 2} axes for `shares` of shape {tuple(shares.shape)}, but got {len(kernel.taps)}.")
    mask = valid.unsqueeze(1)
    pad: Literal["replicate", "zeros"] = "replicate" if border == "replicate" else "zeros"
    numerator = kernel.convolve(shares, border=pad)
    if border == "zeros":
        # The outside counts as pixels of no class, so only ignored pixels are taken from the whole.
        denominator = 1.0 - kernel.convolve((~mask).to(shares.dtype), border="zeros")
    else:
        denominator = kernel.convolve(mask.to(shares.dtype), border=pad)
    # A valid pixel lies in its own window; elsewhere the denominator may be 0, and is not used.
    return torch.where(mask, numerator / torch.where(mask, denominator, 1.0), 0.0)


def _axis_pass(values: Tensor, axis: int, weights: tuple[Weight, ...], border: Padding) -> Tensor:
    reach, length = len(weights) // 2, values.shape[axis]
    if reach == 0:
        return values if weights == (1.0,) else values * _broadcast(weights[0], values)
    if border == "inside":
        padded, length = values, length - 2 * reach
    else:
        first, final = values.narrow(axis, 0, 1), values.narrow(axis, length - 1, 1)
        if border == "zeros":
            first, final = torch.zeros_like(first), torch.zeros_like(final)
        shape = list(values.shape)
        shape[axis] = reach
        padded = torch.cat([first.expand(shape), values, final.expand(shape)], dim=axis)
    taps = [(weight, padded.narrow(axis, offset, length)) for offset, weight in enumerate(weights) if isinstance(weight, Tensor) or weight != 0.0]
    if not taps:
        return torch.zeros_like(padded.narrow(axis, 0, length))
    # One that needs no multiplication goes first, if there is one.
    taps.sort(key=lambda tap: isinstance(tap[0], Tensor) or tap[0] != 1.0)
    weight, result = taps[0]
    if isinstance(weight, Tensor) or weight != 1.0:
        result = result * _broadcast(weight, values)
    for number, (weight, shifted) in enumerate(taps[1:]):
        result = _add(result, shifted, weight, out=result if number else None)
    return result


def _add(values: Tensor, others: Tensor, weight: Weight, *, out: Tensor | None = None) -> Tensor:
    """``values`` plus ``weight`` times ``others``, into ``out`` if it is ``values``."""
    if isinstance(weight, Tensor):
        factor = _broadcast(weight, values)
        return values.addcmul(others, factor) if out is None else out.addcmul_(others, factor)
    return values.add(others, alpha=weight) if out is None else out.add_(others, alpha=weight)


def _crop(values: Tensor, axis: int, weights: tuple[Weight, ...], border: Padding) -> Tensor:
    reach = len(weights) // 2
    return values.narrow(axis, reach, values.shape[axis] - 2 * reach) if border == "inside" else values


def _sides(kernel_size: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    sides = per_axis("kernel_size", kernel_size, spatial_dims)
    for side in sides:
        check_odd("kernel_size", side)
    return sides


def _exponents(
    kernel_size: int | Sequence[int], sigma: float | Sequence[float], spatial_dims: int, spacing: Tensor | Sequence[float] | None
) -> list[list[Any]]:
    """-r^2 / 2 sigma^2 per axis and tap, with sigma in pixels."""
    sides = _sides(kernel_size, spatial_dims)
    sigmas: list[Any] = list(per_axis("sigma", sigma, spatial_dims))
    for value in sigmas:
        check_positive("sigma", value)
    if spacing is not None:
        distances = torch.as_tensor(spacing, dtype=torch.float64)
        if distances.ndim not in (1, 2) or distances.shape[-1] != spatial_dims:
            raise ValueError(
                f"Expected `spacing` of shape ({spatial_dims},) or (N, {spatial_dims}), one distance per spatial axis, but got {tuple(distances.shape)}."
            )
        sigmas = [s / (d if distances.ndim == 2 else float(d)) for s, d in zip(sigmas, distances.unbind(-1), strict=True)]
    return [[-((tap - side // 2) ** 2) / (2 * s**2) for tap in range(side)] for side, s in zip(sides, sigmas, strict=True)]


def _exp(exponent: Weight) -> Weight:
    return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)


def _maximum(a: Weight, b: Weight) -> Weight:
    return torch.maximum(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else max(a, b)


def _broadcast(weight: Weight, values: Tensor) -> Any:
    """A per-image weight shaped ``(N, 1, ..., 1)`` on the device and in the dtype of ``values``; a number as it is."""
    if not isinstance(weight, Tensor):
        return weight
    return weight.to(device=values.device, dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1))
