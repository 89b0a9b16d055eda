"""Cross-entropy and an overlap semimetric on what teachers and labels say together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.teacher import TeacherTarget
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.overlap import DiceSemimetric, JaccardMetric

__all__ = ["DistillationLoss"]


@LOSSES.register("distillation")
class DistillationLoss(CompoundLoss):
    r"""Distillation with soft labels for cross-entropy and overlap alike (Wang et al., 2023); needs the side input ``teacher_logits``.

    .. math:: \mathcal{L} = \lambda_{CE}\, \mathrm{CE}(p, q) + \lambda_{O}\, \mathrm{O}(p, q), \quad q = \mu\, q_{\text{teachers}} + (1 - \mu)\, q_{\text{labels}}

    The overlap is the Dice semimetric or the Jaccard metric loss, which are smallest where p equals q; the product forms of Dice and Jaccard are not.
    At T = 1 the cross-entropy with q is :math:`\mu` times the Kullback-Leibler divergence from the teachers and :math:`1 - \mu` times the
    cross-entropy with the labels, up to a constant. Any other mix is a compound of :class:`densecal.targets.TeacherTarget` and terms.

    Args:
        temperature: T of the teachers, > 0; above 1 softens. With a teacher trained on smoothed labels keep it at 1.
        mix: Share :math:`\mu` of the teachers in the target, in [0, 1].
        overlap: ``"dml"`` (Dice) or ``"jml"`` (Jaccard).
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_overlap: Weight of the overlap part, >= 0, or a schedule of it.
        smooth: Added above and below the fraction, in pixels.
        weight_batch: Weight of the average with the batch as one region.
        weight_image: Weight of the average over classes, then images.
        weight_class: Weight of the average over images, then classes.
        include_background: Count class 0 in the overlap part.
        activation: ``"softmax"``, or ``"sigmoid"`` for regions that may overlap.
        class_weights: One weight per class, for both parts.
        ignore_index: Label to leave out of both.
        backend: Who computes it: ``"auto"``, ``"torch"`` or ``"triton"``, as :class:`densecal.losses.CompoundLoss` says.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Raises:
        ValueError: If an option is out of its range.

    Reference:
        Wang, Ning and Blaschko, "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666; Wang et al., "Dice Semimetric Losses", MICCAI 2023,
        arXiv:2303.16296.

    Example:
        >>> import torch
        >>> teacher, label_map = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]])
        >>> loss = DistillationLoss(mix=1.0, weight_ce=0.0, weight_overlap=1.0)
        >>> loss(teacher, label_map, context={"teacher_logits": teacher}) < 1e-6  # the student says what the teacher says
        tensor(True)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        mix: float = 0.5,
        overlap: Literal["dml", "jml"] = "dml",
        weight_ce: float | Schedule = 0.25,
        weight_overlap: float | Schedule = 0.75,
        smooth: float = 1e-3,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        check_choice("overlap", overlap, ("dml", "jml"))
        term = (DiceSemimetric if overlap == "dml" else JaccardMetric)(
            smooth=smooth,
            weight_batch=weight_batch,
            weight_image=weight_image,
            weight_class=weight_class,
            include_background=include_background,
            class_weights=class_weights,
        )
        super().__init__(
            TeacherTarget(temperature=temperature, mix=mix, activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)},
                overlap: {"weight": weight_overlap, "term": term},
            },
            backend=backend,
            sync_stats=sync_stats,
        )
