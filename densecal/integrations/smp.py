"""Losses of segmentation-models-pytorch by their names and signatures.

``from densecal.integrations import smp`` in place of ``segmentation_models_pytorch.losses``. Values are those of smp 0.6 for its inputs, with what it lacks:
soft labels in multiclass mode, ``ignore_index`` everywhere, volumes, half precision, and means that do not count ignored pixels. smp itself is not imported.

A mode says how the channels are read: ``"binary"`` (one channel, sigmoid), ``"multilabel"`` (overlapping regions, sigmoid) or ``"multiclass"`` (softmax).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_non_negative, check_positive
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.losses.presets import LabelSmoothingLoss
from densecal.ops.activation import probabilities
from densecal.ops.overlap import overlap_sums
from densecal.ops.reduction import Reduction
from densecal.targets.base import SoftTarget
from densecal.targets.one_hot import OneHotTarget
from densecal.terms.base import Term

__all__ = ["DiceLoss", "FocalLoss", "JaccardLoss", "Mode", "SoftCrossEntropyLoss", "TverskyLoss"]

Mode: TypeAlias = Literal["binary", "multiclass", "multilabel"]
MODES = ("binary", "multiclass", "multilabel")


class TverskyLoss(CompoundLoss):
    """Tversky loss over the batch, as ``smp.losses.TverskyLoss``. A class without a labelled pixel adds 0 and counts in the mean.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        classes: Channels that count; None is all. Not in binary mode.
        log_loss: -log of the score for 1 minus it.
        from_logits: False where predictions are probabilities.
        smooth: Added above and below the fraction, >= 0, in pixels.
        ignore_index: Label to leave out. A pixel of several channels is left out whole when any of its entries equals it.
        eps: The denominator and, under ``log_loss``, the score are not less.
        alpha: Weight of false positives, >= 0.
        beta: Weight of false negatives, >= 0.
        gamma: Power of the mean over classes, > 0.
        class_weights: One per channel; the mean over classes is weighted. Not in binary mode.

    Raises:
        ValueError: If ``mode`` is unknown, a number is out of range, or binary mode is given classes or weights.

    Example:
        >>> TverskyLoss("multiclass")(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]]))
        tensor(0.5000)
    """

    def __init__(
        self,
        mode: Mode,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        term = _Overlap(
            mode,
            classes=classes,
            log_loss=log_loss,
            from_logits=from_logits,
            smooth=smooth,
            eps=eps,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            class_weights=class_weights,
        )
        super().__init__(_labels(mode, ignore_index), {"tversky": {"weight": 1.0, "term": term}})


class DiceLoss(CompoundLoss):
    """Dice loss over the batch, as ``smp.losses.DiceLoss``: :class:`TverskyLoss` with alpha = beta = 1/2, whose arguments and errors it shares.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        classes: Channels that count; None is all.
        log_loss: -log of the score for 1 minus it.
        from_logits: False where predictions are probabilities.
        smooth: Added above and below the fraction, >= 0, in pixels.
        ignore_index: Label to leave out.
        eps: The denominator and, under ``log_loss``, the score are not less.
        class_weights: One per channel.

    Example:
        >>> DiceLoss("binary")(torch.zeros(1, 1, 4), torch.tensor([[0, 0, 1, 1]]))
        tensor(0.5000)
    """

    def __init__(
        self,
        mode: Mode,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        term = _Overlap(
            mode,
            classes=classes,
            log_loss=log_loss,
            from_logits=from_logits,
            smooth=smooth,
            eps=eps,
            alpha=0.5,
            beta=0.5,
            class_weights=class_weights,
        )
        super().__init__(_labels(mode, ignore_index), {"dice": {"weight": 1.0, "term": term}})


class JaccardLoss(CompoundLoss):
    """Jaccard loss over the batch, as ``smp.losses.JaccardLoss``: :class:`TverskyLoss` with alpha = beta = 1, whose arguments and errors it shares.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        classes: Channels that count; None is all.
        log_loss: -log of the score for 1 minus it.
        from_logits: False where predictions are probabilities.
        smooth: Added above and below the fraction, >= 0, in pixels.
        ignore_index: Label to leave out.
        eps: The denominator and, under ``log_loss``, the score are not less.
        class_weights: One per channel.

    Example:
        >>> JaccardLoss("multiclass")(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]]))
        tensor(0.6667)
    """

    def __init__(
        self,
        mode: Mode,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        term = _Overlap(
            mode,
            classes=classes,
            log_loss=log_loss,
            from_logits=from_logits,
            smooth=smooth,
            eps=eps,
            alpha=1.0,
            beta=1.0,
            class_weights=class_weights,
        )
        super().__init__(_labels(mode, ignore_index), {"jaccard": {"weight": 1.0, "term": term}})


class FocalLoss(CompoundLoss):
    """Binary focal loss of every channel, as ``smp.losses.FocalLoss``: in multiclass mode, too, each class against the rest, without a softmax.

    :class:`densecal.losses.FocalLoss` is the focal loss of a softmax.

    Args:
        mode: ``"binary"``, ``"multiclass"`` or ``"multilabel"``.
        alpha: Weight of positive pixels, in [0, 1]; negative ones have 1 - alpha. None: 1 for both.
        gamma: Power, >= 0.
        ignore_index: Label to leave out.
        from_logits: False where predictions are probabilities.
        eps: Probabilities are kept this far from 0 and 1.
        reduction: ``"mean"`` or ``"sum"`` over pixels; channels are averaged.
        normalized: Divide by the sum of the focal weights of a channel.
        reduced_threshold: Where the probability of the label is below it the weight is 1, else it is divided by the threshold before the power.
        class_weights: One per channel; the mean over channels is weighted. Not in binary mode.

    Raises:
        ValueError: If ``mode`` or ``reduction`` is unknown, a number is out of range, or binary mode is given weights.

    Example:
        >>> FocalLoss("binary")(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]))  # (1/2)^2 log 2
        tensor(0.1733)
    """

    def __init__(
        self,
        mode: Mode,
        alpha: float | None = None,
        gamma: float = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: Literal["mean", "sum"] = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        term = _Focal(
            mode,
            alpha=alpha,
            gamma=gamma,
            from_logits=from_logits,
            eps=eps,
            reduction=reduction,
            normalized=normalized,
            reduced_threshold=reduced_threshold,
            class_weights=class_weights,
        )
        super().__init__(_labels(mode, ignore_index), {"focal": {"weight": 1.0, "term": term}})


class SoftCrossEntropyLoss(LabelSmoothingLoss):
    """Cross-entropy with label smoothing, as ``smp.losses.SoftCrossEntropyLoss``, but averaged over the pixels that are not ignored.

    Args:
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        smooth_factor: Share spread over all classes, in [0, 1]; None is 0.
        ignore_index: Label to leave out.
        dim: The class axis, always 1.

    Raises:
        ValueError: If ``dim`` is not 1, ``reduction`` is unknown or ``smooth_factor`` outside [0, 1].

    Example:
        >>> SoftCrossEntropyLoss(smooth_factor=0.1)(torch.zeros(1, 2, 2), torch.tensor([[0, -100]]))
        tensor(0.6931)
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        smooth_factor: float | None = None,
        ignore_index: int | None = DEFAULT_IGNORE_INDEX,
        dim: int = 1,
    ) -> None:
        check_choice("dim", dim, (1,))
        super().__init__(
            smoothing=0.0 if smooth_factor is None else smooth_factor,
            reduction=reduction,
            ignore_index=DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index,
        )


