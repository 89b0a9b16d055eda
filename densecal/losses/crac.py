"""Class- and region-adaptive constraints as a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.crac import ConstraintPenalty, NeighbourConstraint
from densecal.terms.cross_entropy import CrossEntropy

__all__ = ["CRaCLoss"]


@LOSSES.register("crac")
class CRaCLoss(CompoundLoss):
    """Cross-entropy plus constraints on the logits that adapt per class and region (Murugesan et al., MICCAI 2024).

    See :class:`densecal.terms.NeighbourConstraint`. The multipliers are set by validation: densecal's task shows the loss the validation logits; elsewhere
    call :meth:`on_validation_batch` with each batch and :meth:`on_validation` after them.

    Args:
        num_classes: Number of channels of the logits.
        weight: Weight of the constraints, >= 0, or a schedule of it.
        margin: What an interior pixel's class shares are multiplied by, > 0.
        penalty: ``"phr"``, ``"p2"`` or ``"p3"``.
        constraint: ``"abs"``, or ``"relu"``, which holds only logits above their shares.
        per_class: Multipliers of each class's own.
        per_region: Multipliers of boundary and interior apart.
        acts_on: Constrain the ``"logits"`` or the ``"probs"``.
        kernel_size: Odd side of the window per axis, in pixels.
        border: ``"replicate"``, ``"renormalize"``, ``"zeros"`` or ``"background"`` (outside is class 0).
        multiplier_min: Smallest multiplier and the first, > 0.
        multiplier_max: Largest multiplier.
        rho: First penalty parameter, > 0.
        rho_max: Largest penalty parameter.
        rho_growth: Factor of its growth, >= 1.
        rho_every: Number of validations from one growth to the next.
        progress: Share of the last mean violation that counts as progress, > 0.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> loss = CRaCLoss(num_classes=2, margin=1.0, per_region=False)
        >>> parts = loss.terms(torch.zeros(1, 2, 3), torch.tensor([[0, 0, 0]]))
        >>> {name: round(part.item(), 4) for name, part in parts.items()}
        {'ce': 0.6931, 'crac': 0.25}
    """

    def __init__(
        self,
        *,
        num_classes: int,
        weight: float | Schedule = 1.0,
        margin: float = 10.0,
        penalty: ConstraintPenalty = "phr",
        constraint: Literal["abs", "relu"] = "abs",
        per_class: bool = True,
        per_region: bool = True,
        acts_on: Literal["logits", "probs"] = "logits",
        kernel_size: int | Sequence[int] = 3,
        border: Literal["replicate", "renormalize", "zeros", "background"] = "replicate",
        multiplier_min: float = 1e-6,
        multiplier_max: float = 1e6,
        rho: float = 1.0,
        rho_max: float = 10.0,
        rho_growth: float = 1.2,
        rho_every: int = 1,
        progress: float = 0.9,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        constraints = NeighbourConstraint(
            num_classes=num_classes,
            margin=margin,
            penalty=penalty,
            constraint=constraint,
            per_class=per_class,
            per_region=per_region,
            acts_on=acts_on,
            kernel_size=kernel_size,
            border=border,
            multiplier_min=multiplier_min,
            multiplier_max=multiplier_max,
            rho=rho,
            rho_max=rho_max,
            rho_growth=rho_growth,
            rho_every=rho_every,
            progress=progress,
            reduction=reduction,
        )
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)},
                "crac": {"weight": weight, "term": constraints},
            },
            backend=backend,
        )
