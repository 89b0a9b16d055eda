"""Everything a validation or test run reports about a segmentation, from one pass over its cases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from densecal.checks import check_non_negative, check_positive, plain
from densecal.labels import LabelSchema
from densecal.metrics.inputs import read_pixels
from densecal.metrics.overlap import dice_from_counts, jaccard_from_counts, overlap_counts
from densecal.metrics.regions import dilate
from densecal.ops.binning import Bins, accumulate_bins, bin_edges
from densecal.ops.overlap import overlap_sums
from densecal.registry import METRICS

__all__ = ["DEFINITIONS", "Evaluation", "SegmentationEvaluation"]

_ALL = "over all voxels that are not ignored"
_NEAR = "over the voxels of the reference structure and those within {foreground_radius} voxels of it (6-connected dilation in 3D, 4-connected in 2D)"

_MEASURES = {
    "accuracy": "share of voxels whose most probable class is the reference class (for a soft reference, the mean share that it gives to that class)",
    "ece": "top-label expected calibration error: confidence of the predicted class against accuracy in {num_bins} equal bins (lower, upper], the absolute gaps "
    "weighted by the number of voxels",
    "ece_classwise": "classwise (static) expected calibration error: probability of each class against its frequency in {num_bins} equal bins (lower, upper], "
    "the absolute gaps weighted by the number of voxels, then the mean over all classes, background included",
    "nll": "mean negative log-likelihood in nats (cross-entropy for a soft reference), probabilities below 1e-12 counted as 1e-12",
    "brier": "mean Brier score: squared difference of probabilities and reference, summed over classes, between 0 and 2",
}
_OVERLAPS = {
    "dice": ("Dice", "2 |A and B| / (|A| + |B|) of predicted and reference voxels"),
    "iou": ("intersection over union (Jaccard index)", "|A and B| / |A or B| of predicted and reference voxels"),
}
_HARD = "The prediction is the most probable class, the reference its class or, if soft, the class of largest share."
_ABSENT = "A class that a case neither has nor is predicted in has no value there and is left out of means."


def _definitions() -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, (name, formula) in _OVERLAPS.items():
        texts[key] = f"Mean {name} of the foreground classes per case, background left out, then averaged over cases: {formula}. {_HARD} {_ABSENT}"
        texts[f"{key}/<class>"] = f"{name[0].upper()}{name[1:]} of one class per case, then averaged over cases: {formula}. {_HARD} {_ABSENT}"
    texts["soft_dice"] = (
        "Mean soft Dice of the foreground classes per case, then averaged over cases; only for soft references: probabilities p against shares q, "
        "(sum p + sum q - sum |p - q|) / (sum p + sum q), which is 1 exactly where p = q (the Dice semimetric)."
    )
    texts["soft_dice/<class>"] = "Soft Dice (Dice semimetric) of one class per case, then averaged over cases; only for soft references."
    for suffix, where in (("", _ALL), ("_foreground", _NEAR)):
        for key, text in _MEASURES.items():
            texts[f"{key}{suffix}"] = f"{text[0].upper()}{text[1:]}; pooled over all cases, {where}."
            texts[f"case_{key}{suffix}"] = f"{text[0].upper()}{text[1:]}; of one case, {where}; in a table of means, averaged over cases."
    return texts


DEFINITIONS: dict[str, str] = _definitions()
"""One sentence per number: which kind, pooled or per case, which bins, which region, background in or out. ``{num_bins}`` and ``{foreground_radius}`` are to
be filled in; :attr:`Evaluation.definitions` has them filled in."""

# Per region, the columns of a case's row; then per class.
_REGION_COLUMNS = ("num_voxels", "accuracy", "nll", "brier", "ece", "ece_classwise")
_CLASS_COLUMNS = ("intersection", "predicted", "reference", "soft_dice")


@dataclass
class Evaluation:
    """The results, in plain Python numbers. Undefined is NaN.

    Args:
        cases: One row per case, sorted by ``case_index``: ``dice``, ``dice/<class>``, ``iou``, ``case_ece``, ``case_ece_foreground``, ...,
            ``num_voxels``, ``voxels_reference/<class>``, ``voxels_predicted/<class>``.
        mean: Mean over cases of every score of the rows, cases without a value left out.
        num_defined: Number of cases behind each mean.
        pooled: Per region ``"all"`` and ``"foreground"`` (the latter only where there is a background): ``ece_top_label``, ``ece_classwise``, ``nll``,
            ``brier``, ``accuracy``, ``num_voxels``, over the voxels of all cases together.
        bins: Per region and kind (``"top_label"``, ``"classwise"``): ``edges`` ``[B + 1]``, ``count``, ``mean_confidence`` and ``accuracy``, each ``[B]``
            (classwise ``[C][B]``); NaN in empty bins.
        definitions: Key -> one sentence.
        class_names: Class names.
        foreground: Classes that foreground means run over.
        num_bins: Number of bins B.
        foreground_radius: Radius of the region ``"foreground"``, in voxels.
        intervals: Lowest and highest plausible value of the numbers in :meth:`scalars` and ``mean``, by the same key: 95 % bootstrap intervals over cases.
        case_bins: Top-label bins of each case, region -> :class:`densecal.ops.binning.Bins` ``(cases, B)``, in the order of ``cases``.
        curves: What is drawn as a line: ``"risk_coverage"`` and ``"risk_coverage_foreground"`` (``coverage``, ``risk``, ``best_risk``: the lowest risk that an
            order of the voxels could have) and ``"boundary_distance"`` (``edges`` ``[D + 1]`` in ``unit``, ``count``, ``accuracy``, ``mean_confidence``
            ``[D]``).
    """

    cases: list[dict[str, Any]]
    mean: dict[str, float]
    num_defined: dict[str, int]
    pooled: dict[str, dict[str, float]]
    bins: dict[str, dict[str, dict[str, list]]]
    definitions: dict[str, str]
    class_names: tuple[str, ...]
    foreground: tuple[int, ...]
    num_bins: int
    foreground_radius: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    case_bins: dict[str, Bins] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """Flat numbers for logging: overlap as the mean over cases (``dice``, ``dice/<class>``, ``iou``, ...), the rest pooled (``ece``, ``ece_foreground``,
        ``ece_classwise``, ``nll``, ``brier``, ``accuracy``, each also with ``_foreground``)."""
        numbers = {key: value for key, value in self.mean.items() if not key.startswith("case_")}
        for region, values in self.pooled.items():
            suffix = "" if region == "all" else f"_{region}"
            for key, value in values.items():
                if key != "num_voxels":
                    numbers[("ece" if key == "ece_top_label" else key) + suffix] = value
        return numbers


@METRICS.register("evaluation")
class SegmentationEvaluation(Metric):
    """Overlap, calibration and scoring rules of whole cases, over all voxels and near the structure, per case and pooled.

    The state is a few bins and one row of numbers per case, whatever the size of the cases. Cases may be spread over ranks in any way, a rank without
    any included, as long as each is seen once.

    Args:
        schema: Classes, background and ``ignore_index``.
        num_bins: Number of equal confidence bins (lower, upper].
        foreground_radius: The region ``"foreground"`` is the reference structure and what lies within so many steps along the axes, in voxels.
        validate_args: Look at the values too (probabilities in [0, 1] that sum to 1); that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``num_bins`` is not positive or ``foreground_radius`` negative.

    Example:
        >>> evaluation = SegmentationEvaluation(LabelSchema(("background", "lesion")))
        >>> probs = torch.tensor([[[0.9, 0.8, 0.3], [0.1, 0.2, 0.7]]])
        >>> evaluation.update(probs, torch.tensor([[0, 1, 1]]), torch.tensor([0]))
        >>> result = evaluation.compute()
        >>> round(result.scalars()["dice"], 4), round(result.pooled["all"]["ece_top_label"], 4)
        (0.6667, 0.4)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    case_rows: list[Tensor]

    def __init__(self, schema: LabelSchema, *, num_bins: int = 15, foreground_radius: int = 3, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("num_bins", num_bins)
        check_non_negative("foreground_radius", foreground_radius)
        self.schema = schema
        self.num_bins = num_bins
        self.foreground_radius = foreground_radius
        self.validate_args = validate_args
        self.regions = ("all",) if schema.background is None else ("all", "foreground")
        for kind, rows in (("top_label", 1), ("classwise", schema.num_classes)):
            empty = Bins.empty(len(self.regions), rows, num_bins)
            self.add_state(f"{kind}_count", empty.count, dist_reduce_fx="sum")
            self.add_state(f"{kind}_confidence", empty.confidence, dist_reduce_fx="sum")
            self.add_state(f"{kind}_correct", empty.correct, dist_reduce_fx="sum")
        self.add_state("case_rows", [], dist_reduce_fx="cat")

    def update(self, probs: Tensor, label: Tensor, case_index: Tensor, mask: Tensor | None = None) -> None:
        """Add whole cases.

        Args:
            probs: Probabilities ``(N, C, *spatial)``, floating.
            label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating.
            case_index: Number of each case in its split, ``(N,)``, integer.
            mask: True where a voxel counts, ``(N, *spatial)``, bool.

        Raises:
            TypeError: If a dtype does not fit.
            ValueError: If shapes do not fit or, with ``validate_args``, values are out of range.
        """
        pixels = read_pixels(probs, label, mask, ignore_index=self.schema.ignore_index, validate_args=self.validate_args)
        n, c = pixels.probs.shape[:2]
        if c != self.schema.num_classes:
            raise ValueError(f"Expected `probs` with {self.schema.num_classes} classes, {self.schema.names}, but got {c}.")
        case_index = plain(case_index)
        if case_index.shape != (n,):
            raise ValueError(f"Expected `case_index` of shape (N,) = {(n,)}, but got {tuple(case_index.shape)}.")
        device = pixels.probs.device
        strata = len(self.regions)

        # Every voxel belongs to one stratum of its case: away from the structure (0) or near it (1). All voxels are both together.
        stratum = torch.zeros_like(pixels.label_map)
        if self.schema.background is not None:
            structure = pixels.valid & (pixels.label_map != self.schema.background)
            stratum = dilate(structure.view(n, *probs.shape[2:]), self.foreground_radius).flatten(1).long()
        row = torch.arange(n, device=device).view(n, 1) * strata + stratum  # (N, P)

        confidence, _, correct = pixels.top_label()
        top_label = self._regions(
            accumulate_bins(confidence, correct, num_bins=self.num_bins, row=row, num_rows=n * strata, valid=pixels.valid).view(n, strata, 1, -1)
        )
        class_row = row.unsqueeze(1) * c + torch.arange(c, device=device).view(1, c, 1)
        classwise = self._regions(
            accumulate_bins(
                pixels.probs,
                pixels.shares(),
                num_bins=self.num_bins,
                row=class_row,
                num_rows=n * strata * c,
                valid=pixels.valid.unsqueeze(1),
            ).view(n, strata, c, -1)
        )
        self._add("top_label", top_label.sum(0))
        self._add("classwise", classwise.sum(0))

        count = top_label.count.sum((-2, -1))  # (N, regions)
        accuracy = top_label.correct.sum((-2, -1)) / count
        scores = [
            self._regions_of_sums(torch.zeros(n, strata, dtype=torch.float64, device=device).scatter_add_(1, stratum, values.double())) / count
            for values in (pixels.negative_log_likelihood(), pixels.brier())
        ]
        ece = top_label.calibration_error().mean(-1)
        ece_classwise = classwise.calibration_error().mean(-1)
        per_region = torch.stack([count.double(), accuracy, *scores, ece, ece_classwise], dim=2)  # (N, regions, columns)

        if pixels.soft_labels is None:
            soft_dice = torch.full((n, c), math.nan, dtype=torch.float64, device=device)
        else:
            tp, fp, fn = overlap_sums(pixels.probs.double(), pixels.soft_labels.double(), pixels.valid)
            soft_dice = 2 * tp / (2 * tp + fp + fn)
        per_class = torch.stack([*(counts.double() for counts in overlap_counts(pixels)), soft_dice], dim=1)  # (N, columns, C)
        index = case_index.to(device=device, dtype=torch.float64).view(n, 1)
        self.case_rows.append(torch.cat([index, per_region.flatten(1), per_class.flatten(1)], dim=1))

    def compute(self) -> Evaluation:
        """The results over all cases seen so far.

        Raises:
            ValueError: If a case was seen twice.
        """
        rows = dim_zero_cat(self.case_rows) if len(self.case_rows) else self._no_rows()
        rows = rows[rows[:, 0].argsort()].cpu()
        case_index = rows[:, 0].long().tolist()
        if len(set(case_index)) < len(case_index):
            seen_twice = sorted({i for i in case_index if case_index.count(i) > 1})
            raise ValueError(
                f"Expected every case once, but got case_index {seen_twice[:8]} more than once. Give each rank its own cases, without padding by repeats."
            )
        names, regions, c = self.schema.names, self.regions, self.schema.num_classes
        split = 1 + len(regions) * len(_REGION_COLUMNS)
        per_region = rows[:, 1:split].reshape(-1, len(regions), len(_REGION_COLUMNS))
        per_class = rows[:, split:].reshape(-1, len(_CLASS_COLUMNS), c)
        intersection, predicted, reference, soft_dice = per_class.unbind(1)
        foreground = list(self.schema.foreground)

        columns: dict[str, Tensor] = {}
        for key, scores in (
            ("dice", dice_from_counts(intersection, predicted, reference)),
            ("iou", jaccard_from_counts(intersection, predicted, reference)),
            ("soft_dice", soft_dice),
        ):
            if key == "soft_dice" and bool(soft_dice.isnan().all()):
                continue
            columns[key] = scores[:, foreground].nanmean(1)
            columns |= {f"{key}/{name}": scores[:, i] for i, name in enumerate(names)}
        counts: dict[str, Tensor] = {}
        for r, region in enumerate(regions):
            suffix = "" if region == "all" else f"_{region}"
            counts[f"num_voxels{suffix}"] = per_region[:, r, 0]
            columns |= {f"case_{key}{suffix}": per_region[:, r, i] for i, key in enumerate(_REGION_COLUMNS) if i > 0}
        for i, name in enumerate(names):
            counts[f"voxels_reference/{name}"] = reference[:, i]
            counts[f"voxels_predicted/{name}"] = predicted[:, i]

        cases: list[dict[str, Any]] = [{"case_index": i} for i in case_index]
        for key, column in columns.items():
            for case, value in zip(cases, column.tolist(), strict=True):
                case[key] = value
        for key, column in counts.items():
            for case, value in zip(cases, column.tolist(), strict=True):
                case[key] = int(value)

        top_label = {region: self._bins("top_label")[r] for r, region in enumerate(regions)}
        classwise = {region: self._bins("classwise")[r] for r, region in enumerate(regions)}
        pooled = {}
        for r, region in enumerate(regions):
            count = top_label[region].count.sum()
            weight = per_region[:, r, 0]
            nll, brier = ((weight * per_region[:, r, _REGION_COLUMNS.index(key)]).nansum() / count for key in ("nll", "brier"))
            pooled[region] = {
                "ece_top_label": top_label[region].calibration_error().mean().item(),
                "ece_classwise": classwise[region].calibration_error().mean().item(),
                "nll": nll.item(),
                "brier": brier.item(),
                "accuracy": (top_label[region].correct.sum() / count).item(),
                "num_voxels": int(count),
            }
        edges = bin_edges(self.num_bins).tolist()
        bins = {
            region: {
                kind: {"edges": edges, "count": b.count.tolist(), "mean_confidence": b.mean_confidence.tolist(), "accuracy": b.accuracy.tolist()}
                for kind, b in (("top_label", top_label[region][0]), ("classwise", classwise[region]))
            }
            for region in regions
        }
        filled = {"num_bins": self.num_bins, "foreground_radius": self.foreground_radius}
        return Evaluation(
            cases=cases,
            mean={key: column.nanmean().item() for key, column in columns.items()},
            num_defined={key: int((~column.isnan()).sum()) for key, column in columns.items()},
            pooled=pooled,
            bins=bins,
            definitions={key: text.format(**filled) for key, text in DEFINITIONS.items()},
            class_names=names,
            foreground=self.schema.foreground,
            num_bins=self.num_bins,
            foreground_radius=self.foreground_radius,
        )

    def _regions(self, bins: Bins) -> Bins:
        """From strata to regions along axis 1: the whole, and the near part."""
        return Bins(*(self._regions_of_sums(sums) for sums in (bins.count, bins.confidence, bins.correct)))

    def _regions_of_sums(self, strata: Tensor) -> Tensor:
        whole = strata.sum(1, keepdim=True)
        return whole if strata.shape[1] == 1 else torch.cat([whole, strata[:, 1:]], dim=1)

    def _add(self, kind: str, bins: Bins) -> None:
        for name in ("count", "confidence", "correct"):
            setattr(self, f"{kind}_{name}", getattr(self, f"{kind}_{name}") + getattr(bins, name))

    def _bins(self, kind: str) -> Bins:
        return Bins(*(getattr(self, f"{kind}_{name}").cpu() for name in ("count", "confidence", "correct")))

    def _no_rows(self) -> Tensor:
        columns = 1 + len(self.regions) * len(_REGION_COLUMNS) + len(_CLASS_COLUMNS) * self.schema.num_classes
        return torch.zeros(0, columns, dtype=torch.float64, device=self.device)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without a case takes part in the gathering with no rows of the right width; torchmetrics would send a single-precision vector.
        if not len(self.case_rows):
            self.case_rows = [self._no_rows()]
        super()._sync_dist(*args, **kwargs)
