"""What an evaluation says, in plain numbers: per case, averaged over cases, pooled over all voxels, with intervals and a sentence for each number."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from densecal.labels import LabelSchema
from densecal.metrics.adaptive_calibration import adaptive_from_bins
from densecal.metrics.bootstrap import CaseBootstrap
from densecal.metrics.fine_grained import FINE_GRAINED_DEFINITIONS, fine_grained_overlap, sense_sums, senses_from_sums
from densecal.metrics.overlap import dice_from_counts, jaccard_from_counts
from densecal.metrics.selective_risk import aurc_from_bins, excess_aurc_from_bins, risk_coverage_from_bins
from densecal.metrics.smooth_calibration import smooth_from_bins
from densecal.ops.binning import Bins, bin_edges

__all__ = [
    "DEFINITIONS",
    "ORDERED",
    "SOFT",
    "Evaluation",
    "RegionSums",
    "Settings",
    "case_overlap",
    "evaluation_of",
    "filled_definitions",
    "ordered_numbers",
    "paired_differences",
]

_WHERE = {
    "all": "over all voxels that are not ignored",
    "foreground": "over the voxels of the reference structure and those within {foreground_radius} voxels of it (6-connected dilation in 3D, 4-connected in 2D)",
    "boundary": "over the voxels less than {boundary_width} {boundary_unit} away, centre to centre, from one that touches a voxel of another class in the reference",
}

_MEASURES = {
    "accuracy": "share of voxels whose most probable class is the reference class (for a soft reference, the mean share that it gives to that class)",
    "ece": "top-label expected calibration error: confidence of the predicted class against accuracy in {num_bins} equal bins (lower, upper], the absolute gaps "
    "weighted by the number of voxels",
    "ece_classwise": "classwise (static) expected calibration error: probability of each class against its frequency in {num_bins} equal bins (lower, upper], "
    "the absolute gaps weighted by the number of voxels, then the mean over all classes{background_too}",
    "nll": "mean negative log-likelihood in nats (cross-entropy for a soft reference), probabilities below 1e-12 counted as 1e-12",
    "brier": "mean Brier score: squared difference of probabilities and reference, summed over classes, between 0 and 2",
}
_DETAIL = {
    "mce": "top-label maximum calibration error: the largest absolute gap of a bin that is not empty, {num_bins} equal bins (lower, upper]",
    "average_ce": "top-label average calibration error: the mean absolute gap of the bins that are not empty, each counting the same, {num_bins} equal bins (lower, upper]",
    "rms_ce": "top-label root-mean-square calibration error: root of the squared gaps of {num_bins} equal bins (lower, upper] weighted by the number of voxels",
    "debiased_ce": "rms_ce with the bias removed that the finite number of voxels in a bin adds (Kumar et al. 2019); 0 where nothing is left",
    "signed_ce": "mean confidence of the predicted class minus accuracy: above 0 over-confident, below 0 under-confident",
    "overconfidence": "the part of the top-label expected calibration error from bins whose confidence is above their accuracy",
    "underconfidence": "the part of the top-label expected calibration error from bins whose confidence is below their accuracy",
    "brier_calibration": "calibration part of the Brier score: squared difference of probability and frequency in {num_bins} equal bins per class, weighted by the number "
    "of voxels, summed over classes",
    "brier_refinement": "rest of the Brier score, which recalibration cannot remove: Brier score minus its calibration part",
}
_BIN_MEASURES = {
    "mce": "maximum",
    "average_ce": "average",
    "rms_ce": "root_mean_square",
    "debiased_ce": "debiased_root_mean_square",
    "signed_ce": "signed",
    "overconfidence": "overconfidence",
    "underconfidence": "underconfidence",
}
"""Keys and what :meth:`densecal.ops.binning.Bins.calibration_error` calls the measure."""

_ORDERED = {
    "ece_equal_mass": "top-label adaptive calibration error: as the expected calibration error, in {num_bins} bins that hold the same number of voxels each",
    "smooth_ece": "top-label smooth calibration error (smECE, Błasiok and Nakkiran 2023): no bins, a Gaussian kernel whose width equals the error",
    "aurc": "area under the risk-coverage curve: mean error rate of the most confident voxels over all shares of voxels kept, confidence of the predicted class",
    "eaurc": "excess area under the risk-coverage curve: aurc minus the lowest that an order of the same predictions could have",
    "aurc_normalised": "aurc with the largest centred logit divided by the 2-norm of the centred logits in place of the confidence (post-hoc logit normalisation)",
}
_OVERLAPS = {
    "dice": ("Dice", "2 |A and B| / (|A| + |B|) of predicted and reference voxels"),
    "iou": ("intersection over union (Jaccard index)", "|A and B| / |A or B| of predicted and reference voxels"),
}
_SURFACES = {
    "hd95": "95th percentile of the Hausdorff distance between the surfaces of reference and prediction, in mm where the spacing is known, else in voxels; no value "
    "where either lacks the class",
    "nsd": "normalised surface distance: share of both surfaces that lies within {surface_tolerance} of the other, in mm where the spacing is known, else in voxels; 0 "
    "where only one of them has the class",
}
_SOFT = {
    "soft_dice": (
        "soft Dice",
        "probabilities p against shares q, (sum p + sum q - sum |p - q|) / (sum p + sum q), which is 1 exactly where p = q (the Dice semimetric)",
    ),
    "soft_iou": (
        "soft IoU",
        "probabilities p against shares q, (sum p + sum q - sum |p - q|) / (sum p + sum q + sum |p - q|), which is 1 exactly where p = q (the Jaccard metric)",
    ),
    "qubiq_dice": (
        "QUBIQ Dice",
        "Dice of where the probability and where the share is at least t, averaged over t = 0.1, 0.2, ..., 0.9; 1 at a t that neither reaches, no value for a class that "
        "reaches none in both",
    ),
}
_WORST_PERCENT = 10
_HARD = "The prediction is the most probable class, the reference its class or, if soft, the class of largest share."
_ABSENT = "A class that a case neither has nor is predicted in has no value there and is left out of means."


def _definitions() -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, (name, formula) in _OVERLAPS.items():
        texts[key] = f"Mean {name} of {{counted}} per case, then averaged over cases: {formula}. {_HARD} {_ABSENT}"
        texts[f"{key}/<class>"] = f"{_capital(name)} of one class per case, then averaged over cases: {formula}. {_HARD} {_ABSENT}"
    for key, (name, formula) in _SOFT.items():
        texts[key] = f"Mean {name} of {{counted}} per case, then averaged over cases; only for soft references: {formula}."
        texts[f"{key}/<class>"] = f"{_capital(name)} of one class per case, then averaged over cases; only for soft references: {formula}."
    for key, text in _SURFACES.items():
        texts[key] = f"{_capital(text)}; mean of {{counted}} per case, then averaged over cases. {_HARD}"
        texts[f"{key}/<class>"] = f"{_capital(text)}; one class per case, then averaged over cases. {_HARD}"
    for region, where in _WHERE.items():
        suffix = "" if region == "all" else f"_{region}"
        for key, text in {**_MEASURES, **_DETAIL, **_ORDERED}.items():
            texts[f"{key}{suffix}"] = f"{_capital(text)}; pooled over all cases, {where}."
            texts[f"case_{key}{suffix}"] = f"{_capital(text)}; of one case, {where}; in a table of means, averaged over cases."
    return texts | {key: text.format(worst_percent=_WORST_PERCENT) for key, text in FINE_GRAINED_DEFINITIONS.items()}


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


DEFINITIONS: dict[str, str] = _definitions()
"""One sentence per number: which kind, pooled or per case, which bins, which region, background in or out. ``{num_bins}``, ``{counted}`` (the classes that means
count) and the like are to be filled in; :attr:`Evaluation.definitions` has them filled in."""

ORDERED = tuple(_ORDERED)
"""Measures that need the order of the confidences, as :func:`ordered_numbers` gives them."""

SOFT = tuple(_SOFT)
"""Overlap with a soft reference."""


@dataclass
class Settings:
    """How an evaluation was made; see :class:`densecal.metrics.SegmentationEvaluation`. ``element`` is what volumes and images are made of, ``"voxels"`` or
    ``"pixels"``."""

    element: str = "voxels"
    num_bins: int = 15
    foreground_radius: int = 3
    boundary_width: float | None = None
    boundary_unit: str = "voxels"
    surface_tolerance: float | None = None
    replicates: int = 0


class RegionSums:
    """What the pooled numbers of a region are made of, per case: they add up over cases, and a resample of cases is a weighted sum of them.

    Args:
        nll: Sum of the negative log-likelihood, ``(n,)``.
        brier: Sum of the Brier score, ``(n,)``.
        top_label: Bins ``(n, B)``.
        classwise: Bins ``(n, K, B)``.
        regions: Whether the K classes are regions that may overlap, K questions per voxel.
    """

    # No dataclass: torchmetrics looks into those that `compute` returns, and takes the only axis from a tensor of one element.

    def __init__(self, nll: Tensor, brier: Tensor, top_label: Bins, classwise: Bins, regions: bool = False) -> None:
        self.nll = nll
        self.brier = brier
        self.top_label = top_label
        self.classwise = classwise
        self.regions = regions

    def total(self) -> RegionSums:
        """All cases as one, n = 1."""
        return RegionSums.from_tensors(*(part.sum(0, keepdim=True) for part in self.tensors()), regions=self.regions)

    def numbers(self, *, detail: bool = True) -> dict[str, Tensor]:
        """Each measure per case, ``(n,)``, float64; NaN where nothing counts."""
        count = self.top_label.count.sum(-1).double()
        numbers = {
            "accuracy": self.top_label.correct.sum(-1) / count,
            "nll": self.nll / count,
            "brier": self.brier / count,
            "ece": self.top_label.calibration_error(),
            "ece_classwise": self.classwise.calibration_error().mean(-1),
        }
        if detail:
            numbers |= {key: self.top_label.calibration_error(name) for key, name in _BIN_MEASURES.items()}
            squares = self.classwise.calibration_error("root_mean_square").square()
            # Absent and present are two classes; their gaps are the same.
            calibration = 2 * squares.mean(-1) if self.regions else squares.sum(-1)
            numbers |= {"brier_calibration": calibration, "brier_refinement": numbers["brier"] - calibration}
        return numbers

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, each with cases along its first axis; the reverse of :meth:`from_tensors`."""
        return (
            self.nll,
            self.brier,
            *(getattr(bins, name) for bins in (self.top_label, self.classwise) for name in ("count", "confidence", "correct")),
        )

    @classmethod
    def from_tensors(cls, nll: Tensor, brier: Tensor, *bins: Tensor, regions: bool = False) -> RegionSums:
        return cls(nll, brier, Bins(*bins[:3]), Bins(*bins[3:]), regions)


