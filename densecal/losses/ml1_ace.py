"""Cross-entropy, Dice and average calibration error as a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.ml1_ace import MarginalL1ACE
from densecal.terms.overlap import DiceSemimetric

__all__ = ["ML1ACELoss"]


@LOSSES.register("ml1_ace")
class ML1ACELoss(CompoundLoss):
    """Cross-entropy plus soft Dice plus the average calibration error of each class (Barfoot et al., MICCAI 2024).

    See :class:`densecal.terms.MarginalL1ACE`. The rest is :class:`densecal.losses.DiceCELoss`.

    Args:
        weight: Weight of the calibration error, >= 0, or a schedule of it.
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_dice: Weight of the Dice part, >= 0, or a schedule of it.
        num_bins: Number of bins of equal width.
        binning: ``"hard"``, each pixel in one bin, or ``"soft"``, shared between the two nearest.
        smooth: Added above and below the Dice fraction, in pixels.
        batch: One Dice per class over the whole batch; False: per image, then the mean. The calibration error is always per image.
        include_background: Count class 0 in Dice and calibration error.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, for all parts.
        ignore_index: Label to leave out of all parts.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Example:
        >>> import torch
        >>> parts = ML1ACELoss().terms(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 0], [0, 1]]]))
        >>> {name: round(part.item(), 3) for name, part in parts.items()}
        {'ce': 0.693, 'dice': 0.533, 'ml1_ace': 0.25}
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        weight_ce: float | Schedule = 1.0,
        weight_dice: float | Schedule = 1.0,
        num_bins: int = 20,
        binning: Literal["hard", "soft"] = "hard",
        smooth: float = 1e-3,
        batch: bool = True,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        dice = DiceSemimetric(
            smooth=smooth,
            weight_batch=float(batch),
            weight_image=float(not batch),
            include_background=include_background,
            class_weights=class_weights,
        )
        ace = MarginalL1ACE(num_bins=num_bins, binning=binning, include_background=include_background, class_weights=class_weights)
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)},
                "dice": {"weight": weight_dice, "term": dice},
                "ml1_ace": {"weight": weight, "term": ace},
            },
            backend=backend,
            sync_stats=sync_stats,
        )
