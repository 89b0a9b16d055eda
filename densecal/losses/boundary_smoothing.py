"""Cross-entropy with boundary label smoothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.targets.boundary_smoothing import BoundarySmoothingTarget
from densecal.terms.cross_entropy import CrossEntropy

__all__ = ["BoundarySmoothingLoss"]


@LOSSES.register("boundary_smoothing")
class BoundarySmoothingLoss(CompoundLoss):
    """Cross-entropy with labels smoothed where they change (Wang et al., NeurIPS 2023), in 1 to 3 dimensions.

    Args:
        smoothing: Share given away at a boundary, in [0, 1].
        kernel_size: Odd side per axis of the window that looks for another label, in pixels.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out; a pixel beside one is not smoothed.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> logits, label_map = torch.tensor([[[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]]), torch.tensor([[0, 0, 1]])
        >>> BoundarySmoothingLoss(smoothing=0.5, reduction="none")(logits, label_map)
        tensor([[0.1269, 0.6269, 0.6931]])
    """

    def __init__(
        self,
        *,
        smoothing: float = 0.5,
        kernel_size: int | Sequence[int] = 3,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        target = BoundarySmoothingTarget(smoothing=smoothing, kernel_size=kernel_size, activation=activation, ignore_index=ignore_index)
        super().__init__(target, {"ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)}}, backend=backend)
