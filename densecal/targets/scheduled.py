"""Smoothed labels that give way to the labels themselves as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.ops.activation import Activation
from densecal.schedules import Level, Schedule, TwoStage
from densecal.targets.base import Recipe, SoftTarget, Target
from densecal.targets.one_hot import OneHotTarget
from densecal.targets.wrapper import WrapperTarget

__all__ = ["LabelMix", "ScheduledTarget"]


@dataclass(frozen=True, eq=False)
class LabelMix(Recipe):
    """``share`` of what ``recipe`` makes of the labels, and the rest of the labels as they are."""

    share: float | Tensor
    recipe: Recipe

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        return self.share * self.recipe(one_hot, valid, activation) + (1.0 - self.share) * one_hot


class ScheduledTarget(WrapperTarget):
    r"""Any smoothing by a share that follows a schedule: two-stage label smoothing (TSLA), smooth first and hard afterwards, for every target.

    .. math:: q = \lambda\, q_{\text{smoothed}} + (1 - \lambda)\, y

    with :math:`\lambda` from the schedule; labels that were soft from the start stay what they are at 0.

    Args:
        label_target: Smooths the labels. Activation and ignored label are its own.
        share: :math:`\lambda`, in [0, 1], or a :class:`densecal.schedules.Schedule` of it: all of the smoothing in the first half of the training, none in the
            second, unless told.

    Raises:
        TypeError: If ``label_target`` is not a target, or ``share`` neither a number nor a schedule.
        ValueError: If ``label_target`` smooths nothing, or ``share`` is out of range.

    Reference:
        Xu et al., "Towards Understanding Label Smoothing", 2020, arXiv:2006.11653, of label smoothing; that of other smoothed labels is ours.

    Example:
        >>> from densecal.targets import SVLSTarget
        >>> target = ScheduledTarget(label_target=SVLSTarget(), share=TwoStage(1.0, 0.0, switch=3))
        >>> for epoch in (0, 3):
        ...     target.on_epoch(epoch, 5)
        ...     target(torch.tensor([[0, 0, 1]]), 2).probs[0, 1]
        tensor([0.0000, 0.2500, 0.7500])
        tensor([0., 0., 1.])
    """

    def __init__(self, *, label_target: Target, share: float | Schedule = TwoStage(1.0, 0.0, switch=0.5)) -> None:  # noqa: B008 (it is constant)
        if not isinstance(label_target, Target):
            raise TypeError(f"Expected `label_target` to be a densecal.targets.Target, but got {type(label_target).__name__}.")
        if isinstance(label_target, OneHotTarget):
            raise ValueError(
                "Expected a `label_target` that smooths labels, but got OneHotTarget, of which a schedule has nothing to take. Smooth them: SVLSTarget, say."
            )
        super().__init__(label_target, needs=(), activation=label_target.activation, ignore_index=label_target.ignore_index)
        self.level = Level("share", share, maximum=1.0)

    @property
    def share(self) -> float | Tensor:
        """The present share: a number, or a 0-d tensor where it follows a schedule."""
        return self.level.value

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        super().on_epoch(epoch, max_epochs)
        self.level.on_epoch(epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
        super().on_step(step, max_steps)
        self.level.on_step(step, max_steps)

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        labels = self.from_labels(label, num_classes, spatial_dims=spatial_dims, dtype=dtype, context=context)
        return labels.with_recipe(LabelMix(self.share, labels.recipe), hard=labels.hard)
