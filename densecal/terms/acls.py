"""ACLS: adaptive and conditional label smoothing as a penalty on the logits."""

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

__all__ = ["AdaptiveConditionalMargin"]


@TERMS.register("acls")
class AdaptiveConditionalMargin(PixelPenalty):
    r"""A squared hinge on the largest logit, and one on how far the others lie below it.

    .. math:: \frac{1}{|V|} \sum_{x \in V} \Big( \lambda_1 \max(0, z_{max} - m)^2
              + \frac{\lambda_2}{C-1} \sum_{c \neq c_{max}} \max(0, \mathrm{sg}(z_{max}) - z_c - m)^2 \Big)

    with the stop gradient sg. The first hinge acts on the logit itself: adding a number to all logits changes the value. Where several logits are the
    largest, one of them counts as such. Under sigmoid the outcomes of a channel have the logits z/2 and -z/2, so the largest is :math:`|z|/2`.

    Args:
        weight_largest: Weight :math:`\lambda_1` of the hinge on the largest logit, >= 0.
        weight_others: Weight :math:`\lambda_2` of the hinge on the others, >= 0.
        margin: Margin m, in logits, >= 0.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.

    Raises:
        ValueError: If a number is negative or ``reduction`` unknown.

    Reference:
        Park et al., "ACLS: Adaptive and Conditional Label Smoothing for Network Calibration", ICCV 2023, arXiv:2308.11911.
        Differs from the code, which counts the first hinge once per tied maximum and keeps ignored pixels.

    Example:
        >>> import torch
        >>> from densecal.targets import one_hot_target
        >>> AdaptiveConditionalMargin(margin=1.0)(torch.tensor([[[4.0], [0.0]]]), one_hot_target(torch.tensor([[0]]), 2))  # 3^2 + 0.1 * 3^2
        tensor(9.9000)
    """

    def __init__(self, *, weight_largest: float = 1.0, weight_others: float = 0.1, margin: float = 10.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        for name, value in (("weight_largest", weight_largest), ("weight_others", weight_others), ("margin", margin)):
            check_non_negative(name, value)
        self.weight_largest, self.weight_others, self.margin = weight_largest, weight_others, margin

    def per_pixel(self, logits: Tensor) -> Tensor:
        largest = logits.amax(dim=1, keepdim=True)
        # The largest itself lies 0 below, within any margin, and adds nothing: there is no need to take it out of the sum.
        others = F.relu(largest.detach() - logits - self.margin).square().sum(dim=1) / (logits.shape[1] - 1)
        return self.weight_largest * F.relu(largest.squeeze(1) - self.margin).square() + self.weight_others * others

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        return self.fused_as(MarginPart(self.margin, True, self.weight_others / (logits.shape[1] - 1), self.weight_largest, detached=True))

    def extra_repr(self) -> str:
        return f"weight_largest={self.weight_largest}, weight_others={self.weight_others}, margin={self.margin}, {super().extra_repr()}"
