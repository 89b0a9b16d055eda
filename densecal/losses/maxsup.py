"""Max suppression as a loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.schedules import Linear, Schedule
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.maxsup import MaxSuppression

__all__ = ["MaxSupLoss"]


@LOSSES.register("maxsup")
class MaxSupLoss(CompoundLoss):
    """Cross-entropy plus max suppression (Zhou et al., NeurIPS 2025); see :class:`densecal.terms.MaxSuppression`.

    Args:
        weight: Weight of the penalty, >= 0, or a schedule of it. By default it grows from 0.1 in the first epoch to 0.2 in the last, if somebody calls
            :meth:`on_epoch`, as densecal's task does. One version of the published code ends an epoch's step short of 0.2: ``Linear(0.1, 0.2, until=1.0)``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> loss = MaxSupLoss()
        >>> logits, label_map = torch.tensor([[[4.0], [0.0]]]), torch.tensor([[0]])
        >>> loss.on_epoch(9, max_epochs=10)
        >>> round((loss(logits, label_map) - loss.terms(logits, label_map)["ce"]).item(), 4)  # 0.2 * (4 - 2)
        0.4
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = Linear(0.1, 0.2),  # noqa: B008 - a constant object
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
                "maxsup": {"weight": weight, "term": MaxSuppression(reduction=reduction)},
            },
            backend=backend,
        )
