"""What a model would score that has looked at no image and knows only how common each class is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from densecal.labels import LabelSchema
from densecal.metrics.inputs import NLL_FLOOR
from densecal.metrics.results import Evaluation, RegionSums, case_overlap, evaluation_of
from densecal.ops.binning import Bins

__all__ = ["ClassPriorBaseline", "class_prior_baseline"]

_SUM = 1e-3
"""Shares that sum to 1 within this are shares."""


@dataclass(frozen=True)
class ClassPriorBaseline:
    """Scores of a model that predicts the same probabilities everywhere.

    Args:
        class_shares: These probabilities, one per class, sum 1.
        scores: Numbers by the keys of :meth:`densecal.metrics.Evaluation.scalars`, those of single classes left out.
    """

    class_shares: tuple[float, ...]
    scores: dict[str, float]


def class_prior_baseline(evaluation: Evaluation, class_shares: Sequence[float]) -> ClassPriorBaseline:
    """Scores on the evaluated cases of a model that predicts each class with its share, the same everywhere.

    That model is calibrated where the shares hold, and useless. Beside it one sees what the images have taught: where one class covers most of the pixels, pixel
    accuracy, Brier score and negative log-likelihood look good without any.

    The numbers are those that :class:`densecal.metrics.SegmentationEvaluation` gives for constant probabilities. Nothing is read again for them: counts of the
    reference's classes, which the evaluation has per case, say it all.

    Args:
        evaluation: Any model's results on the cases, of exclusive classes.
        class_shares: Share of each class among the labelled pixels of the training set, in [0, 1], sum 1. A class with share 0 costs 27.6 nats per pixel.

    Returns:
        The scores: overlap, and per region accuracy, ``ece``, ``ece_classwise``, ``nll`` and, where references are hard, ``brier``.

    Raises:
        ValueError: If there is not one share per class, they are no shares, or the evaluation is one of regions that may overlap.

    Example:
        Three quarters of these pixels are road, as in training, so that "road" everywhere is right in three of four:

        >>> from densecal.metrics import SegmentationEvaluation
        >>> evaluation = SegmentationEvaluation(LabelSchema(("road", "car"), background=None))
        >>> evaluation.update(torch.full((1, 2, 4), 0.5), torch.tensor([[0, 0, 0, 1]]), torch.tensor([0]))
        >>> scores = class_prior_baseline(evaluation.compute(), [0.75, 0.25]).scores
        >>> scores["accuracy"], scores["iou_dataset"], scores["ece"], round(scores["nll"], 4)
        (0.75, 0.375, 0.0, 0.5623)
    """
    num_classes = len(evaluation.class_names)
    shares = torch.as_tensor(class_shares, dtype=torch.float64)
    if shares.shape != (num_classes,) or not bool(((shares >= 0) & (shares <= 1)).all()) or abs(float(shares.sum()) - 1) > _SUM:
        raise ValueError(f"Expected `class_shares` in [0, 1] that sum to 1, one for each of {num_classes} classes, but got {shares.tolist()}.")
    if any(part.regions for part in evaluation.case_sums.values()):
        raise ValueError(
            "Expected an evaluation of exclusive classes, but got one of regions that may overlap: class shares say nothing about those."
        )
    overlap = case_overlap(evaluation)
    background = next((c for c in range(num_classes) if c not in evaluation.foreground), None)
    result = evaluation_of(
        LabelSchema(evaluation.class_names, background=background),
        [row["case_index"] for row in evaluation.cases],
        {region: _constant_sums(part, shares) for region, part in evaluation.case_sums.items()},
        overlap=_constant_overlap(overlap, shares),
        soft=torch.full_like(overlap, math.nan),
        settings=replace(evaluation.settings, num_bins=1, replicates=0),
    )
    soft = "soft_dice" in evaluation.mean  # the squares of soft references are not among the sums
    scores = {key: value for key, value in result.scalars().items() if "/" not in key and not (soft and key.startswith("brier"))}
    return ClassPriorBaseline(tuple(shares.tolist()), scores)


def _constant_sums(sums: RegionSums, shares: Tensor) -> RegionSums:
    """The sums of a region, had every pixel of it the same probabilities."""
    count = sums.top_label.count.sum(-1).cpu()  # (n,)
    reference = sums.classwise.correct.sum(-1).cpu()  # (n, K)
    first = int(shares.argmax())
    return RegionSums(
        nll=-(reference @ shares.clamp(min=NLL_FLOOR).log()),
        brier=count * (1 + shares.square().sum()) - 2 * reference @ shares,
        top_label=Bins(count[:, None], count[:, None] * shares[first], reference[:, first, None]),
        classwise=Bins(count[:, None, None].expand(-1, len(shares), 1), (count[:, None] * shares)[..., None], reference[..., None]),
    )


def _constant_overlap(overlap: Tensor, shares: Tensor) -> Tensor:
    """Counts as in ``overlap`` ``(n, 3, K)``, had the most common class been predicted everywhere."""
    reference = overlap[:, 2]
    everywhere = torch.nn.functional.one_hot(shares.argmax(), len(shares))
    return torch.stack([reference * everywhere, reference.sum(-1, keepdim=True) * everywhere, reference], dim=1)
