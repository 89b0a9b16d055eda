"""Online label smoothing as a loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.online_label_smoothing import OnlineLabelSmoothing

__all__ = ["OnlineLabelSmoothingLoss"]


@LOSSES.register("online_label_smoothing")
class OnlineLabelSmoothingLoss(CompoundLoss):
    """Cross-entropy, half of it with targets learned from one epoch to the next (Zhang et al., IEEE TIP 2021).

    Call ``on_epoch`` before every epoch, as :class:`densecal.tasks.SegmentationTask` does; without it the targets stay those of label smoothing.

    Args:
        num_classes: Number of classes C, at least 2.
        weight_ce: Weight of the plain cross-entropy, >= 0.
        weight_soft: Weight of the part with learned targets, >= 0.
        smoothing: Share of the first epoch's labels spread over the other classes, in [0, 1].
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> loss = OnlineLabelSmoothingLoss(num_classes=2)
        >>> loss(torch.zeros(1, 2, 3), torch.tensor([[0, 1, -100]]))
        tensor(0.6931)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        weight_ce: float = 0.5,
        weight_soft: float = 0.5,
        smoothing: float = 0.1,
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        soft = OnlineLabelSmoothing(num_classes, smoothing=smoothing, class_weights=class_weights, reduction=reduction)
        super().__init__(
            OneHotTarget(ignore_index=ignore_index),
            {
                "ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)},
                "soft": {"weight": weight_soft, "term": soft},
            },
            backend=backend,
        )
