"""Cross-entropy with labels perturbed at a level of each image's own (ASLP)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.reduction import Reduction
from densecal.perturbation.adaptive import AdaptivePerturbation
from densecal.perturbation.rules import CalibrationRule
from densecal.registry import LOSSES
from densecal.terms.cross_entropy import CrossEntropy

__all__ = ["ASLPLoss"]


@LOSSES.register("aslp")
class ASLPLoss(CompoundLoss):
    """Cross-entropy with adaptive stochastic label perturbation in its calibration mode (Liu et al., ICCV 2023); needs the side input ``case_id``.

    :class:`densecal.perturbation.AdaptivePerturbation` says what a loop of one's own has to call, :class:`densecal.perturbation.CalibrationRule` how levels change.
    Under sigmoid it is the paper's self-calibrating binary cross-entropy. It acts in training mode.

    Args:
        case_ids: Names of all training images, each once.
        beta: Strength of the perturbation, > 0.
        eta: Step of the levels, > 0.
        accuracy_weight: Weight lambda of the part that holds the labels' expected confidence at or above validation accuracy, >= 0.
        warmup: Epochs before the first update, >= 0.
        expected: Take the mean over the draw; False draws for each image whether it is perturbed, as the published code.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: Who computes it: ``"auto"``, ``"torch"`` or ``"triton"``, as :class:`densecal.losses.CompoundLoss` says.

    Example:
        >>> import torch
        >>> loss = ASLPLoss(case_ids=["a", "b"])
        >>> loss(torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), context={"case_id": ["b", "a"]})
        tensor(0.6931)
    """

    def __init__(
        self,
        *,
        case_ids: Sequence[str],
        beta: float = 2.0,
        eta: float = 0.002,
        accuracy_weight: float = 2000.0,
        warmup: int = 5,
        expected: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        target = AdaptivePerturbation(
            case_ids=case_ids,
            rule=CalibrationRule(eta=eta, accuracy_weight=accuracy_weight),
            beta=beta,
            warmup=warmup,
            expected=expected,
            activation=activation,
            ignore_index=ignore_index,
        )
        super().__init__(target, {"ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)}}, backend=backend)
