"""Kullback-Leibler divergence as a loss."""

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
from densecal.terms.kl import KLDivergence

__all__ = ["KLLoss"]


@LOSSES.register("kl")
class KLLoss(CompoundLoss):
    """Divergence of the prediction from soft labels, such as a teacher's distribution; see :class:`densecal.terms.KLDivergence`.

    Args:
        temperature: Softens the prediction, > 0; the soft labels are taken as already softened.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Mark of pixels to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[[2.0], [0.0]]])
        >>> KLLoss(temperature=2.0)(teacher, (teacher / 2).softmax(1)).abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        term = KLDivergence(temperature=temperature, class_weights=class_weights, reduction=reduction)
        super().__init__(OneHotTarget(activation=activation, ignore_index=ignore_index), {"kl": {"weight": 1.0, "term": term}}, backend=backend)
