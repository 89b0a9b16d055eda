"""Focal losses by the names people know."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.focal import DualFocal, Focal

__all__ = ["DualFocalLoss", "FocalLoss"]


@LOSSES.register("focal")
class FocalLoss(CompoundLoss):
    """Focal loss (Lin et al., ICCV 2017) with hard or soft labels.

    Args:
        gamma: Power of the weight of what is already right, >= 0; 0 is cross-entropy.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> FocalLoss()(torch.zeros(1, 2, 3), torch.tensor([[0, 1, -100]]))  # (1/2)^2 log 2
        tensor(0.1733)
    """

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        term = Focal(gamma=gamma, class_weights=class_weights, reduction=reduction)
        super().__init__(OneHotTarget(activation=activation, ignore_index=ignore_index), {"focal": {"weight": 1.0, "term": term}}, backend=backend)


@LOSSES.register("dual_focal")
class DualFocalLoss(CompoundLoss):
    """Dual focal loss (Tao et al., ICML 2023) with hard or soft labels.

    Args:
        gamma: Power of the weight, >= 0; 0 is cross-entropy.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> DualFocalLoss()(torch.tensor([[[0.75], [0.25]]]).log(), torch.tensor([[0]]))  # (1/4 + 1/4)^2 log(4/3)
        tensor(0.0719)
    """

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        term = DualFocal(gamma=gamma, class_weights=class_weights, reduction=reduction)
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index), {"dual_focal": {"weight": 1.0, "term": term}}, backend=backend
        )
