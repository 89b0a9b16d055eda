"""What the numbers say, in sentences for readers who do not live among calibration errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from densecal.metrics.class_prior import ClassPriorBaseline
from densecal.metrics.evaluation import Evaluation
from densecal.report.figures import risk_curves
from densecal.report.reliability import REGION_TITLES
from densecal.report.tables import number

__all__ = ["findings"]

_CONFIDENT = 0.9
_PLACES = {"all": "over all {element}", "foreground": "in and near the structure", "boundary": "along boundaries"}


def findings(
    evaluation: Evaluation, cases: Sequence[Mapping[str, Any]], *, element: str = "voxels", baseline: ClassPriorBaseline | None = None
) -> list[tuple[str, str]]:
    """Headline and sentences of each finding, most important first.

    Args:
        evaluation: The results.
        cases: Its rows with ``case_id``.
        element: ``"voxels"`` or ``"pixels"``.
        baseline: What a model scores that knows the class shares alone.
    """
    found = [
        _quality(evaluation, cases, element),
        _against(evaluation, baseline),
        *(_confidence(evaluation, region, element) for region in evaluation.bins),
    ]
    found += [_confident_errors(evaluation, element), _by_distance(evaluation, element), _abstention(evaluation, element)]
    return [finding for finding in found if finding is not None]


def percent(share: float) -> str:
    """Two significant digits below 10 %, a no-break space before the sign.

    Example:
        >>> percent(0.4567), percent(0.0123), percent(0.00012), percent(1.0)
        ('45.7\\xa0%', '1.2\\xa0%', '0.012\\xa0%', '100\\xa0%')
    """
    value = 100 * share
    digits = 0 if value >= 99.995 or value == 0 else 1 if value >= 1 else min(1 - math.floor(math.log10(value)), 4)
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def _quality(evaluation: Evaluation, cases: Sequence[Mapping[str, Any]], element: str) -> tuple[str, str] | None:
    numbers = evaluation.scalars()
    key, of_case = evaluation.leading
    value = numbers.get(key, math.nan)
    if not math.isfinite(value):
        return None
    mean = number(value, evaluation.intervals.get(key)).text
    if key == "dice":
        headline = f"Mean Dice {value:.2f}"
        sentence = f"Predicted and reference structures overlap with a mean Dice of {mean}; 1 would be the same outline."
    else:
        headline = f"Mean IoU {value:.2f}, {percent(numbers['accuracy'])} of the {element} right"
        sentence = (
            f"The classes overlap with a mean IoU of {mean} over the whole data set, {number(numbers['iou_image']).text} averaged per image and "
            f"{number(numbers['iou_class']).text} per class; 1 would be the same outline."
        )
        of_class = {name: numbers[f"iou_dataset/{name}"] for name in evaluation.class_names}
        hardest = sorted((name for name, iou in of_class.items() if math.isfinite(iou)), key=of_class.__getitem__)[:3]
        if len(hardest) > 1:
            sentence += f" Hardest are {', '.join(f'{name} ({of_class[name]:.2f})' for name in hardest)}."
    scored = [row for row in cases if isinstance(row[of_case], float) and math.isfinite(row[of_case])]
    if len(scored) > 1:
        worst = min(scored, key=lambda row: row[of_case])
        sentence += f" The worst of {len(scored)} cases ({worst['case_id']}) has {'a mean IoU of ' if of_case == 'iou' else ''}{worst[of_case]:.3f}."
    if absent := [name for name in evaluation.class_names if evaluation.num_defined.get(f"dice/{name}") == 0]:
        few = ", ".join(absent[:6]) + (f" and {len(absent) - 6} more" if len(absent) > 6 else "")
        sentence += f" Nothing can be said about {few}: in no case is it there or predicted."
    return headline, sentence


def _against(evaluation: Evaluation, baseline: ClassPriorBaseline | None) -> tuple[str, str] | None:
    """What the images taught, beside what the class shares alone give."""
    if baseline is None:
        return None
    numbers, prior = evaluation.scalars(), baseline.scores
    names = {
        "nll": "negative log-likelihood",
        "accuracy": "accuracy",
        evaluation.leading[0]: "mean Dice" if evaluation.leading[0] == "dice" else "mean IoU",
    }
    pairs = [
        f"{name} {prior[key]:.2f} (this model {numbers[key]:.2f})" for key, name in reversed(names.items()) if math.isfinite(prior.get(key, math.nan))
    ]
    if not pairs:
        return None
    gain = prior["nll"] - numbers["nll"]
    headline = f"{'Better' if gain > 0 else 'No better'} than knowing how common each class is"
    return headline, f"A model that knows the class shares of the training labels alone would score: {', '.join(pairs)}."


def _focus(evaluation: Evaluation) -> str:
    """The region that tells most: much of the background is easy."""
    return "foreground" if "foreground" in evaluation.bins else "all"


def _top_label(evaluation: Evaluation, region: str) -> tuple[np.ndarray, ...]:
    top = evaluation.bins[region]["top_label"]
    edges, count = (np.array(top[key], dtype=float) for key in ("edges", "count"))
    confidence, accuracy = (np.nan_to_num(np.array(top[key], dtype=float)) for key in ("mean_confidence", "accuracy"))
    return edges, count, confidence, accuracy


def _confidence(evaluation: Evaluation, region: str, element: str) -> tuple[str, str] | None:
    edges, count, confidence, accuracy = _top_label(evaluation, region)
    n = count.sum()
    if n == 0:
        return None
    mean_confidence, mean_accuracy = float((count * confidence).sum() / n), float((count * accuracy).sum() / n)
    gap = mean_confidence - mean_accuracy
    verdict = "Well matched on average" if abs(gap) < 0.005 else f"{'Over' if gap > 0 else 'Under'}-confident by {100 * abs(gap):.1f} points"
    place = _PLACES.get(region, region).format(element=element)
    sentence = f"The model is on average {percent(mean_confidence)} sure and right in {percent(mean_accuracy)}."
    if region != _focus(evaluation):
        return f"{verdict} {place}", sentence
    gaps = count / n * np.abs(confidence - accuracy)
    worst = int(gaps.argmax())
    if gaps[worst] > 0:
        sentence += (
            f" What adds most to its calibration error: of the {int(count[worst]):,} {element} predicted with a confidence of {100 * edges[worst]:.0f} to "
            f"{percent(edges[worst + 1])}, on average {percent(confidence[worst])}, {percent(accuracy[worst])} are right."
        )
    return f"{verdict} {place}", sentence


def _confident_errors(evaluation: Evaluation, element: str) -> tuple[str, str] | None:
    region = _focus(evaluation)
    edges, count, _, accuracy = _top_label(evaluation, region)
    sure = edges[:-1] >= _CONFIDENT - 1e-9
    n = count[sure].sum()
    wrong, errors = float((count * (1 - accuracy))[sure].sum()), float((count * (1 - accuracy)).sum())
    if n == 0 or errors == 0:
        return None
    place = _PLACES[region].format(element=element)
    threshold = percent(float(edges[:-1][sure][0]))
    sentence = f"Of {int(n):,} {element} predicted with more than {threshold} confidence {place}, {percent(wrong / n)} are wrong. "
    return f"{percent(wrong / errors)} of the errors are made with confidence", sentence + f"That is {percent(wrong / errors)} of all errors there."


def _by_distance(evaluation: Evaluation, element: str) -> tuple[str, str] | None:
    curve = evaluation.curves.get("boundary_distance")
    if not curve:
        return None
    edges, count, accuracy, confidence = (np.array(curve[key], dtype=float) for key in ("edges", "count", "accuracy", "mean_confidence"))
    filled = np.flatnonzero(count > 0)
    if len(filled) < 2:
        return None
    near, far = filled[0], filled[-1]
    unit = curve["unit"].removesuffix("s") if edges[near + 1] == 1 else curve["unit"]
    share = float((count * np.nan_to_num(1 - accuracy))[near] / max(float(np.nansum(count * (1 - accuracy))), 1e-12))
    sentence = (
        f"Within {edges[near + 1]:g} {unit} of a boundary {percent(1 - accuracy[near])} of the {element} are wrong, and the model expects "
        f"{percent(1 - confidence[near])}; beyond {edges[far]:g} {curve['unit']}, {percent(1 - accuracy[far])} are, and it expects {percent(1 - confidence[far])}."
    )
    return f"{percent(share)} of the errors lie right at a boundary", sentence


def _abstention(evaluation: Evaluation, element: str) -> tuple[str, str] | None:
    curves = risk_curves(evaluation)
    region = "foreground" if "foreground" in curves else "all"
    if region not in curves:
        return None
    coverage, risk = (np.array(curves[region][key], dtype=float) for key in ("coverage", "risk"))
    order = np.argsort(coverage)
    kept, everything = (float(np.interp(c, coverage[order], risk[order])) for c in (0.9, 1.0))
    if not (math.isfinite(kept) and everything > 0):
        return None
    place = REGION_TITLES[region].lower()
    sentence = (
        f"If the tenth of the {element} with the least confidence ({place}) went to a human reader, the error rate of the rest would be "
        f"{percent(kept)} instead of {percent(everything)}."
    )
    return f"Confidence finds {percent(max(0.0, 1 - 0.9 * kept / everything))} of the errors in the least certain tenth", sentence
