"""The confidence penalty as a loss."""

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
from densecal.terms.entropy import NegativeEntropy

__all__ = ["ConfidencePenaltyLoss"]


@LOSSES.register("confidence_penalty")
class ConfidencePenaltyLoss(CompoundLoss):
    """Cross-entropy minus the entropy of the prediction (Pereyra et al., 2017); see :class:`densecal.terms.NegativeEntropy`.

    Args:
        weight: Weight of the entropy, >= 0, or a schedule of it. Where published code averages the entropy over C classes, its weight is C times this one.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> ConfidencePenaltyLoss(weight=0.5)(torch.zeros(1, 2, 1), torch.tensor([[0]]))  # log 2 - log 2 / 2
        tensor(0.3466)
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 0.1,
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
                "entropy": {"weight": weight, "term": NegativeEntropy(reduction=reduction)},
            },
            backend=backend,
        )
