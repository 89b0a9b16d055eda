"""Names of the numbers in words, which way is better, and the tables that show them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from densecal.labels import LabelSchema
from densecal.metrics.class_prior import ClassPriorBaseline
from densecal.metrics.evaluation import Evaluation
from densecal.report.figures import classwise_errors
from densecal.report.reliability import REGION_TITLES
from densecal.report.summary import hex_color
from densecal.report.tables import Table, number, text

__all__ = [
    "MEASURES",
    "Measure",
    "all_numbers",
    "baseline_table",
    "case_table",
    "class_table",
    "definition",
    "fine_grained_table",
    "further_table",
    "headline",
    "measure",
    "overlap_table",
    "pooled_table",
    "scalar_key",
    "used_definitions",
]

_WHERE = {"foreground": "near the structure", "boundary": "along boundaries"}


@dataclass(frozen=True)
class Measure:
    """A number of an evaluation.

    Args:
        key: As in ``Evaluation.pooled`` or, for overlap, ``Evaluation.mean``.
        name: In words.
        better: ``"higher"``, ``"lower"``, or ``""`` where neither is.
        usual: Shown at once, not among the further measures.
        digits: Decimals.
        short: Name at the head of a column; by default ``name``.
    """

    key: str
    name: str
    better: str = "lower"
    usual: bool = False
    digits: int = 3
    short: str = ""


OVERLAP = (
    Measure("dice", "Dice", "higher", usual=True),
    Measure("iou", "IoU", "higher", usual=True),
    Measure("soft_dice", "Soft Dice", "higher", usual=True),
    Measure("soft_iou", "Soft IoU", "higher", usual=True),
    Measure("qubiq_dice", "QUBIQ Dice", "higher", usual=True),
    Measure("nsd", "Surface Dice (NSD)", "higher", usual=True, short="NSD"),
    Measure("hd95", "Hausdorff distance, 95 %", usual=True, digits=2, short="HD95"),
    Measure("assd", "Mean surface distance", usual=True, digits=2, short="ASSD"),
)
POOLED = (
    Measure("ece_top_label", "ECE, top label", usual=True),
    Measure("ece_classwise", "ECE, classwise", usual=True),
    Measure("nll", "Negative log-likelihood", usual=True, short="NLL"),
    Measure("brier", "Brier score", usual=True, short="Brier"),
    Measure("accuracy", "Accuracy", "higher", usual=True),
    Measure("aurc", "Area under the risk-coverage curve", usual=True, short="AURC"),
    Measure("mce", "Maximum calibration error"),
    Measure("average_ce", "Average calibration error, bins alike"),
    Measure("rms_ce", "Root mean square calibration error"),
    Measure("signed_ce", "Mean confidence minus accuracy", ""),
    Measure("overconfidence", "Over-confidence part of the ECE"),
    Measure("underconfidence", "Under-confidence part of the ECE"),
    Measure("ece_equal_mass", "ECE, bins of equal mass"),
    Measure("smooth_ece", "Smooth ECE"),
    Measure("debiased_ce", "Debiased calibration error"),
    Measure("eaurc", "Excess area under the risk-coverage curve"),
    Measure("aurc_normalised", "Area under the risk-coverage curve, normalised logits"),
    Measure("brier_calibration", "Brier score, calibration part"),
    Measure("brier_refinement", "Brier score, refinement part"),
)
MEASURES = {measure.key: measure for measure in (*OVERLAP, *POOLED)} | {"ece": Measure("ece", "ECE", usual=True)}

_OVERLAP_NAMES = {"accuracy": "Accuracy", "iou": "IoU", "dice": "Dice"}
_FINE_GRAINED = re.compile(r"(accuracy|iou|dice)_((?:dataset|image|class)(?:_worst(?:_mean)?)?)")
_SENSES = {
    "dataset": "whole data set (D)",
    "image": "per image (I)",
    "image_worst": "worst 10 % of images",
    "image_worst_mean": "worst images, mean over shares",
    "class": "per class (C)",
    "class_worst": "worst 10 % per class",
    "class_worst_mean": "worst per class, mean over shares",
}


def measure(key: str) -> Measure:
    """Name and sense of any key of ``scalars()`` or ``mean``.

    Example:
        >>> measure("ece_foreground").name, measure("dice/lesion").name, measure("iou_image_worst").better
        ('ECE near the structure', 'Dice of lesion', 'higher')
        >>> measure("iou_dataset").name, measure("iou_dataset").short, measure("iou_dataset/car").name
        ('mIoU, whole data set (D)', 'mIoU D', 'IoU, whole data set (D) of car')
    """
    head, _, class_name = key.partition("/")
    per_case = head.startswith("case_")
    head = head.removeprefix("case_")
    region = next((region for region in _WHERE if head.endswith(f"_{region}")), "")
    base = head.removesuffix(f"_{region}") if region else head
    if fine := _FINE_GRAINED.fullmatch(base):
        one, sense = ("" if class_name else "m") + _OVERLAP_NAMES[fine[1]], _SENSES[fine[2]]
        letter = re.search(r"\((.)\)$", sense)
        known = Measure(base, f"{one}, {sense}", "higher", short=f"{one} {letter[1]}" if letter else "")
    else:
        known = MEASURES.get(base, Measure(base, base.replace("_", " "), ""))
    where = f" {_WHERE[region]}" if region else ""
    name = known.name + where + (f" of {class_name}" if class_name else "") + (" per case" if per_case else "")
    return replace(known, key=key, name=name, short=(known.short or known.name) + where + (f" {class_name}" if class_name else ""))


def headline(evaluation: Evaluation) -> list[Measure]:
    """The few numbers at the top, those first that the field reads first: Dice where there is a structure before a background; where every class counts, mean
    IoU in three senses and the share of pixels that are right."""
    if evaluation.leading[0] == "dice":
        named = {
            "dice": "Dice, mean over cases",
            "ece_foreground": "ECE, near the structure",
            "ece": "ECE, everywhere",
            "nll_foreground": "Negative log-likelihood, near the structure",
        }
    else:
        element = evaluation.settings.element.removesuffix("s")
        named = {
            "iou_dataset": "mIoU, whole data set (D)",
            "iou_image": "mIoU, per image (I)",
            "iou_class": "mIoU, per class (C)",
            "accuracy": f"{element.capitalize()} accuracy",
            "ece": "ECE, everywhere",
            "ece_boundary": "ECE, along boundaries",
            "ece_classwise": "ECE, classwise",
            "nll": "Negative log-likelihood",
        }
    numbers = evaluation.scalars()
    return [replace(measure(key), name=name) for key, name in named.items() if key in numbers]


def scalar_key(key: str, region: str) -> str:
    """Key in ``scalars()``, ``intervals`` and ``definitions`` of a key of ``pooled[region]``."""
    return ("ece" if key == "ece_top_label" else key) + ("" if region == "all" else f"_{region}")


def all_numbers(evaluation: Evaluation) -> dict[str, float]:
    """Every number that has a key."""
    return {**evaluation.mean, **evaluation.scalars()}


def definition(evaluation: Evaluation, key: str) -> str:
    """The sentence about a key, empty if there is none."""
    return evaluation.definitions.get(key) or evaluation.definitions.get(f"{key.split('/')[0]}/<class>", "")


def used_definitions(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """The sentences about all numbers that are there, class names as ``<class>``."""
    found: dict[str, str] = {}
    for evaluation in evaluations:
        for key in all_numbers(evaluation):
            general = f"{key.split('/')[0]}/<class>" if "/" in key else key
            if sentence := definition(evaluation, key):
                found.setdefault(general, sentence)
    return list(found.items())


def overlap_table(evaluation: Evaluation) -> Table:
    """Scores per case: mean with its interval, range, number of cases."""
    keys = [known.key for known in _leading_first(evaluation) if known.key in evaluation.mean]
    keys += [key for key in evaluation.mean if key not in keys and "/" not in key and not key.startswith("case_")]
    rows = []
    for key in keys:
        values = np.array([math.nan if row.get(key) is None else row[key] for row in evaluation.cases], dtype=float)
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)
        known = measure(key)
        rows.append(
            (
                text(known.name, definition=definition(evaluation, key)),
                number(evaluation.mean[key], evaluation.intervals.get(key), digits=known.digits),
                number(low, digits=known.digits),
                number(high, digits=known.digits),
                number(int(values.size)),
            )
        )
    counted = "Foreground" if len(evaluation.foreground) < len(evaluation.class_names) else "All classes"
    header = (f"{counted}, per case", _with_interval("Mean", evaluation), "Lowest", "Highest", "Cases")
    return Table("overlap", "Segmentation quality per case", tuple(text(name) for name in header), tuple(rows))


def pooled_table(evaluation: Evaluation, *, element: str = "voxels") -> Table:
    """The usual measures over the voxels of all cases, one column per region."""
    return _pooled("pooled", "Confidence and accuracy, pooled over all cases", evaluation, [m for m in POOLED if m.usual], element=element)


def further_table(evaluation: Evaluation) -> Table:
    """The less usual measures, and any that has no name here."""
    known = {m.key for m in POOLED}
    keys = dict.fromkeys(key for values in evaluation.pooled.values() for key in values)
    others = [measure(key) for key in keys if key not in known and key != "num_voxels"]
    return _pooled("further", "Further measures of calibration, pooled over all cases", evaluation, [*(m for m in POOLED if not m.usual), *others])


def _pooled(name: str, caption: str, evaluation: Evaluation, measures: Sequence[Measure], *, element: str = "") -> Table:
    rows = []
    for known in measures:
        if any(known.key in values for values in evaluation.pooled.values()):
            cells = []
            for region, values in evaluation.pooled.items():
                key = scalar_key(known.key, region)
                cells.append(number(values.get(known.key), evaluation.intervals.get(key), digits=known.digits))
            rows.append((text(known.name, definition=definition(evaluation, scalar_key(known.key, "all"))), *cells))
    if element:
        rows.append((text(f"Number of {element}"), *(number(values.get("num_voxels")) for values in evaluation.pooled.values())))
    header = (text(_with_interval("Measure", evaluation)), *(text(REGION_TITLES.get(region, region)) for region in evaluation.pooled))
    return Table(name, caption, header, tuple(rows))


def fine_grained_table(evaluation: Evaluation) -> Table:
    """Overlap over the data set, per image and per class, and of the worst ones; no rows where the evaluation has none."""
    numbers, intervals = evaluation.fine_grained, evaluation.intervals
    senses = [sense for sense in _SENSES if f"iou_{sense}" in numbers]
    order = ("dice", "iou", "accuracy") if evaluation.leading[0] == "dice" else ("iou", "accuracy", "dice")
    rows = [
        (text(_OVERLAP_NAMES[name]), *(number(numbers[key], intervals.get(key)) for key in (f"{name}_{sense}" for sense in senses)))
        for name in order
        if senses
    ]
    names = [_SENSES[sense] for sense in senses]
    header = (
        text(_with_interval("Mean over classes", evaluation)),
        *(text(name[0].upper() + name[1:], definition=definition(evaluation, f"iou_{s}")) for name, s in zip(names, senses, strict=True)),
    )
    return Table("fine_grained", "Overlap over the whole data set, per image and per class", header, tuple(rows))


def baseline_table(evaluation: Evaluation, baseline: ClassPriorBaseline | None) -> Table:
    """The model beside one that knows the class shares alone; no rows where there is no baseline."""
    model, prior = evaluation.scalars(), baseline.scores if baseline else {}
    rows = tuple(
        (
            text(known.name, definition=definition(evaluation, known.key)),
            number(model[known.key], digits=known.digits),
            number(prior[known.key], digits=known.digits),
        )
        for known in headline(evaluation)
        if known.key in prior
    )
    note = "Class shares alone: a model that has seen no image and predicts each class everywhere with its share of the training labels."
    return Table(
        "baseline",
        "Beside a model that knows the class shares alone",
        (text("Measure"), text("This model"), text("Class shares alone")),
        rows,
        note=note,
    )


def class_table(evaluation: Evaluation, schema: LabelSchema) -> Table:
    """One row per class: overlap, classwise ECE per region, size."""
    per_class = [known for known in _leading_first(evaluation) if f"{known.key}/{schema.names[0]}" in evaluation.mean]
    errors = {region: classwise_errors(evaluation, region) for region in evaluation.bins}
    pooled = [evaluation.fine_grained.get(f"iou_dataset/{name}") for name in schema.names]
    rows = []
    for c, name in enumerate(schema.names):
        rows.append(
            (
                text(name, color=hex_color(schema.palette[c]), remark="" if c in schema.foreground else "not in means"),
                number(pooled[c]),
                *(
                    number(evaluation.mean.get(f"{known.key}/{name}"), evaluation.intervals.get(f"{known.key}/{name}"), digits=known.digits)
                    for known in per_class
                ),
                number(evaluation.num_defined.get(f"dice/{name}", 0)),
                *(number(errors[region][c]) for region in errors),
                number(sum(row[f"voxels_reference/{name}"] for row in evaluation.cases)),
                number(sum(row[f"voxels_predicted/{name}"] for row in evaluation.cases)),
            )
        )
    header = (
        text("Class"),
        text("IoU, whole data set", definition=definition(evaluation, "iou_dataset/<class>")),
        *(text(known.short or known.name, definition=definition(evaluation, f"{known.key}/<class>")) for known in per_class),
        text("Cases"),
        *(text(f"Classwise ECE {_WHERE.get(region, 'everywhere')}") for region in errors),
        text("Size in reference"),
        text("Size in prediction"),
    )
    return Table("classes", "Results per class", header, tuple(rows))


_MAX_CLASS_COLUMNS = 8  # of overlap in the table of cases; cases.csv has all


def case_table(evaluation: Evaluation, cases: Sequence[Mapping[str, Any]]) -> Table:
    """One row per case, in the order given; ``cases`` are named rows."""
    classes = [evaluation.class_names[c] for c in evaluation.foreground]
    lead, *others = (known.key for known in _leading_first(evaluation))
    keys = [lead, *(f"{lead}/{name}" for name in classes if 1 < len(classes) <= _MAX_CLASS_COLUMNS), *others]
    keys += ["case_accuracy"] if lead == "iou" else []
    keys += [f"case_{key}{'' if region == 'all' else f'_{region}'}" for region in evaluation.pooled for key in ("ece", "nll", "aurc")]
    keys = [key for key in keys if any(key in row for row in cases)]
    rows = tuple((text(row["case_id"]), *(number(row.get(key), digits=measure(key).digits) for key in keys)) for row in cases)
    header = (text("Case"), *(text(measure(key).short, definition=definition(evaluation, key)) for key in keys))
    return Table("cases", "Results per case", header, rows, sorted_by=1 if lead in keys else None)


def _leading_first(evaluation: Evaluation) -> list[Measure]:
    """Scores of overlap, the leading one first."""
    return sorted(OVERLAP, key=lambda known: known.key != evaluation.leading[1])


def _with_interval(name: str, evaluation: Evaluation) -> str:
    return f"{name} (95 % interval)" if evaluation.intervals else name
