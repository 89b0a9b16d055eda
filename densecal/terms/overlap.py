"""Jaccard, Dice and Tversky losses that are 0 exactly where prediction and target agree, soft targets included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from densecal.checks import check_choice, check_non_negative, check_positive
from densecal.ops.activation import probabilities
from densecal.ops.label_losses import OverlapCounts, OverlapPart
from densecal.ops.overlap import overlap_sums, tversky_score
from densecal.ops.ranks import sum_over_ranks
from densecal.registry import TERMS
from densecal.targets.base import SoftTarget
from densecal.terms.base import Fused, Term

__all__ = ["DiceSemimetric", "JaccardMetric", "Overlap"]


@TERMS.register("tversky")
class Overlap(Term):
    r"""One minus the Tversky score of probabilities and target, per class.

    .. math:: tp = \tfrac12 \sum (p + q - |p - q|), \quad fp = \sum p - tp, \quad fn = \sum q - tp, \quad
              s = \frac{tp + \text{smooth}}{tp + \alpha\, fp + \beta\, fn + \text{smooth}}, \quad \ell = (1 - s)^\gamma

    averaged over classes in up to three ways, whose weighted sum is the value: over the whole batch as one region (``weight_batch``), per image, classes
    first (``weight_image``), per image and class, images first (``weight_class``). Pixels that are not valid are left out, and so are images without any.

    Args:
        alpha: Weight of false positives, >= 0. Jaccard has 1 and 1, Dice 1/2 and 1/2.
        beta: Weight of false negatives, >= 0.
        smooth: Added above and below the fraction, >= 0, in pixels. A class with nothing predicted and nothing there scores 1.
        gamma: Power of the loss, > 0.
        log: Take -log(s) for 1 - s, before the power.
        norm: ``"l1"`` sums absolute values, ``"l2"`` squares.
        active: Classes that count: ``"present"`` where the target exceeds ``threshold`` somewhere in the region, ``"all"``, or ``"auto"``: present for
            labels that name a class, all for soft labels.
        threshold: See ``active``; in [0, 1).
        weight_batch: Weight of the average with the batch as one region, >= 0.
        weight_image: Weight of the average over classes, then images, >= 0.
        weight_class: Weight of the average over images, then classes, >= 0.
        include_background: Count class 0.
        class_weights: Multiplies each class's loss; not normalised.

    Raises:
        ValueError: If a number is out of range, an option unknown, or all three weights are 0.

    Reference:
        Wang et al., "Jaccard Metric Losses", NeurIPS 2023, arXiv:2302.05666; "Dice Semimetric Losses", MICCAI 2023, arXiv:2303.16296.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> q = torch.tensor([[[0.75, 1.0], [0.25, 0.0]]])  # (1, 2, 2)
        >>> round(Overlap(alpha=0.5, beta=0.5)(q.clamp_min(1e-30).log(), one_hot_target(q, 2)).item(), 6)
        0.0
    """

    can_sync_stats = True

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        smooth: float = 1e-3,
        gamma: float = 1.0,
        log: bool = False,
        norm: Literal["l1", "l2"] = "l1",
        active: Literal["auto", "present", "all"] = "auto",
        threshold: float = 0.01,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(class_weights=class_weights)
        for name, value in (("alpha", alpha), ("beta", beta), ("smooth", smooth)):
            check_non_negative(name, value)
        for name, value in (("weight_batch", weight_batch), ("weight_image", weight_image), ("weight_class", weight_class)):
            check_non_negative(name, value)
        check_positive("gamma", gamma)
        check_choice("norm", norm, ("l1", "l2"))
        check_choice("active", active, ("auto", "present", "all"))
        if not 0 <= threshold < 1:
            raise ValueError(f"Expected `threshold` in [0, 1), but got {threshold}.")
        if weight_batch + weight_image + weight_class == 0:
            raise ValueError("Expected one of `weight_batch`, `weight_image` and `weight_class` to be greater than 0, but all are 0.")
        self.alpha, self.beta, self.smooth, self.gamma, self.log = alpha, beta, smooth, gamma, log
        self.norm: Literal["l1", "l2"] = norm
        self.active: Literal["auto", "present", "all"] = active
        self.threshold = threshold
        self.weight_batch, self.weight_image, self.weight_class = weight_batch, weight_image, weight_class
        self.include_background = include_background

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        probs, q = probabilities(logits, target.activation), target.probs.to(logits.dtype)
        counts = OverlapCounts(*overlap_sums(probs, q, target.valid, norm=self.norm), q.amax(tuple(range(2, q.ndim))))
        return self._value(counts, target.valid.flatten(1).any(dim=1), target.hard, self.weights_for(logits))

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        class_weights = self.weights_for(logits)

        def finish(counts: OverlapCounts) -> Tensor:
            # Wherever a pixel is valid some class has a share. Not "> 0": a label that is no class made NaN, which has to stay.
            some_valid = (counts.tp + counts.fn).sum(dim=1) != 0
            return self._value(counts, some_valid, target.hard, class_weights)

        return Fused(OverlapPart(target.shares, self.norm), finish)

    def _value(self, counts: OverlapCounts, some_valid: Tensor, hard: bool, class_weights: Tensor | None) -> Tensor:
        """The value from sums per image and class ``(N, C)`` and whether an image ``(N,)`` has valid pixels."""
        first = 0 if self.include_background else 1
        if first and counts.tp.shape[1] < 2:
            raise ValueError("Expected at least 2 channels with include_background=False, but got 1. A single foreground channel has no background.")
        tp, fp, fn = counts.tp[:, first:], counts.fp[:, first:], counts.fn[:, first:]
        active = some_valid.unsqueeze(1).expand_as(tp)
        if self.active == "present" or (self.active == "auto" and hard):
            active = active & (counts.largest[:, first:] > self.threshold)
        weights = tp.new_ones(tp.shape[1]) if class_weights is None else class_weights[first:].to(tp.dtype)

        value = tp.new_zeros(())
        if self.weight_batch:
            *pooled, images = self._over_images(tp, fp, fn, active.to(tp.dtype))
            value = value + self.weight_batch * _mean(self._loss(*pooled) * weights, images > 0)
        if self.weight_image or self.weight_class:
            per_image = torch.where(active, self._loss(tp, fp, fn) * weights, 0.0)  # (N, C)
        if self.weight_image:
            total, images = self._over_images(_mean(per_image, active), active.any(dim=1).to(tp.dtype))
            value = value + self.weight_image * total / images.clamp_min(1)
        if self.weight_class:
            total, images = self._over_images(per_image, active.to(tp.dtype))
            value = value + self.weight_class * _mean(total / images.clamp_min(1), images > 0)
        return value

    def _over_images(self, *values: Tensor) -> Sequence[Tensor]:
        """Sums over the images of the batch, with ``sync_stats`` of those of all ranks."""
        sums = torch.stack([value.sum(0) for value in values])
        return (sum_over_ranks(sums) if self.sync_stats else sums).unbind()

    def _loss(self, tp: Tensor, fp: Tensor, fn: Tensor) -> Tensor:
        score = tversky_score(tp, fp, fn, alpha=self.alpha, beta=self.beta, smooth=self.smooth)
        loss = -score.log() if self.log else 1.0 - score
        # Rounding may leave -1e-8, of which a fractional power is NaN.
        return loss if self.gamma == 1 else loss.clamp_min(torch.finfo(loss.dtype).tiny) ** self.gamma

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, smooth={self.smooth}, gamma={self.gamma}, log={self.log}, norm={self.norm!r}, active={self.active!r}"


@TERMS.register("jml")
class JaccardMetric(Overlap):
    """Jaccard metric loss: :class:`Overlap` with alpha = beta = 1, whose other arguments and errors it shares.

    Args:
        smooth: Added above and below the fraction, >= 0, in pixels.
        gamma: Power of the loss, > 0.
        log: Take -log(s) for 1 - s.
        norm: ``"l1"`` or ``"l2"``.
        active: ``"auto"``, ``"present"`` or ``"all"`` classes.
        threshold: A present class exceeds this somewhere.
        weight_batch: Weight of the average with the batch as one region.
        weight_image: Weight of the average over classes, then images.
        weight_class: Weight of the average over images, then classes.
        include_background: Count class 0.
        class_weights: Multiplies each class's loss.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> round(JaccardMetric(smooth=0.0)(torch.zeros(1, 2, 4), one_hot_target(torch.tensor([[0, 0, 1, 1]]), 2)).item(), 4)
        0.6667
    """

    def __init__(
        self,
        *,
        smooth: float = 1e-3,
        gamma: float = 1.0,
        log: bool = False,
        norm: Literal["l1", "l2"] = "l1",
        active: Literal["auto", "present", "all"] = "auto",
        threshold: float = 0.01,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(
            alpha=1.0,
            beta=1.0,
            smooth=smooth,
            gamma=gamma,
            log=log,
            norm=norm,
            active=active,
            threshold=threshold,
            weight_batch=weight_batch,
            weight_image=weight_image,
            weight_class=weight_class,
            include_background=include_background,
            class_weights=class_weights,
        )


@TERMS.register("dml")
class DiceSemimetric(Overlap):
    """Dice semimetric loss: :class:`Overlap` with alpha = beta = 1/2, soft Dice where the target is hard. It shares the other arguments and errors.

    Args:
        smooth: Added above and below the fraction, >= 0, in pixels.
        gamma: Power of the loss, > 0.
        log: Take -log(s) for 1 - s.
        norm: ``"l1"`` or ``"l2"``.
        active: ``"auto"``, ``"present"`` or ``"all"`` classes.
        threshold: A present class exceeds this somewhere.
        weight_batch: Weight of the average with the batch as one region.
        weight_image: Weight of the average over classes, then images.
        weight_class: Weight of the average over images, then classes.
        include_background: Count class 0.
        class_weights: Multiplies each class's loss.

    Example:
        >>> from densecal.targets import one_hot_target
        >>> round(DiceSemimetric(smooth=0.0)(torch.zeros(1, 2, 4), one_hot_target(torch.tensor([[0, 0, 1, 1]]), 2)).item(), 4)
        0.5
    """

    def __init__(
        self,
        *,
        smooth: float = 1e-3,
        gamma: float = 1.0,
        log: bool = False,
        norm: Literal["l1", "l2"] = "l1",
        active: Literal["auto", "present", "all"] = "auto",
        threshold: float = 0.01,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(
            alpha=0.5,
            beta=0.5,
            smooth=smooth,
            gamma=gamma,
            log=log,
            norm=norm,
            active=active,
            threshold=threshold,
            weight_batch=weight_batch,
            weight_image=weight_image,
            weight_class=weight_class,
            include_background=include_background,
            class_weights=class_weights,
        )


def _mean(values: Tensor, count: Tensor) -> Tensor:
    """Mean over the classes, the last axis, that ``count``; 0 where there is none."""
    return torch.where(count, values, 0.0).sum(-1) / count.sum(-1).clamp_min(1)
