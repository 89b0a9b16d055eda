"""Label-distributionally robust loss."""

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
from densecal.terms.ldr import LDRKL

__all__ = ["LDRLoss"]


@LOSSES.register("ldr_kl")
class LDRLoss(CompoundLoss):
    r"""LDR-KL loss (Zhu et al., ICML 2023): between cross-entropy and the multi-class hinge; see :class:`densecal.terms.LDRKL`.

    Args:
        temperature: :math:`\lambda > 0`; 1 with ``margin=0`` is cross-entropy less log C, towards 0 it is the hinge.
        margin: By how much the label's logit should exceed the others, >= 0.
        adapt: Strength a > 0 of a temperature per pixel (less for larger a), or None for the same everywhere.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> LDRLoss(temperature=0.01)(torch.tensor([[[3.0], [0.0]]]), torch.tensor([[1]]))  # nearly the hinge, 3 - 0 + 1
        tensor(3.9931)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        margin: float = 1.0,
        adapt: float | None = None,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        term = LDRKL(temperature=temperature, margin=margin, adapt=adapt, class_weights=class_weights, reduction=reduction)
        super().__init__(OneHotTarget(activation=activation, ignore_index=ignore_index), {"ldr_kl": {"weight": 1.0, "term": term}}, backend=backend)
