"""Penalty that draws the logits towards the shares of the classes around a pixel (NACL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.ops.activation import probabilities
from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import NeighbourPart
from densecal.ops.neighbourhood import Border
from densecal.ops.reduction import REDUCTIONS, Reduction, reduce
from densecal.registry import TERMS
from densecal.targets.base import Recipe, SoftTarget
from densecal.targets.neighbour_proportions import NEIGHBOURS, Neighbours, Unit, check_window, image_in, neighbour_needs, neighbour_recipe, spacing_in
from densecal.terms.base import Fused, Term

__all__ = ["NeighbourPenalty"]


@TERMS.register("neighbour")
class NeighbourPenalty(Term):
    r"""Distance between the logits and the class shares :math:`\tau` of the neighbourhood.

    .. math:: \frac{1}{|V|\, C} \sum_{x \in V} \sum_c |\tau_c(x) - z_c(x)|^d

    The shares come from the labels as they were given, before any smoothing of the target.

    Args:
        distance: ``"l1"`` (d = 1) or ``"l2"`` (d = 2, squared).
        acts_on: Act on the ``"logits"`` (as published) or on the ``"probs"``.
        kernel: Window of the shares, any of :func:`densecal.targets.neighbour_proportions_target`: ``"mean"``, ``"gaussian"``, ``"svls"`` (centre one
            half); ``"max"``, ``"min"``, ``"median"`` (for classes with an order), ``"mode"``; or, with the side input ``image``, ``"image_l1"``,
            ``"image_l2"``, ``"bilateral"``, ``"bilateral_as_published"``, ``"gradient_as_published"``.
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation per axis of a Gaussian, in ``unit``.
        intensity_scale: Unit of the differences of intensity, > 0, where the window follows the image.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"``, or ``"zeros"`` (MONAI's).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the mean over classes at each pixel.

    Raises:
        ValueError: If an option is unknown, ``kernel_size`` even, or ``sigma`` or ``intensity_scale`` not positive.

    Reference:
        Murugesan et al., "Trust your neighbours", MICCAI 2023, arXiv:2303.06268; MedIA 2024, arXiv:2401.14487.
        Differs from the code, which counts the outside as class 0 and keeps ignored pixels in the penalty.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> NeighbourPenalty()(torch.zeros(1, 2, 3), one_hot_target(torch.tensor([[0, 0, 1]]), 2))
        tensor(0.5000)
    """

    can_sync_stats = True

    def __init__(
        self,
        *,
        distance: Literal["l1", "l2"] = "l1",
        acts_on: Literal["logits", "probs"] = "logits",
        kernel: Neighbours = "mean",
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        intensity_scale: float = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("distance", distance, ("l1", "l2"))
        check_choice("acts_on", acts_on, ("logits", "probs"))
        check_choice("kernel", kernel, NEIGHBOURS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_window(kernel_size, sigma, unit, border)
        check_positive("intensity_scale", intensity_scale)
        self.distance: Literal["l1", "l2"] = distance
        self.acts_on: Literal["logits", "probs"] = acts_on
        self.kernel: Neighbours = kernel
        self.kernel_size, self.sigma, self.intensity_scale = kernel_size, sigma, intensity_scale
        self.unit: Unit = unit
        self.border: Border = border
        self.reduction: Reduction = reduction
        self.needs = neighbour_needs(kernel, unit)

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        shares = self._recipe(logits, context)(target.one_hot, target.valid, target.activation).to(logits.dtype)
        values = logits if self.acts_on == "logits" else probabilities(logits, target.activation)
        gap = shares - values
        gap = gap.abs() if self.distance == "l1" else gap.square()
        per_pixel = torch.where(target.valid, gap.mean(dim=1), 0.0)
        return reduce(per_pixel, target.valid.sum().to(per_pixel.dtype), self.reduction, sync=self.sync_stats)

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        if self.acts_on != "logits":
            raise NotCovered(f"acts_on={self.acts_on!r} of {type(self).__name__} is in no kernel")
        part = NeighbourPart(self._recipe(logits, context).label_shares(logits.ndim - 2), self.distance)
        return Fused(part, lambda result: reduce(result.values, result.count, self.reduction, sync=self.sync_stats), self.reduction == "none")

    def _recipe(self, logits: Tensor, context: Mapping[str, Any] | None) -> Recipe:
        return neighbour_recipe(
            self.kernel,
            self.kernel_size,
            self.sigma,
            logits.ndim - 2,
            intensity_scale=self.intensity_scale,
            border=self.border,
            spacing=spacing_in(context, self.unit),
            image=image_in(context, self.kernel),
        )

    def extra_repr(self) -> str:
        return f"distance={self.distance!r}, acts_on={self.acts_on!r}, kernel={self.kernel!r}, kernel_size={self.kernel_size}, border={self.border!r}"