def _labels(mode: Mode, ignore_index: int | None) -> OneHotTarget:
    activation: Literal["softmax", "sigmoid"] = "softmax" if mode == "multiclass" else "sigmoid"
    return OneHotTarget(activation=activation, ignore_index=DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index)


class _ModeTerm(Term):
    """Checks a mode, and takes the mean over channels."""

    def __init__(self, mode: Mode, *, class_weights: Sequence[float] | Tensor | None) -> None:
        super().__init__(class_weights=class_weights)
        check_choice("mode", mode, MODES)
        if mode == "binary" and class_weights is not None:
            raise ValueError("Expected no `class_weights` in binary mode, which has one channel.")
        self.mode: Mode = mode

    def check_channels(self, logits: Tensor) -> None:
        if self.mode == "binary" and logits.shape[1] != 1:
            raise ValueError(f"Expected one channel in binary mode, but got {logits.shape[1]}. Use mode='multiclass' or 'multilabel'.")

    def mean(self, per_channel: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        weights = torch.ones_like(per_channel) if self.class_weights is None else self.class_weights.to(per_channel.dtype)
        if classes is not None:
            per_channel, weights = (torch.stack([values[c] for c in classes]) for values in (per_channel, weights))
        return (per_channel * weights).sum() / weights.sum()


class _Overlap(_ModeTerm):
    def __init__(
        self,
        mode: Mode,
        *,
        classes: Sequence[int] | None,
        log_loss: bool,
        from_logits: bool,
        smooth: float,
        eps: float,
        alpha: float,
        beta: float,
        gamma: float = 1.0,
        class_weights: Sequence[float] | Tensor | None,
    ) -> None:
        super().__init__(mode, class_weights=class_weights)
        if mode == "binary" and classes is not None:
            raise ValueError("Expected no `classes` in binary mode, which has one channel.")
        for name, value in (("smooth", smooth), ("alpha", alpha), ("beta", beta)):
            check_non_negative(name, value)
        check_positive("eps", eps)
        check_positive("gamma", gamma)
        self.classes = None if classes is None else tuple(int(c) for c in classes)
        self.log_loss, self.from_logits = log_loss, from_logits
        self.smooth, self.eps, self.alpha, self.beta, self.gamma = smooth, eps, alpha, beta, gamma

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        self.check_channels(logits)
        self.weights_for(logits)
        probs, q = probabilities(logits, target.activation) if self.from_logits else logits, target.probs.to(logits.dtype)
        tp, fp, fn = (sums.sum(dim=0) for sums in overlap_sums(probs, q, target.valid))  # each (C,)
        score = (tp + self.smooth) / (tp + self.alpha * fp + self.beta * fn + self.smooth).clamp_min(self.eps)
        loss = -score.clamp_min(self.eps).log() if self.log_loss else 1.0 - score
        present = q.sum(dim=(0, *range(2, q.ndim))) > 0
        mean = self.mean(torch.where(present, loss, 0.0), self.classes)
        # Rounding may leave -1e-8, of which a fractional power is NaN.
        return mean if self.gamma == 1 else mean.clamp_min(torch.finfo(mean.dtype).tiny) ** self.gamma


class _Focal(_ModeTerm):
    def __init__(
        self,
        mode: Mode,
        *,
        alpha: float | None,
        gamma: float,
        from_logits: bool,
        eps: float,
        reduction: Literal["mean", "sum"],
        normalized: bool,
        reduced_threshold: float | None,
        class_weights: Sequence[float] | Tensor | None,
    ) -> None:
        super().__init__(mode, class_weights=class_weights)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"Expected `alpha` in [0, 1], but got {alpha}.")
        check_non_negative("gamma", gamma)
        check_positive("eps", eps)
        check_choice("reduction", reduction, ("mean", "sum"))
        if reduced_threshold is not None:
            check_positive("reduced_threshold", reduced_threshold)
        self.alpha, self.gamma, self.from_logits, self.eps = alpha, gamma, from_logits, eps
        self.reduction: Literal["mean", "sum"] = reduction
        self.normalized, self.reduced_threshold = normalized, reduced_threshold

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        self.check_channels(logits)
        self.weights_for(logits)
        if not self.from_logits:
            p = logits.clamp(self.eps, 1.0 - self.eps)
            logits = p.log() if self.mode == "multiclass" else p.log() - torch.log1p(-p)
        q, mask = target.probs.to(logits.dtype), target.valid.unsqueeze(1)
        ce = F.binary_cross_entropy_with_logits(logits, q, reduction="none")
        p_label = torch.exp(-ce)
        distance = (1.0 - p_label).clamp_min(torch.finfo(ce.dtype).tiny)
        if self.reduced_threshold is None:
            factor = distance**self.gamma
        else:
            factor = torch.where(p_label < self.reduced_threshold, 1.0, (distance / self.reduced_threshold) ** self.gamma)
        values = factor * ce
        if self.alpha is not None:
            values = values * (self.alpha * q + (1.0 - self.alpha) * (1.0 - q))
        channels = [torch.where(mask, v, 0.0).transpose(0, 1).flatten(1) for v in (values, factor)]  # each (C, pixels)
        per_channel = channels[0].sum(dim=1)
        if self.normalized:
            per_channel = per_channel / channels[1].sum(dim=1).clamp_min(1e-6)
        if self.reduction == "mean":
            per_channel = per_channel / target.valid.sum().clamp_min(1)
        return self.mean(per_channel)
