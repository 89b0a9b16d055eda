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
from densecal.ops.binning import Bins, bin_index

__all__ = ["ClassPriorBaseline", "class_prior_baseline"]

_SUM = 1e-3
"""Shares that sum to 1 within this are shares."""


@dataclass(frozen=True)
class ClassPriorBaseline:
    """Scores of a model that predicts the same probabilities everywhere.

    Args:
        class_shares: These probabilities, one per class, sum 1; or one per region.
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
        evaluation: Any model's results on the cases.
        class_shares: Share of each class among the labelled pixels of the training set, in [0, 1], sum 1; of regions the share of each, whatever the sum. A class with
            share 0 costs 27.6 nats per pixel.

    Returns:
        The scores: overlap, and per region accuracy, ``ece``, ``ece_classwise``, ``nll`` and, where references are hard, ``brier``.

    Raises:
        ValueError: If there is not one share per class or region, or they are no shares.

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
    regions = any(part.regions for part in evaluation.case_sums.values())
    in_range = shares.shape == (num_classes,) and bool(((shares >= 0) & (shares <= 1)).all())
    if not in_range or (not regions and abs(float(shares.sum()) - 1) > _SUM):
        what = f", one for each of {num_classes} regions" if regions else f" that sum to 1, one for each of {num_classes} classes"
        raise ValueError(f"Expected `class_shares` in [0, 1]{what}, but got {shares.tolist()}.")
    overlap = case_overlap(evaluation)
    background = next((c for c in range(num_classes) if c not in evaluation.foreground), None)
    everywhere = (shares > 0.5).double() if regions else torch.nn.functional.one_hot(shares.argmax(), num_classes).double()
    result = evaluation_of(
        LabelSchema(evaluation.class_names, background=background, activation="sigmoid" if regions else "softmax"),
        [row["case_index"] for row in evaluation.cases],
        {region: _constant_sums(part, shares, evaluation.settings.num_bins) for region, part in evaluation.case_sums.items()},
        overlap=_constant_overlap(overlap, everywhere, evaluation.case_sums["all"]),
        soft=torch.full_like(overlap, math.nan),
        settings=replace(evaluation.settings, replicates=0),
    )
    soft = "soft_dice" in evaluation.mean  # the squares of soft references are not among the sums
    scores = {key: value for key, value in result.scalars().items() if "/" not in key and not (soft and key.startswith("brier"))}
    return ClassPriorBaseline(tuple(shares.tolist()), scores)


def _constant_sums(sums: RegionSums, shares: Tensor, num_bins: int) -> RegionSums:
    """The sums of a part of the images, had every pixel of it the same probabilities: of Q questions with O outcomes, one question with a class as each outcome,
    or one for each region with two."""
    count = sums.classwise.count.sum(-1).cpu().double()  # (n, K)
    reference = sums.classwise.correct.sum(-1).cpu()
    outcomes, probs = reference.unsqueeze(-1), shares.unsqueeze(-1)  # (n, O, Q) and (O, Q)
    if sums.regions:
        outcomes, probs = torch.stack([count - reference, reference], dim=1), torch.stack([1 - shares, shares])
    asked = count if sums.regions else count[:, :1]  # (n, Q)
    confidence, first = probs.max(0)
    place = bin_index(confidence.float(), num_bins)
    in_bins = torch.nn.functional.one_hot(place, num_bins).double()  # (Q, B)
    correct = outcomes.gather(1, first.expand(len(outcomes), 1, -1)).squeeze(1)
    return RegionSums(
        nll=-(outcomes * probs.clamp(min=NLL_FLOOR).log()).sum((1, 2)),
        brier=(asked * (1 + probs.square().sum(0)) - 2 * (outcomes * probs).sum(1)).sum(1),
        top_label=Bins(asked @ in_bins, (asked * confidence) @ in_bins, correct @ in_bins),
        classwise=Bins(count.unsqueeze(-1), (count * shares).unsqueeze(-1), reference.unsqueeze(-1)),
        regions=sums.regions,
    )


def _constant_overlap(overlap: Tensor, everywhere: Tensor, sums: RegionSums) -> Tensor:
    """Counts as in ``overlap`` ``(n, 3, K)``, had the classes or regions marked in ``everywhere`` ``(K,)`` been predicted at every pixel."""
    reference = overlap[:, 2]
    return torch.stack([reference * everywhere, sums.classwise.count.sum(-1).cpu() * everywhere, reference], dim=1)
