"""What to begin with, where there is no reason for anything else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.neighbourhood import Border
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.neighbour_proportions import Unit
from densecal.targets.svls import SVLSTarget
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.overlap import DiceSemimetric

__all__ = ["RecommendedLoss"]


@LOSSES.register("recommended")
class RecommendedLoss(CompoundLoss):
    r"""Cross-entropy and Dice semimetric on labels that are unsure near boundaries (SVLS): our choice among the methods here, by the studies of ``docs/studies``.

    .. math:: \mathcal{L} = \lambda_\mathrm{ce}\, \mathrm{CE}(z, q) + \lambda_\mathrm{dml}\, \mathrm{DML}(p, q), \quad q = \mathrm{SVLS}(y)

    The semimetric is smallest where the prediction equals the soft label, so that both terms ask for the same probabilities, and overlap is trained for without
    certainty at boundaries. Its parts: Islam and Glocker, IPMI 2021 (the labels); Wang et al., MICCAI 2023 (the semimetric and its mix with cross-entropy).

    Args:
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation of the neighbours' weights per axis, in ``unit``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_dml: Weight of the Dice part, >= 0, or a schedule of it.
        smooth: Added above and below the Dice fraction, in pixels.
        include_background: Count class 0 in the Dice part.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, for both parts.
        ignore_index: Label to leave out of both; it gives no weight to its neighbours.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Example:
        >>> import torch
        >>> logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
        >>> RecommendedLoss()(logits, torch.randint(0, 3, (2, 8, 8, 8))).backward()
    """

    def __init__(
        self,
        *,
        kernel_size: int | Sequence[int] = 5,
        sigma: float | Sequence[float] = 1.5,
        unit: Unit = "voxel",
        border: Border = "replicate",
        weight_ce: float | Schedule = 0.25,
        weight_dml: float | Schedule = 0.75,
        smooth: float = 1e-3,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        super().__init__(
            SVLSTarget(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)},
                "dml": {
                    "weight": weight_dml,
                    "term": DiceSemimetric(smooth=smooth, include_background=include_background, class_weights=class_weights),
                },
            },
            backend=backend,
            sync_stats=sync_stats,
        )