@dataclass
class Evaluation:
    """The results, in plain Python numbers. Undefined is NaN.

    Args:
        cases: One row per case, sorted by ``case_index``: ``dice``, ``dice/<class>``, ``iou``, ``case_ece``, ``case_ece_foreground``, ...,
            ``num_voxels``, ``voxels_reference/<class>``, ``voxels_predicted/<class>``, ``voxels_correct/<class>`` (in both).
        mean: Mean over cases of every score of the rows, cases without a value left out.
        num_defined: Number of cases behind each mean.
        pooled: Per region ``"all"``, ``"foreground"`` (only where there is a background) and ``"boundary"`` (only where a width was given):
            ``ece_top_label``, ``ece_classwise``, ``nll``, ``brier``, ``accuracy``, ``num_voxels``, over the voxels of all cases together; with details those of
            ``DEFINITIONS`` that need them, too.
        bins: Per region and kind (``"top_label"``, ``"classwise"``): ``edges`` ``[B + 1]``, ``count``, ``mean_confidence`` and ``accuracy``, each ``[B]``
            (classwise ``[C][B]``); NaN in empty bins.
        definitions: Key -> one sentence.
        class_names: Class names.
        foreground: Classes that foreground means run over.
        fine_grained: Accuracy, IoU and Dice over the data set, per image and per class; of the worst images, too, with details; ``iou_dataset/<class>``.
        intervals: Lowest and highest plausible value of the numbers in :meth:`scalars` and ``mean``, by the same key: 95 % bootstrap intervals over cases.
        curves: What is drawn as a line: ``"risk_coverage"`` and ``"risk_coverage_foreground"`` (``coverage``, ``risk``, ``best_risk``: the lowest risk that an
            order of the voxels could have) and ``"boundary_distance"`` (``edges`` ``[D + 1]`` in ``unit``, ``count``, ``accuracy``, ``mean_confidence``
            ``[D]``).
        case_sums: What the pooled numbers of each region are made of, per case, in the order of ``cases``.
        settings: How the evaluation was made.
    """

    cases: list[dict[str, Any]]
    mean: dict[str, float]
    num_defined: dict[str, int]
    pooled: dict[str, dict[str, float]]
    bins: dict[str, dict[str, dict[str, list]]]
    definitions: dict[str, str]
    class_names: tuple[str, ...]
    foreground: tuple[int, ...]
    fine_grained: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    case_sums: dict[str, RegionSums] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    @property
    def leading(self) -> tuple[str, str]:
        """Key of the overlap that comes first, of all cases (in :meth:`scalars`) and of one case (in its row): Dice where there is a structure before a
        background; mean IoU, of all cases over the data set, where every class counts."""
        return ("dice", "dice") if "foreground" in self.pooled else ("iou_dataset", "iou")

    @property
    def case_bins(self) -> dict[str, Bins]:
        """Top-label bins of each case, region -> :class:`densecal.ops.binning.Bins` ``(cases, B)``, in the order of ``cases``."""
        return {region: sums.top_label for region, sums in self.case_sums.items()}

    def scalars(self) -> dict[str, float]:
        """Flat numbers for logging: overlap as the mean over cases (``dice``, ``dice/<class>``, ``iou``, ...), the rest pooled (``ece``, ``ece_foreground``,
        ``ece_classwise``, ``nll``, ``brier``, ``accuracy``, each also with ``_foreground`` and ``_boundary``)."""
        return flat_scores(self.mean, self.fine_grained, self.pooled)


