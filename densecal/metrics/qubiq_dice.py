"""Dice of prediction and soft reference cut at several levels, as the QUBIQ challenge compares a prediction with its raters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.overlap import Average, MeanOverCases, dice_from_counts
from densecal.ops.activation import Activation
from densecal.registry import METRICS

__all__ = ["QUBIQ_THRESHOLDS", "QubiqDice", "dice_at_thresholds", "qubiq_dice"]

QUBIQ_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_NEAR = 1e-6
"""A share this little below a threshold reaches it: 3 of 10 raters are 0.3, whatever their mean was rounded to."""


def qubiq_dice(
    probs: Tensor,
    label: Tensor,
    *,
    thresholds: Sequence[float] = QUBIQ_THRESHOLDS,
    mask: Tensor | None = None,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    activation: Activation = "softmax",
    validate_args: bool = True,
) -> Tensor:
    r"""Mean over thresholds :math:`t` of the Dice between where the prediction reaches it and where the reference does, per case and class:

    .. math:: \frac1T \sum_t \frac{2\, |\{p \ge t\} \cap \{q \ge t\}|}{|\{p \ge t\}| + |\{q \ge t\}|}

    A prediction has to reproduce where all, most and some of the raters saw a class, not only where most did. At a threshold that neither reaches the two agree, which
    counts as 1.

    Args:
        probs: Probabilities p ``(N, C, *spatial)``, floating.
        label: Soft reference q ``(N, C, *spatial)``, floating, the share of the raters who chose each class; or a label map as for :func:`densecal.metrics.dice_score`.
        thresholds: The levels t, in (0, 1], rising.
        mask: True where a pixel counts, ``(N, *spatial)``, bool.
        ignore_index: Label of pixels to leave out.
        activation: What made the probabilities: ``"softmax"``, exclusive classes, or ``"sigmoid"``, one or several regions that may overlap.
        validate_args: Look at the values too; that waits for a GPU.

    Returns:
        ``(N, C)`` in [0, 1], float64. NaN where neither reaches any threshold.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If shapes do not fit, ``thresholds`` are not as above or, with ``validate_args``, values are out of range.

    Reference:
        Li et al., "QUBIQ: Uncertainty Quantification for Biomedical Image Segmentation Challenge", 2024, arXiv:2405.18435. What the challenge's own program does at a
        threshold that neither reaches, and whether a share equal to a threshold reaches it, is not published; both are choices here.

    Example:
        One of two raters marked the second pixel. The prediction 0.6 reaches 0.6, which the share 0.5 does not:

        >>> shares = torch.tensor([[[1.0, 0.5], [0.0, 0.5]]])
        >>> probs = torch.tensor([[[0.9, 0.4], [0.1, 0.6]]])
        >>> qubiq_dice(probs, shares, thresholds=[0.5, 0.6, 0.7])[:, 1]  # (1 + 0 + 1) / 3
        tensor([0.6667], dtype=torch.float64)
    """
    pixels = read_pixels(probs, label, mask, ignore_index=ignore_index, activation=activation, validate_args=validate_args)
    return dice_at_thresholds(pixels, _checked(thresholds))


def dice_at_thresholds(pixels: Pixels, thresholds: Sequence[float] = QUBIQ_THRESHOLDS) -> Tensor:
    """What :func:`qubiq_dice` gives, of pixels that were read already: one pass over each class, whatever the number of thresholds."""
    levels = len(thresholds) + 1
    edges = torch.tensor(thresholds, dtype=torch.float64, device=pixels.probs.device)
    probs, shares, valid = pixels.per_class()
    scores = []
    for k in range(pixels.num_classes):
        p, q, counted = probs[:, k], shares[:, k], valid[:, min(k, valid.shape[1] - 1)]
        # How many thresholds each reaches: two numbers of 0 to T, counted together in a table; those that do not count go to a row of their own.
        pair = _level(p, edges) * levels + _level(q, edges)
        slot = torch.where(counted, pair, levels * levels)
        table = torch.zeros(len(p), levels * levels + 1, dtype=torch.int64, device=p.device).scatter_add_(1, slot, torch.ones_like(slot))
        table = table[:, :-1].view(-1, levels, levels)
        reached = table.flip((1, 2)).cumsum(1).cumsum(2).flip((1, 2))  # by at least so many, (N, T + 1, T + 1)
        intersection = reached.diagonal(dim1=1, dim2=2)[:, 1:]
        predicted, reference = reached[:, 1:, 0], reached[:, 0, 1:]
        dice = dice_from_counts(intersection, predicted, reference).nan_to_num(1.0).mean(1)
        scores.append(torch.where(predicted[:, 0] + reference[:, 0] > 0, dice, math.nan))
    return torch.stack(scores, dim=1)


def _level(values: Tensor, edges: Tensor) -> Tensor:
    """How many thresholds are reached, int64."""
    return torch.bucketize(values.to(edges.dtype) + _NEAR, edges, right=True)


def _checked(thresholds: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(float(t) for t in thresholds)
    if not levels or list(levels) != sorted(set(levels)) or levels[0] <= 0 or levels[-1] > 1:
        raise ValueError(f"Expected `thresholds` in (0, 1], each above the one before, but got {list(thresholds)}.")
    return levels


@METRICS.register("qubiq_dice")
class QubiqDice(MeanOverCases):
    """Dice at several thresholds per case, averaged over cases. Each row of a batch is one whole case. See :func:`qubiq_dice`.

    Args:
        num_classes: Number of classes C, background included, or of regions.
        thresholds: The levels, in (0, 1], rising.
        background: Class left out of ``"macro"``, or ``None``. Regions have no background: all count.
        average: ``"macro"``: mean over the foreground classes that a case has or a prediction claims, then over cases. ``"none"``: per class, the mean over
            the cases where that class is predicted or there.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: As :class:`densecal.metrics.DiceScore`, or if ``thresholds`` are not as above.

    Example:
        >>> metric = QubiqDice(2)
        >>> metric.update(torch.tensor([[[0.9, 0.4], [0.1, 0.6]]]), torch.tensor([[[1.0, 0.4], [0.0, 0.6]]]))
        >>> metric.compute(), metric.count  # at 0.1 the prediction has a pixel too many
        (tensor(0.9630, dtype=torch.float64), tensor(1))
    """

    def __init__(
        self,
        num_classes: int,
        *,
        thresholds: Sequence[float] = QUBIQ_THRESHOLDS,
        background: int | None = 0,
        average: Average = "macro",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        activation: Activation = "softmax",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            background=background,
            average=average,
            ignore_index=ignore_index,
            activation=activation,
            validate_args=validate_args,
            **kwargs,
        )
        self.thresholds = _checked(thresholds)

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of whole cases: probabilities and soft reference ``(N, C, *spatial)``, and an optional mask ``(N, *spatial)``."""
        self.add_scores(dice_at_thresholds(self.read(probs, label, mask), self.thresholds))
