"""Labels of the same place at several times, and of its surroundings, as a prior for noisy labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.ops.neighbourhood import Border, Kernel, gaussian_kernel, normalized_convolution
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget
from densecal.targets.neighbour_proportions import Unit, WindowTarget, check_window
from densecal.targets.one_hot import one_hot_target, spatial_dims_of
from densecal.targets.rater_mean import rater_mean_target

__all__ = ["SpatioTemporal", "SpatioTemporalTarget", "spatio_temporal_target"]


@dataclass(frozen=True, eq=False)
class SpatioTemporal(Recipe):
    """``mix`` of the mean of two smoothed maps, the labels' and ``frequency`` ``(N, C, *spatial)``, which is known where ``known`` ``(N, *spatial)``."""

    frequency: Tensor
    known: Tensor
    kernel: Kernel
    border: Border = "replicate"
    mix: float = 0.5

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        spatial = normalized_convolution(one_hot, valid, self.kernel, border=self.border)
        temporal = normalized_convolution(self.frequency.to(one_hot.dtype), self.known, self.kernel, border=self.border)
        # Where no map of the stack knows the place, the spatial prior stands alone.
        prior = (spatial + temporal) / (1.0 + self.known.unsqueeze(1).to(one_hot.dtype))
        return torch.where(valid.unsqueeze(1), (1.0 - self.mix) * one_hot + self.mix * prior, 0.0)


def spatio_temporal_target(
    label: Tensor,
    num_classes: int,
    label_stack: Tensor,
    *,
    mix: float = 0.5,
    kernel_size: int | Sequence[int] = 3,
    sigma: float | Sequence[float] = 1.0,
    spacing: Tensor | Sequence[float] | None = None,
    border: Border = "replicate",
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Blend each label with what its surroundings and other times say.

    .. math:: q = (1-\lambda)\, \delta_y + \frac{\lambda}{2} \left( G * \delta_y + G * f \right), \quad
              f_c(x) = \frac{\sum_t v_t(x)\, \mathbf{1}[y_t(x) = c]}{\sum_t v_t(x)}

    with a Gaussian G over valid pixels only, normalised. Where every map of the stack ignores a pixel, the spatial prior takes the place of both.

    Args:
        label: Label map or soft labels, see :func:`densecal.targets.one_hot_target`.
        num_classes: Number of classes C.
        label_stack: Label maps of the same place at T times, ``(N, T, *spatial)``; the current one may be among them. Read as the raters of
            :func:`densecal.targets.rater_mean_target`.
        mix: Share of the priors :math:`\lambda`, in [0, 1].
        kernel_size: Odd side of the Gaussian's window per axis, in pixels.
        sigma: Standard deviation per axis, > 0, in pixels or, with ``spacing``, in its unit.
        spacing: Distance between voxels per axis, ``(spatial_dims,)`` or per image ``(N, spatial_dims)``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions, each by itself.
        ignore_index: Label to leave out; it gives no weight to its neighbours.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target whose ``probs`` ``(N, C, *spatial)`` sum to 1 over C where ``valid`` is True (less at a ``"zeros"`` border).

    Raises:
        ValueError: If ``mix`` is outside [0, 1], the window's options do not fit, or the stack has another shape than the labels.

    Reference:
        Liu et al., "CromSS: Cross-modal pre-training with noisy labels for remote sensing image segmentation", IEEE TGRS 2025, arXiv:2405.01217.

    Example:
        >>> stack = torch.tensor([[[0, 0, 0], [1, 0, 0]]])  # (1, 2, 3): two times
        >>> spatio_temporal_target(torch.tensor([[0, 0, 0]]), 2, stack, mix=0.8, kernel_size=1).probs[0, 1]
        tensor([0.2000, 0.0000, 0.0000])
    """
    _check_mix(mix)
    check_window(kernel_size, sigma, "voxel", border)
    dims = spatial_dims_of(label, num_classes) if spatial_dims is None else spatial_dims
    labels = one_hot_target(label, num_classes, activation=activation, ignore_index=ignore_index, spatial_dims=dims, dtype=dtype)
    stack = rater_mean_target(plain(label_stack), num_classes, activation=activation, ignore_index=ignore_index, spatial_dims=dims, dtype=dtype)
    if stack.valid.shape != labels.valid.shape:
        raise ValueError(
            f"Expected 'label_stack' of shape (N, T, *spatial) for labels {tuple(labels.valid.shape)}, but got {tuple(label_stack.shape)}. "
            "Crop and resample them together."
        )
    kernel = gaussian_kernel(kernel_size, sigma, dims, spacing=spacing)
    return labels.with_recipe(SpatioTemporal(stack.one_hot, stack.valid, kernel, border, mix), hard=labels.hard and mix == 0)


@TARGETS.register("spatio_temporal")
class SpatioTemporalTarget(WindowTarget):
    """Module of :func:`spatio_temporal_target`; needs the side input ``label_stack`` ``(N, T, *spatial)``.

    Args:
        mix: Share of the priors, in [0, 1].
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation per axis, in ``unit``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> target = SpatioTemporalTarget(mix=0.8, kernel_size=1)
        >>> target(torch.tensor([[0, 0, 0]]), 2, context={"label_stack": torch.tensor([[[1, 1, 0]]])}).probs[0, 1]
        tensor([0.4000, 0.4000, 0.0000])
    """

    def __init__(
        self,
        *,
        mix: float = 0.5,
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index)
        _check_mix(mix)
        self.mix = mix
        self.needs = ("label_stack", *self.needs)

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        if context is None or "label_stack" not in context:
            raise ValueError(
                "Expected the side input 'label_stack', which SpatioTemporalTarget needs, but got none. Pass context={'label_stack': ...}."
            )
        return spatio_temporal_target(
            label,
            num_classes,
            context["label_stack"],
            mix=self.mix,
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
        return f"mix={self.mix}, {super().extra_repr()}"


def _check_mix(mix: float) -> None:
    if not 0 <= mix <= 1:
        raise ValueError(f"Expected `mix` in [0, 1], but got {mix}.")