def flat_scores(mean: Mapping[str, float], fine_grained: Mapping[str, float], pooled: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What :meth:`Evaluation.scalars` says, from its parts, or from those of a ``summary.json``."""
    numbers = {key: value for key, value in mean.items() if not key.startswith("case_")} | dict(fine_grained)
    for region, values in pooled.items():
        for key, value in values.items():
            if key != "num_voxels":
                numbers[("ece" if key == "ece_top_label" else key) + _suffix(region)] = value
    return numbers


def case_overlap(evaluation: Evaluation) -> Tensor:
    """Voxels in the intersection, in the prediction and in the reference, ``(n, 3, K)``, float64, in the order of ``cases``."""
    kinds = ("voxels_correct", "voxels_predicted", "voxels_reference")
    rows = [[[row[f"{kind}/{name}"] for name in evaluation.class_names] for kind in kinds] for row in evaluation.cases]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(kinds), len(evaluation.class_names))


def ordered_numbers(fine: Mapping[str, Bins], num_bins: int) -> Tensor:
    """The measures of ``ORDERED`` from fine bins of one row per score: ``"confidence"`` and, else NaN, ``"logit_norm"``; float64."""
    confidence, normalised = fine["confidence"], fine.get("logit_norm")
    return torch.stack(
        [
            adaptive_from_bins(confidence, num_bins),
            smooth_from_bins(confidence),
            aurc_from_bins(confidence),
            excess_aurc_from_bins(confidence),
            torch.full((), math.nan, dtype=torch.float64, device=confidence.count.device) if normalised is None else aurc_from_bins(normalised),
        ]
    )


def evaluation_of(
    schema: LabelSchema,
    case_index: Sequence[int],
    sums: Mapping[str, RegionSums],
    *,
    overlap: Tensor,
    soft: Tensor,
    settings: Settings,
    groups: Sequence[Hashable] | None = None,
    fine: Mapping[str, Mapping[str, Bins]] | None = None,
    ordered: Mapping[str, Tensor] | None = None,
    profile: Bins | None = None,
    surface: Tensor | None = None,
) -> Evaluation:
    """Results from what was gathered per case.

    Args:
        schema: The classes.
        case_index: Number of each of n cases.
        sums: Per region.
        overlap: Voxels in the intersection, in the prediction and in the reference, ``(n, 3, K)``.
        soft: The scores of ``SOFT``, ``(n, len(SOFT), K)``, NaN for hard references.
        settings: How it was gathered.
        groups: Which cases belong together, by ``case_index``.
        fine: Fine bins over all cases, per region and score, with details.
        ordered: The measures of ``ORDERED`` per region and case, ``(n, len(ORDERED))``, with details.
        profile: Bins by distance to the boundary, ``(D,)``, with details.
        surface: ``hd95`` and ``nsd``, ``(n, 2, K)``, where asked for.

    Returns:
        The evaluation.
    """
    detail = fine is not None
    names, foreground = schema.names, list(schema.foreground)
    intersection, predicted, reference = overlap.unbind(1)
    columns: dict[str, Tensor] = {}
    per_class = {"dice": dice_from_counts(*overlap.unbind(1)), "iou": jaccard_from_counts(*overlap.unbind(1))}
    if not bool(soft.isnan().all()):
        per_class |= dict(zip(SOFT, soft.unbind(1), strict=True))
    if surface is not None:
        per_class |= {"hd95": surface[:, 0], "nsd": surface[:, 1]}
    for key, scores in per_class.items():
        columns[key] = scores[:, foreground].nanmean(1)
        columns |= {f"{key}/{name}": scores[:, i] for i, name in enumerate(names)}
    counts: dict[str, Tensor] = {}
    pooled: dict[str, dict[str, float]] = {}
    for region, part in sums.items():
        counts[f"num_voxels{_suffix(region)}"] = part.top_label.count.sum(-1)
        columns |= {f"case_{key}{_suffix(region)}": value for key, value in part.numbers(detail=detail).items()}
        total = part.total()
        pooled[region] = {key: float(value) for key, value in total.numbers(detail=detail).items()}
        pooled[region] = {"ece_top_label": pooled[region].pop("ece"), **pooled[region], "num_voxels": int(total.top_label.count.sum())}
        if fine is not None and ordered is not None:
            columns |= {f"case_{key}{_suffix(region)}": ordered[region][:, i] for i, key in enumerate(ORDERED)}
            pooled[region] |= dict(zip(ORDERED, ordered_numbers(fine[region], settings.num_bins).tolist(), strict=True))
    for i, name in enumerate(names):
        counts[f"voxels_reference/{name}"] = reference[:, i]
        counts[f"voxels_predicted/{name}"] = predicted[:, i]
        counts[f"voxels_correct/{name}"] = intersection[:, i]

    cases: list[dict[str, Any]] = [{"case_index": i} for i in case_index]
    for table, kind in ((columns, float), (counts, int)):
        for key, column in table.items():
            for case, value in zip(cases, column.tolist(), strict=True):
                case[key] = kind(value)
    mean = {key: column.nanmean().item() for key, column in columns.items()}
    fine_grained = fine_grained_overlap(intersection, predicted, reference, background=schema.background, worst_percent=_WORST_PERCENT)
    return Evaluation(
        cases=cases,
        mean=mean,
        num_defined={key: int((~column.isnan()).sum()) for key, column in columns.items()},
        pooled=pooled,
        bins={region: _diagrams(part.total(), settings.num_bins) for region, part in sums.items()},
        definitions=filled_definitions(settings, schema.background is not None),
        class_names=names,
        foreground=schema.foreground,
        fine_grained={key: value.item() for key, value in fine_grained.items() if detail or "worst" not in key}
        | dict(zip((f"iou_dataset/{name}" for name in names), jaccard_from_counts(*overlap.sum(0)).tolist(), strict=True)),
        intervals=_intervals(columns, sums, overlap[..., foreground], case_index, settings.replicates, groups, detail=detail)
        if settings.replicates
        else {},
        curves=_curves(fine, profile, settings) if fine is not None and profile is not None else {},
        case_sums=dict(sums),
        settings=settings,
    )


def _suffix(region: str) -> str:
    return "" if region == "all" else f"_{region}"


def _diagrams(total: RegionSums, num_bins: int) -> dict[str, dict[str, list]]:
    edges = bin_edges(num_bins).tolist()
    return {
        kind: {"edges": edges, "count": b.count.long().tolist(), "mean_confidence": b.mean_confidence.tolist(), "accuracy": b.accuracy.tolist()}
        for kind, b in (("top_label", total.top_label[0]), ("classwise", total.classwise[0]))
    }


def filled_definitions(settings: Settings, background: bool) -> dict[str, str]:
    """:data:`DEFINITIONS` for an evaluation; ``background`` tells whether a class is left out of foreground means."""
    filled = asdict(settings) | {
        "counted": "the foreground classes (background left out)" if background else "all classes",
        "background_too": ", background included" if background else "",
    }
    one = settings.element.removesuffix("s")
    return {key: text.format(**filled).replace("voxel", one) for key, text in DEFINITIONS.items()}


def _curves(fine: Mapping[str, Mapping[str, Bins]], profile: Bins, settings: Settings) -> dict[str, dict[str, Any]]:
    curves: dict[str, dict[str, Any]] = {}
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)[1:]
    for region in fine:
        curve = risk_coverage_from_bins(fine[region]["confidence"], grid)
        curves[f"risk_coverage{_suffix(region)}"] = {name: values.tolist() for name, values in curve._asdict().items()}
    curves["boundary_distance"] = {
        "edges": list(range(profile.num_bins + 1)),
        "unit": settings.element if settings.boundary_unit == "voxels" else settings.boundary_unit,
        "count": profile.count.long().tolist(),
        "accuracy": profile.accuracy.tolist(),
        "mean_confidence": profile.mean_confidence.tolist(),
    }
    return curves


def _bootstrap(case_index: Sequence[int], replicates: int, groups: Sequence[Hashable] | None) -> CaseBootstrap:
    numbers: dict[Hashable, int] = {}
    members = None if groups is None else [numbers.setdefault(groups[i], len(numbers)) for i in case_index]
    return CaseBootstrap(len(case_index), replicates=replicates, groups=members)


def _pooled_numbers(sums: RegionSums, detail: bool, order: list[str]) -> Callable[..., Tensor]:
    """The statistic that a bootstrap of :class:`RegionSums` takes: all pooled numbers side by side, their names in ``order``."""

    def statistic(*tensors: Tensor) -> Tensor:
        numbers = RegionSums.from_tensors(*tensors, regions=sums.regions).numbers(detail=detail)
        order[:] = list(numbers)
        return torch.stack(list(numbers.values()), dim=-1)

    return statistic


def _sense_numbers(order: list[str]) -> Callable[..., Tensor]:
    """The same of overlap over the data set, per image and per class."""

    def statistic(*sums: Tensor) -> Tensor:
        numbers = senses_from_sums(*sums)
        order[:] = list(numbers)
        return torch.stack(list(numbers.values()), dim=-1)

    return statistic


def _intervals(
    columns: Mapping[str, Tensor],
    sums: Mapping[str, RegionSums],
    overlap: Tensor,
    case_index: Sequence[int],
    replicates: int,
    groups: Sequence[Hashable] | None,
    *,
    detail: bool,
) -> dict[str, tuple[float, float]]:
    bootstrap = _bootstrap(case_index, replicates, groups)
    low, high = bootstrap.mean_interval(torch.stack(list(columns.values()), dim=1))
    intervals = dict(zip(columns, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    order: list[str] = []
    low, high = bootstrap.interval(_sense_numbers(order), *sense_sums(*overlap.unbind(1)))
    intervals |= dict(zip(order, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    for region, part in sums.items():
        order = []
        low, high = bootstrap.interval(_pooled_numbers(part, detail, order), *part.tensors())
        intervals |= {f"{key}{_suffix(region)}": ends for key, ends in zip(order, zip(low.tolist(), high.tolist(), strict=True), strict=True)}
    return intervals


def paired_differences(
    evaluation: Evaluation, reference: Evaluation, *, replicates: int = 1000, groups: Sequence[Hashable] | None = None
) -> dict[str, tuple[float, float, float]]:
    """How one model differs from another on the same cases, with 95 % intervals from resamples of pairs.

    Args:
        evaluation: The model in question.
        reference: The model that it is held against, evaluated with the same classes and settings.
        replicates: Number of resamples.
        groups: Which cases belong together, by ``case_index``.

    Returns:
        For each key of :meth:`Evaluation.scalars` that both have per case or as sums over cases: difference (evaluation minus reference), lowest and highest
        plausible value, over the cases that both have. An interval that leaves out 0 is a difference that the choice of cases does not explain.

    Raises:
        ValueError: If the models share no case, or their classes or bins differ.
    """
    for name in ("class_names", "settings"):
        if getattr(evaluation, name) != getattr(reference, name):
            raise ValueError(f"Expected evaluations with the same {name}, but got {getattr(evaluation, name)} and {getattr(reference, name)}.")
    places = [{row["case_index"]: place for place, row in enumerate(one.cases)} for one in (evaluation, reference)]
    common = sorted(places[0].keys() & places[1].keys())
    if not common:
        raise ValueError("Expected evaluations of the same cases, but they share none.")
    rows = [[place[index] for index in common] for place in places]
    bootstrap = _bootstrap(common, replicates, groups)
    differences: dict[str, tuple[float, float, float]] = {}
    keys = [key for key in evaluation.mean if key in reference.mean and not key.startswith("case_")]
    values = [
        torch.tensor([[one.cases[i][key] for key in keys] for i in row], dtype=torch.float64)
        for one, row in zip((evaluation, reference), rows, strict=True)
    ]
    gaps = values[0] - values[1]
    low, high = bootstrap.mean_interval(gaps)
    differences |= dict(zip(keys, zip(gaps.nanmean(0).tolist(), low.tolist(), high.tolist(), strict=True), strict=True))

    def differ(statistic: Callable[..., Tensor], *sums: Sequence[Tensor]) -> list[tuple[float, float, float]]:
        low, high = bootstrap.difference_interval(statistic, *sums)
        gap = [statistic(*(part.sum(0, keepdim=True) for part in some))[0] for some in sums]
        return list(zip((gap[0] - gap[1]).tolist(), low.tolist(), high.tolist(), strict=True))

    order: list[str] = []
    counts = [case_overlap(one)[row][..., list(one.foreground)] for one, row in zip((evaluation, reference), rows, strict=True)]
    triples = differ(_sense_numbers(order), *(sense_sums(*overlap.unbind(1)) for overlap in counts))
    differences |= dict(zip(order, triples, strict=True))
    detail = bool(evaluation.curves) and bool(reference.curves)
    for region in evaluation.case_sums.keys() & reference.case_sums.keys():
        statistic = _pooled_numbers(reference.case_sums[region], detail, order)
        parts = [tuple(part[row] for part in one.case_sums[region].tensors()) for one, row in zip((evaluation, reference), rows, strict=True)]
        triples = differ(statistic, *parts)
        differences |= {f"{key}{_suffix(region)}": triple for key, triple in zip(order, triples, strict=True)}
    return differences
