"""Average calibration error of each class as a term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.ops.activation import probabilities
from densecal.ops.binning import accumulate_bins, accumulate_soft_bins
from densecal.ops.reduction import REDUCTIONS, Reduction, reduce
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import Term

__all__ = ["MarginalL1ACE"]


@TERMS.register("ml1_ace")
class MarginalL1ACE(Term):
    r"""Marginal L1 average calibration error: per image and class, how far mean probability and mean target lie apart in a bin, averaged over bins.

    .. math:: \frac{1}{N\, C} \sum_{n, c} w_c \frac{1}{|B_{nc}|} \sum_{b \in B_{nc}} \big| \bar p_{ncb} - \bar q_{ncb} \big|

    The bins are those of densecal's calibration metrics, B_nc the ones that hold a pixel. Every such bin counts alike ("average"), however few its pixels.
    Only the mean probabilities have a gradient, not which bin a pixel falls into. Images without a valid pixel do not count.

    Args:
        num_bins: Number of bins of equal width.
        binning: ``"hard"``, each pixel in one bin, or ``"soft"``, shared between the two nearest by the distances to their centres.
        include_background: Count class 0.
        class_weights: Multiplies each class's error; not normalised.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per image and class, ``(N, C)`` (C - 1 without background).

    Raises:
        ValueError: If ``num_bins`` is not positive, an option unknown, or a single channel has to be without background.

    Reference:
        Barfoot et al., "Average Calibration Error: A Differentiable Loss for Improved Reliability in Image Segmentation", MICCAI 2024, arXiv:2403.06759;
        "Average Calibration Losses for Reliable Uncertainty in Medical Image Segmentation", arXiv:2506.03942.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> probs = torch.tensor([[[0.8, 0.9, 0.3], [0.2, 0.1, 0.7]]])  # class 0 in two bins: |0.85 - 1| and |0.3 - 1|
        >>> round(MarginalL1ACE(num_bins=2)(probs.log(), one_hot_target(torch.tensor([[0, 0, 0]]), 2)).item(), 4)
        0.425
    """

    can_sync_stats = True

    def __init__(
        self,
        *,
        num_bins: int = 20,
        binning: Literal["hard", "soft"] = "hard",
        include_background: bool = True,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weights=class_weights)
        check_positive("num_bins", num_bins)
        check_choice("binning", binning, ("hard", "soft"))
        check_choice("reduction", reduction, REDUCTIONS)
        self.num_bins = num_bins
        self.binning: Literal["hard", "soft"] = binning
        self.include_background = include_background
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        class_weights = self.weights_for(logits)
        first = 0 if self.include_background else 1
        if first and logits.shape[1] < 2:
            raise ValueError("Expected at least 2 channels with include_background=False, but got 1. A single foreground channel has no background.")
        p = probabilities(logits, target.activation)[:, first:].flatten(2)  # (N, C, P)
        q = target.probs[:, first:].flatten(2)
        valid = target.valid.flatten(1).unsqueeze(1)  # (N, 1, P)
        n, c = p.shape[:2]
        row = torch.arange(n * c, device=p.device).view(n, c, 1)
        accumulate = accumulate_bins if self.binning == "hard" else accumulate_soft_bins
        bins = accumulate(p, q, num_bins=self.num_bins, row=row, num_rows=n * c, valid=valid).view(n, c, self.num_bins)

        filled = bins.count > 0
        gap = (bins.confidence - bins.correct).abs() / torch.where(filled, bins.count, 1)
        error = (gap.sum(-1) / filled.sum(-1).clamp_min(1)).to(logits.dtype)  # (N, C)
        if class_weights is not None:
            error = error * class_weights[first:].to(error.dtype)
        return reduce(error, valid.any(dim=2).sum().to(error.dtype) * c, self.reduction, sync=self.sync_stats)

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, binning={self.binning!r}, include_background={self.include_background}, reduction={self.reduction!r}"
