"""A term turns logits and a target into a scalar, a comparison of the two or a penalty that shapes the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from densecal.checks import check_choice
from densecal.ops.activation import outcome_logits
from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import Part
from densecal.ops.reduction import REDUCTIONS, Reduction, reduce
from densecal.targets.base import SoftTarget

__all__ = ["Fused", "PixelPenalty", "PixelTerm", "Term"]


@dataclass(frozen=True)
class Fused:
    """A term as :func:`densecal.ops.label_losses.label_losses` computes it.

    Args:
        part: What it is there.
        finish: From the part's result to the term's value.
        per_pixel: Whether it is a value for each pixel.
    """

    part: Part
    finish: Callable[[Any], Tensor]
    per_pixel: bool = False


class Term(nn.Module):
    """Base of all terms. A subclass gives ``forward`` and, if it needs side inputs, names them in ``needs``.

    A term counts valid pixels only and gives exactly zero gradient elsewhere for finite logits; :class:`densecal.losses.CompoundLoss` extends that
    to any logits, and hands every term at least single precision.

    Args:
        class_weights: One weight per class, or None.
    """

    needs: tuple[str, ...] = ()
    can_sync_stats: bool = False
    """Whether the value follows from sums that the term takes over all ranks where ``sync_stats`` is set, as ``reduce`` does, and from nothing else of the batch."""
    sync_stats: bool = False
    """Whether to do so; set by the loss, see :class:`densecal.losses.CompoundLoss`."""
    wants_training_logits: bool = False
    """Whether :meth:`on_batch` does anything."""
    wants_validation_logits: bool = False
    """Whether :meth:`on_validation_batch` does anything, so that somebody has to keep the logits."""
    class_weights: Tensor | None

    def __init__(self, *, class_weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32).detach().clone()
        if weights is not None and (weights.ndim != 1 or bool((weights < 0).any())):
            raise ValueError(f"Expected `class_weights` to be one number of 0 or more per class, but got {class_weights}.")
        # A setting, not a state: a checkpoint loads whatever the weights were.
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        """The term's value.

        Args:
            logits: ``(N, C, *spatial)``, floating.
            target: Target of the same shape.
            context: The side inputs named in ``needs``.
        """
        raise NotImplementedError

    def fused(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Fused:
        """How a fused kernel computes the term from a label map; arguments as :meth:`forward`, but for logits as the network gave them.

        It holds for the class that defines it and those below it that change nothing but the constructor.

        Raises:
            NotCovered: If none does. The text says why, for the log.
        """
        raise NotCovered(f"no kernel computes the term {type(self).__name__}")

    def weights_for(self, logits: Tensor) -> Tensor | None:
        """Class weights, held against the number of channels."""
        if self.class_weights is not None and self.class_weights.shape[0] != logits.shape[1]:
            raise ValueError(f"Expected one class weight for each of the {logits.shape[1]} channels, but got {self.class_weights.shape[0]}.")
        return self.class_weights

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Called before epoch ``epoch`` of ``max_epochs``, counted from 0."""

    def on_step(self, step: int, max_steps: int) -> None:
        """Called before step ``step`` of ``max_steps`` of the optimizer, counted from 0; again where a step takes several batches."""

    def on_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        """Called while training, if ``wants_training_logits``, with the logits of each batch, once and at full resolution, before the step and without gradient;
        arguments as :meth:`forward`."""

    def on_epoch_end(self) -> None:
        """Called after an epoch and the validation that belongs to it."""

    def on_validation_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        """Called with each batch of a validation, if ``wants_validation_logits``; arguments as :meth:`forward`."""

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """Called after validation with its numbers."""

    def numbers(self) -> dict[str, float]:
        """What to log of the present state, by name."""
        return {}


class PixelTerm(Term):
    r"""Base of terms that compare prediction and target pixel by pixel, and of what their mean divides by.

    .. math:: \frac{\sum_x \ell(x)}{\sum_x \bar w(x)}

    over valid pixels. As in PyTorch, :math:`\bar w(x) = w_{y(x)}` where the labels are a label map, whatever the smoothing (index targets), and
    :math:`\bar w(x) = 1` where they are soft labels (probability targets). Under sigmoid the mean runs over pixels and channels.

    Args:
        class_weights: One weight per class, or None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    can_sync_stats = True

    def __init__(self, *, class_weights: Sequence[float] | Tensor | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(class_weights=class_weights)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def reduced(self, values: Tensor, target: SoftTarget) -> Tensor:
        """Reduce weighted values per pixel ``(N, *spatial)``, 0 where not valid and summed over channels under sigmoid."""
        if self.class_weights is not None and target.label_map is not None:
            count = torch.where(target.valid, self.class_weights.to(values.dtype)[target.label_map], 0.0).sum()
        else:
            count = target.valid.sum().to(values.dtype)
        if target.activation == "sigmoid":
            count = count * target.num_classes
        return reduce(values, count, self.reduction, sync=self.sync_stats)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class PixelPenalty(Term):
    """Base of penalties on the logits of each pixel alone. A subclass gives the formula, :meth:`per_pixel`.

    Under sigmoid each channel is a choice between two outcomes with logits z/2 and -z/2 (a softmax over them is the sigmoid), and a pixel's value is the
    mean over its channels.

    Args:
        reduction: ``"mean"`` over valid pixels, ``"sum"``, or ``"none"`` for ``(N, *spatial)``.

    Raises:
        ValueError: If ``reduction`` is unknown.
    """

    can_sync_stats = True

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction

    def fused_as(self, part: Part) -> Fused:
        """What :meth:`fused` gives for a part that computes :meth:`per_pixel`."""
        return Fused(part, lambda result: reduce(result.values, result.count, self.reduction, sync=self.sync_stats), self.reduction == "none")

    def per_pixel(self, logits: Tensor) -> Tensor:
        """The penalty ``(N, *rest)`` of logits ``(N, K, *rest)`` of K outcomes that exclude each other."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        values = self.per_pixel(outcome_logits(logits, target.activation))
        if target.activation == "sigmoid":
            values = values.mean(dim=1)
        values = torch.where(target.valid, values, 0.0)
        return reduce(values, target.valid.sum().to(values.dtype), self.reduction, sync=self.sync_stats)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
