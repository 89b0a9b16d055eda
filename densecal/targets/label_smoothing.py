"""Label smoothing: the same share of every pixel spread over the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.registry import TARGETS
from densecal.schedules import Level, Schedule
from densecal.targets.base import SoftTarget, Target, Uniform
from densecal.targets.one_hot import make_target

__all__ = ["LabelSmoothingTarget", "label_smoothing_target"]


def label_smoothing_target(
    label: Tensor,
    num_classes: int,
    *,
    smoothing: float | Tensor = 0.1,
    spread: Literal["all", "others"] = "all",
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Give away a fixed share of every pixel's label.

    .. math:: q(x) = (1-\epsilon)\, \delta_{y(x)} + \epsilon / C

    Args:
        label: Label map or soft labels, see :func:`densecal.targets.one_hot_target`.
        num_classes: Number of classes C.
        smoothing: The share epsilon, in [0, 1]; a 0-d tensor is not checked. PyTorch's ``label_smoothing`` is the same.
        spread: ``"all"`` gives epsilon / C to each class, the true one included; ``"others"`` gives epsilon / (C - 1) to each of the others.
        activation: ``"softmax"``, or ``"sigmoid"``, where each region has two outcomes (C = 2 in the formula).
        ignore_index: Label to leave out.
        spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
        dtype: Floating type of the distribution.

    Returns:
        Target with ``probs`` ``(N, C, *spatial)``.

    Raises:
        ValueError: If ``smoothing`` is outside [0, 1] or ``spread`` is neither.

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016; Mueller et al., "When Does Label Smoothing Help?", NeurIPS 2019.

    Example:
        >>> label_smoothing_target(torch.tensor([[0]]), num_classes=2, smoothing=0.2).probs[0, :, 0]
        tensor([0.9000, 0.1000])
    """
    check_choice("spread", spread, ("all", "others"))
    if not isinstance(smoothing, Tensor) and not 0 <= smoothing <= 1:
        raise ValueError(f"Expected `smoothing` in [0, 1], but got {smoothing}.")
    outcomes = num_classes if activation == "softmax" else 2
    share = smoothing * outcomes / (outcomes - 1) if spread == "others" and outcomes > 1 else smoothing
    return make_target(label, num_classes, Uniform(share), activation=activation, ignore_index=ignore_index, spatial_dims=spatial_dims, dtype=dtype)


@TARGETS.register("label_smoothing")
class LabelSmoothingTarget(Target):
    """Module of :func:`label_smoothing_target`.

    Args:
        smoothing: Share given away, in [0, 1], or a :class:`densecal.schedules.Schedule` of it.
        spread: ``"all"`` classes or the ``"others"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> LabelSmoothingTarget(smoothing=0.4)(torch.tensor([[1]]), 4).probs[0, :, 0]
        tensor([0.1000, 0.7000, 0.1000, 0.1000])
    """

    def __init__(
        self,
        *,
        smoothing: float | Schedule = 0.1,
        spread: Literal["all", "others"] = "all",
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        check_choice("spread", spread, ("all", "others"))
        self.level = Level("smoothing", smoothing, maximum=1.0)
        self.spread: Literal["all", "others"] = spread

    @property
    def smoothing(self) -> float | Tensor:
        """The present share: a number, or a 0-d tensor where it follows a schedule."""
        return self.level.value

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        self.level.on_epoch(epoch, max_epochs)

    def on_step(self, step: int, max_steps: int) -> None:
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
        return label_smoothing_target(
            label,
            num_classes,
            smoothing=self.smoothing,
            spread=self.spread,
            activation=self.activation,
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        return f"spread={self.spread!r}, {super().extra_repr()}"
