"""Adaptive and conditional label smoothing as a loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.acls import AdaptiveConditionalMargin
from densecal.terms.cross_entropy import CrossEntropy

__all__ = ["ACLSLoss"]


@LOSSES.register("acls")
class ACLSLoss(CompoundLoss):
    """Cross-entropy plus the two hinges on the logits (Park et al., ICCV 2023); see :class:`densecal.terms.AdaptiveConditionalMargin`.

    Args:
        weight: Weight of the penalty, >= 0, or a schedule of it.
        weight_largest: Weight in it of the hinge on the largest logit, >= 0.
        weight_others: Weight in it of the hinge on how far the others lie below, >= 0.
        margin: Margin of both, in logits, >= 0.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> parts = ACLSLoss(margin=1.0).terms(torch.tensor([[[4.0], [0.0]]]), torch.tensor([[0]]))
        >>> {name: round(part.item(), 4) for name, part in parts.items()}
        {'ce': 0.0181, 'acls': 9.9}
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 0.1,
        weight_largest: float = 1.0,
        weight_others: float = 0.1,
        margin: float = 10.0,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        penalty = AdaptiveConditionalMargin(weight_largest=weight_largest, weight_others=weight_others, margin=margin, reduction=reduction)
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)},
                "acls": {"weight": weight, "term": penalty},
            },
            backend=backend,
        )
