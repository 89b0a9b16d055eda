"""Several label maps of the same image, averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.checks import plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.registry import TARGETS
from densecal.targets.base import SoftTarget, Target, Uniform
from densecal.targets.one_hot import make_target
from densecal.targets.wrapper import WrapperTarget

__all__ = ["RaterMeanTarget", "rater_mean_target"]


def rater_mean_target(
    rater_labels: Tensor,
    num_classes: int,
    *,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""Share of the raters that chose each class.

    .. math:: q_c(x) = \frac{\sum_r v_r(x)\, \mathbf{1}[y_r(x) = c]}{\sum_r v_r(x)}

    Args:
        rater_labels: One label map per rater, ``(N, R, *spatial)``, integer, or ``(N, R, C, *spatial)`` for soft labels or, under sigmoid, regions. A
            pixel that a rater ignores (v = 0) is averaged over the others, and left out where all ignore it.
        num_classes: Number of classes C.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.
        spatial_dims: Number of spatial axes; by default all after the first two.
        dtype: Floating type of the distribution.

    Returns:
        Target with soft labels: ``probs`` ``(N, C, *spatial)``.

    Raises:
        ValueError: If the shape does not fit, or a label is out of range (checked on a CPU).

    Reference:
        Wang et al., "Dice Semimetric Losses", MICCAI 2023, arXiv:2303.16296.

    Example:
        >>> rater_mean_target(torch.tensor([[[0, 1, 1, -100], [0, 0, -100, -100]]]), num_classes=2).probs[0, 1]
        tensor([0.0000, 0.5000, 1.0000, 0.0000])
    """
    rater_labels = plain(rater_labels)
    dims = rater_labels.ndim - 2 if spatial_dims is None else spatial_dims
    if rater_labels.ndim not in (dims + 2, dims + 3) or rater_labels.shape[1] == 0:
        raise ValueError(
            f"Expected label maps (N, R, *spatial) or (N, R, C, *spatial) with {dims} spatial dimensions, but got {tuple(rater_labels.shape)}."
        )
    total, count = None, None
    for labels in rater_labels.unbind(1):
        one = make_target(labels, num_classes, Uniform(), activation=activation, ignore_index=ignore_index, spatial_dims=dims, dtype=dtype)
        votes = one.valid.to(dtype)
        total, count = (one.one_hot, votes) if total is None or count is None else (total + one.one_hot, count + votes)
    assert total is not None
    assert count is not None
    return SoftTarget(
        labels=None,
        soft_labels=total / count.clamp_min(1.0).unsqueeze(1),
        valid=count > 0,
        num_classes=num_classes,
        recipe=Uniform(),
        activation=activation,
        hard=False,
        dtype=dtype,
    )


@TARGETS.register("rater_mean")
class RaterMeanTarget(WrapperTarget):
    """Mean of several raters' labels; needs the side input ``rater_labels``, see :func:`rater_mean_target`.

    The labels that the loss is called with (one rater's, a majority's) say which pixels count besides: where they are ignored, nothing is learned.

    Args:
        label_target: Smooths the mean as it would smooth labels (:class:`densecal.targets.SVLSTarget`, say); None leaves it as it is.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target.
        ValueError: If ``label_target`` has another activation or ignores another label.

    Example:
        >>> raters = torch.tensor([[[0, 1, 1], [0, 0, 1]]])  # (1, 2, 3): two raters
        >>> RaterMeanTarget()(torch.tensor([[0, 0, 1]]), 2, context={"rater_labels": raters}).probs[0, 1]
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, *, label_target: Target | None = None, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX) -> None:
        super().__init__(label_target, needs=("rater_labels",), activation=activation, ignore_index=ignore_index)

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
        raters = self.side_input(context, "rater_labels")
        mean = rater_mean_target(
            raters, num_classes, activation=self.activation, ignore_index=self.ignore_index, spatial_dims=labels.valid.ndim - 1, dtype=dtype
        )
        if mean.valid.shape != labels.valid.shape:
            raise ValueError(
                f"Expected 'rater_labels' of shape (N, R, *spatial) for labels {tuple(labels.valid.shape)}, but got {tuple(raters.shape)}. "
                "Crop and resample them together."
            )
        valid = labels.valid & mean.valid
        return SoftTarget(
            labels=None,
            soft_labels=torch.where(valid.unsqueeze(1), mean.one_hot, 0.0),
            valid=valid,
            num_classes=num_classes,
            recipe=labels.recipe,
            activation=self.activation,
            hard=False,
            dtype=dtype,
        )
