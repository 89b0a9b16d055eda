"""Labels perturbed at the same level in every image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.perturbation.base import Perturbation
from densecal.schedules import Level, Schedule
from densecal.targets.base import Target

__all__ = ["StochasticPerturbation"]


class StochasticPerturbation(Perturbation):
    r"""Perturb the labels of each image with probability :math:`\alpha`, or by the mean over such draws.

    Hard, smoothed and stochastically perturbed labels are one family: :math:`\alpha = 0` leaves the labels as they are, :math:`\alpha = 1` is label smoothing by
    :math:`\beta` over the other classes, and drawn with :math:`\beta` from 1/2 to 1 it is DisturbLabel by images instead of pixels. The draw comes from torch's
    generator; deep supervision draws for each resolution. In evaluation mode the labels are those of ``label_target``.

    Args:
        label_target: What the labels become before; None is one-hot.
        alpha: Level, in [0, 1] and below 1 / (2 beta), or a :class:`densecal.schedules.Schedule` of it.
        beta: Strength, > 0. Above 1 a perturbed target leaves [0, 1], which is for cross-entropy alone.
        expected: Take the mean over the draw, label smoothing by alpha * beta; False: draw.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target, or ``alpha`` neither a number nor a schedule.
        ValueError: If ``alpha`` or ``beta`` is out of range, or ``label_target`` perturbs labels already, has another activation or ignores another label.

    Reference:
        Liu et al., "Model Calibration in Dense Classification with Adaptive Label Perturbation", ICCV 2023, arXiv:2307.13539; Xie et al., "DisturbLabel",
        CVPR 2016, arXiv:1605.00055. More than two classes are ours.

    Example:
        >>> StochasticPerturbation(alpha=0.1, beta=2.0)(torch.tensor([[0]]), 3).probs[0, :, 0]
        tensor([0.8000, 0.1000, 0.1000])
    """

    def __init__(
        self,
        *,
        label_target: Target | None = None,
        alpha: float | Schedule = 0.05,
        beta: float = 2.0,
        expected: bool = True,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(label_target, beta=beta, expected=expected, activation=activation, ignore_index=ignore_index)
        # Below 1 / (2 beta), where the label would no longer be the likelier.
        self.level = Level("alpha", alpha, maximum=min(1.0, math.nextafter(0.5 / beta, 0.0)))

    def levels(self, size: int, device: torch.device, context: Mapping[str, Any] | None) -> float | Tensor:
        return self.level.value

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        super().on_epoch(epoch, max_epochs)
        self.level.on_epoch(epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
        super().on_step(step, max_steps)
        self.level.on_step(step, max_steps)
