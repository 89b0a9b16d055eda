"""Margin-based label smoothing as a loss."""

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
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.mbls import LogitMargin

__all__ = ["MbLSLoss"]


@LOSSES.register("mbls")
class MbLSLoss(CompoundLoss):
    """Cross-entropy plus the margin penalty on the logits (Liu et al., CVPR 2022); see :class:`densecal.terms.LogitMargin`.

    Args:
        weight: Weight of the penalty, >= 0, or a schedule of it.
        margin: Distance to the largest logit that is free, >= 0. 5 often suits medical images better.
        squared: Square the excess over the margin.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> parts = MbLSLoss(margin=1.0).terms(torch.tensor([[[4.0], [0.0]]]), torch.tensor([[0]]))
        >>> {name: round(part.item(), 4) for name, part in parts.items()}
        {'ce': 0.0181, 'mbls': 1.5}
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 0.1,
        margin: float = 10.0,
        squared: bool = False,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)},
                "mbls": {"weight": weight, "term": LogitMargin(margin=margin, squared=squared, reduction=reduction)},
            },
            backend=backend,
        )
