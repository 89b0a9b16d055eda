"""Proper scoring rules, pooled over all pixels: lower is better, and the true probabilities score best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.ops.activation import Activation
from densecal.registry import METRICS

__all__ = ["BrierScore", "NegativeLogLikelihood", "brier_score", "negative_log_likelihood"]


def negative_log_likelihood(
    probs: Tensor,
    label: Tensor,
    *,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""Mean of :math:`-\log p_y` in nats; :math:`-\sum_c q_c \log p_c` for a soft reference q.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating. Those below 1e-12 count as 1e-12, which costs 27.6 nats.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating.
        activation: What made the probabilities: ``"softmax"``, exclusive classes, or ``"sigmoid"``, regions that may overlap: the mean over pixels and regions
            of what two classes, there with p and not there with 1 - p, would give. For one channel that is the binary cross-entropy.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        Scalar, at least 0, float64. NaN where no pixel counts.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If shapes do not fit or, with ``validate_args``, values are out of range.

    Example:
        >>> negative_log_likelihood(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[0, 0]]))
        tensor(0.3466, dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return pixels.negative_log_likelihood().double().sum() / pixels.valid.sum()


def brier_score(
    probs: Tensor,
    label: Tensor,
    *,
    activation: Activation = "softmax",
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    validate_args: bool = True,
) -> Tensor:
    r"""Mean of :math:`\sum_c (p_c - q_c)^2`, the sum over classes (not the mean), q one-hot or soft.

    Arguments and errors as :func:`negative_log_likelihood`.

    Returns:
        Scalar in [0, 2], float64. NaN where no pixel counts.

    Reference:
        Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.

    Example:
        >>> brier_score(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[0, 0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return pixels.brier().double().sum() / pixels.valid.sum()


class _MeanOverPixels(Metric):
    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor

    def __init__(
        self, *, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX, validate_args: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_choice("activation", activation, ("softmax", "sigmoid"))
        self.activation: Activation = activation
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: probabilities ``(N, C, *spatial)``, labels and an optional mask ``(N, *spatial)``."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        self.total = self.total + self._values(pixels).double().sum()
        self.count = self.count + pixels.valid.sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN where nothing counted."""
        return self.total / self.count

    def _values(self, pixels: Pixels) -> Tensor:
        raise NotImplementedError


@METRICS.register("nll")
class NegativeLogLikelihood(_MeanOverPixels):
    """Mean negative log-likelihood in nats, pooled over pixels. See :func:`negative_log_likelihood`.

    Args:
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> NegativeLogLikelihood()(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[0, 0]]))
        tensor(0.3466, dtype=torch.float64)
    """

    def _values(self, pixels: Pixels) -> Tensor:
        return pixels.negative_log_likelihood()


@METRICS.register("brier")
class BrierScore(_MeanOverPixels):
    """Mean squared distance of probabilities to the reference, summed over classes, pooled over pixels. See :func:`brier_score`.

    Args:
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label of pixels to leave out.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> BrierScore()(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]), torch.tensor([[0, 0]]))
        tensor(0.2500, dtype=torch.float64)
    """

    plot_upper_bound = 2.0

    def _values(self, pixels: Pixels) -> Tensor:
        return pixels.brier()
