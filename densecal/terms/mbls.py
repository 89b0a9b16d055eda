"""Margin-based label smoothing: no logit more than a margin below the largest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_non_negative
from densecal.ops.label_losses import MarginPart
from densecal.ops.reduction import Reduction
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import Fused, PixelPenalty

__all__ = ["LogitMargin"]


@TERMS.register("mbls")
class LogitMargin(PixelPenalty):
    r"""What the distances of the logits to the largest exceed a margin by.

    .. math:: \frac{1}{|V|\, C} \sum_{x \in V} \sum_c \max(0, \max_j z_j(x) - z_c(x) - m)^d

    The class with the largest logit counts in the mean, with a distance of 0. Under sigmoid the two outcomes of a channel lie :math:`|z|` apart, and C is 2.

    Args:
        margin: Distance m that is free, in logits, >= 0.
        squared: Square the excess (d = 2) instead of taking it as it is (d = 1).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the mean over classes at each pixel.

    Raises:
        ValueError: If ``margin`` is negative or ``reduction`` unknown.

    Reference:
        Liu et al., "The Devil is in the Margin", CVPR 2022, arXiv:2111.15430; MedIA 2023, arXiv:2209.09641.
        Differs from the code: its squared variant cuts at 0 after squaring, so that distances below the margin count too; one of its copies keeps
        ignored pixels.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> LogitMargin(margin=1.0)(torch.tensor([[[4.0], [0.0]]]), one_hot_target(torch.tensor([[0]]), 2))
        tensor(1.5000)
    """

    def __init__(self, *, margin: float = 10.0, squared: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_non_negative("margin", margin)
        self.margin, self.squared = margin, squared

    def per_pixel(self, logits: Tensor) -> Tensor:
        excess = F.relu(logits.amax(dim=1, keepdim=True) - logits - self.margin)
        return (excess.square() if self.squared else excess).mean(dim=1)

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        return self.fused_as(MarginPart(self.margin, self.squared, 1 / logits.shape[1]))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, squared={self.squared}, {super().extra_repr()}"
