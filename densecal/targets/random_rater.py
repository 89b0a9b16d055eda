"""One of several label maps of the same image, drawn anew each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.checks import plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.registry import TARGETS
from densecal.targets.base import SoftTarget, Target
from densecal.targets.wrapper import WrapperTarget

__all__ = ["RandomRaterTarget", "draw_rater"]


def draw_rater(rater_labels: Tensor, *, ignore_index: int = DEFAULT_IGNORE_INDEX, generator: torch.Generator | None = None) -> Tensor:
    """The labels of one rater per image, each of those who rated any of its pixels being as likely as the others.

    In expectation over the draws this is the mean of the raters, except that a pixel which only some of them ignore is left out as often as one of these is drawn.

    Args:
        rater_labels: One label map per rater, ``(N, R, *spatial)``, integer, or ``(N, R, C, *spatial)`` for soft labels or regions.
        ignore_index: Label to leave out; a rater who gives nothing else to an image has not rated it.
        generator: Draws; by default torch's own of the device.

    Returns:
        ``(N, *spatial)`` or ``(N, C, *spatial)``. Where nobody rated an image, ``ignore_index`` everywhere.

    Raises:
        ValueError: If there is no axis of raters, or none on it.

    Example:
        >>> raters = torch.tensor([[[0, 1, 1], [-100, -100, -100]]])  # (1, 2, 3): the second has not rated the image
        >>> draw_rater(raters)
        tensor([[0, 1, 1]])
    """
    rater_labels = plain(rater_labels)
    if rater_labels.ndim < 3 or rater_labels.shape[1] == 0:
        raise ValueError(f"Expected label maps (N, R, *spatial) or (N, R, C, *spatial) of R raters, but got {tuple(rater_labels.shape)}.")
    rated = (rater_labels != ignore_index).flatten(2).any(2)  # (N, R)
    # Numbers in [1, 2) for those who rated and in [0, 1) for the others: the largest is a uniform draw among the former, and nothing waits for the device.
    lots = torch.rand(rated.shape, generator=generator, device=rated.device) + rated
    return rater_labels[torch.arange(len(rated), device=rated.device), lots.argmax(1)]


@TARGETS.register("random_rater")
class RandomRaterTarget(WrapperTarget):
    """The labels of one rater per image, drawn from torch's generator at each call; needs the side input ``rater_labels``, see :func:`draw_rater`.

    The labels that the loss is called with (a majority's, say) say which pixels count besides: where they are ignored, nothing is learned.

    Args:
        label_target: What the drawn rater's labels become (:class:`densecal.targets.SVLSTarget`, say); None leaves them as they are.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target.
        ValueError: If ``label_target`` has another activation or ignores another label.

    Reference:
        Jensen et al., "Improving Uncertainty Estimation in Convolutional Neural Networks Using Inter-rater Agreement", MICCAI 2019.

    Example:
        >>> raters = torch.tensor([[[0, 1, 1], [0, 1, 1]]])  # (1, 2, 3): two raters who agree
        >>> RandomRaterTarget()(torch.tensor([[0, 0, 1]]), 2, context={"rater_labels": raters}).probs[0, 1]
        tensor([0., 1., 1.])
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
        raters = plain(self.side_input(context, "rater_labels"))
        valid = self.from_labels(label, num_classes, spatial_dims=spatial_dims, dtype=dtype, context=context).valid
        n, *spatial = valid.shape
        if raters.ndim < len(spatial) + 2 or len(raters) != n or list(raters.shape[raters.ndim - len(spatial) :]) != spatial:
            raise ValueError(
                f"Expected 'rater_labels' of shape (N, R, *spatial) for labels {tuple(valid.shape)}, but got {tuple(raters.shape)}. "
                "Crop and resample them together."
            )
        drawn = draw_rater(raters, ignore_index=self.ignore_index)
        mask = valid if drawn.ndim == valid.ndim else valid.unsqueeze(1)
        drawn = drawn.masked_fill(~mask, self.ignore_index)
        return self.from_labels(drawn, num_classes, spatial_dims=len(spatial), dtype=dtype, context=context)
