"""Everything a validation or test run reports about a segmentation, from one pass over its cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from densecal.checks import check_choice, check_non_negative, check_positive, plain
from densecal.labels import LabelSchema
from densecal.metrics.inputs import Pixels, read_pixels
from densecal.metrics.overlap import overlap_counts
from densecal.metrics.qubiq_dice import dice_at_thresholds
from densecal.metrics.regions import boundary_distance, dilate
from densecal.metrics.results import ORDERED, SOFT, Evaluation, RegionSums, Settings, evaluation_of, ordered_numbers
from densecal.metrics.selective_risk import logit_norm_score
from densecal.metrics.surface import hausdorff_distance_95, normalized_surface_distance
from densecal.ops.activation import Activation
from densecal.ops.binning import Bins, accumulate_bins
from densecal.ops.fine_bins import NUM_FINE_BINS, accumulate_fine_bins
from densecal.ops.overlap import overlap_sums
from densecal.registry import METRICS
from densecal.targets.one_hot import align_label

__all__ = ["LengthUnit", "SegmentationEvaluation"]

LengthUnit: TypeAlias = Literal["voxels", "mm"]

_REACH = 10
"""How far from a boundary errors are followed, in steps of one ``boundary_unit``."""


@METRICS.register("evaluation")
class SegmentationEvaluation(Metric):
    """Overlap, calibration and scoring rules of whole cases, over all voxels, near the structure and along boundaries, per case and pooled.

    The state is one row of numbers per case, its bins among them, whatever the size of the cases. Cases may be spread over ranks in any way, a rank without
    any included, as long as each is seen once.

    Args:
        schema: Classes, background and ``ignore_index``, or regions; its activation says which.
        num_bins: Number of equal confidence bins (lower, upper].
        foreground_radius: The region ``"foreground"`` is the reference structure and what lies within so many steps along the axes, in voxels.
        boundary_width: The region ``"boundary"`` holds what lies closer than this to a voxel that touches another class, in ``boundary_unit``; None leaves it out.
        boundary_unit: ``"voxels"``, or ``"mm"``, for which ``update`` needs ``spacing``.
        detail: Measures that take longer as well, for a test and not for every validation: those that need the order of the confidences (risk-coverage, smooth
            and equal-mass calibration error), further binned ones, errors by distance to the boundary, overlap per image, per class and of the worst. Waits for
            a GPU once per case.
        surface_tolerance: With a number, surface distances too (MONAI computes them): the distance up to which a surface counts as found, in mm where
            ``update`` gets ``spacing``, else in voxels.
        replicates: Bootstrap resamples of the cases behind each interval; 0 leaves intervals out.
        groups: Which cases belong together, such as the person of each, by ``case_index``; they are resampled whole. By default each case on its own.
        validate_args: Look at the values too (probabilities in [0, 1] that sum to 1); that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an option is out of range or unknown.

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

    def __init__(
        self,
        schema: LabelSchema,
        *,
        num_bins: int = 15,
        foreground_radius: int = 3,
        boundary_width: float | None = None,
        boundary_unit: LengthUnit = "voxels",
        detail: bool = False,
        surface_tolerance: float | None = None,
        replicates: int = 0,
        groups: Sequence[Hashable] | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive("num_bins", num_bins)
        check_non_negative("foreground_radius", foreground_radius)
        check_non_negative("replicates", replicates)
        check_choice("boundary_unit", boundary_unit, ("voxels", "mm"))
        for name, value in (("boundary_width", boundary_width), ("surface_tolerance", surface_tolerance)):
            if value is not None:
                check_positive(name, value)
        self.schema = schema
        self.num_bins = num_bins
        self.foreground_radius = foreground_radius
        self.boundary_width = boundary_width
        self.boundary_unit: LengthUnit = boundary_unit
        self.detail = detail
        self.surface_tolerance = surface_tolerance
        self.replicates = replicates
        self.groups = groups
        self.activation: Activation = schema.activation
        self.validate_args = validate_args
        self.regions = ("all", *(["foreground"] if schema.has_structure else []), *(["boundary"] if boundary_width is not None else []))
        self.layout = _RowLayout(self._blocks())
        self.add_state("case_rows", [], dist_reduce_fx="cat")
        if detail:
            empty = Bins.empty(len(self.scores), len(self.regions), NUM_FINE_BINS)
            for name in _SUMS:
                self.add_state(f"fine_{name}", getattr(empty, name), dist_reduce_fx="sum")

    @property
    def scores(self) -> tuple[str, ...]:
        """What voxels are ordered by for the measures that need an order."""
        # Two centred logits are opposite, and every voxel would have the same normalised score.
        return ("confidence", "logit_norm") if self.activation == "softmax" and self.schema.num_classes > 2 else ("confidence",)

    def update(self, probs: Tensor, label: Tensor, case_index: Tensor, mask: Tensor | None = None, spacing: Tensor | None = None) -> None:
        """Add whole cases.

        Args:
            probs: Probabilities ``(N, C, *spatial)``, floating.
            label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating; regions ``(N, C, *spatial)`` under
                sigmoid.
            case_index: Number of each case in its split, ``(N,)``, integer.
            mask: True where a voxel counts, ``(N, *spatial)``, bool.
            spacing: Distance between voxels per axis in mm, ``(spatial_dims,)`` or per case ``(N, spatial_dims)``.

        Raises:
            TypeError: If a dtype does not fit.
            ValueError: If shapes do not fit, millimetres are asked for without ``spacing`` or, with ``validate_args``, values are out of range.
        """
        pixels = read_pixels(probs, label, mask, ignore_index=self.schema.ignore_index, activation=self.activation, validate_args=self.validate_args)
        n, k = len(pixels.probs), pixels.num_classes
        if k != self.schema.num_classes:
            raise ValueError(f"Expected `probs` with {self.schema.num_classes} classes, {self.schema.names}, but got {k}.")
        case_index = plain(case_index)
        if case_index.shape != (n,):
            raise ValueError(f"Expected `case_index` of shape (N,) = {(n,)}, but got {tuple(case_index.shape)}.")
        if self.boundary_unit == "mm" and spacing is None:
            raise ValueError(
                "Expected `spacing`, the distance between voxels, for boundary_unit='mm'. Give it to `update`, or use boundary_unit='voxels'."
            )

        distance = self._distance(probs, label, spacing)
        strata = _Strata(self._memberships(pixels, probs.shape[2:], distance), pixels.valid[:, : probs[0, 0].numel()])
        confidence, correct = pixels.confidence()
        parts: dict[str, Tensor] = {
            "case": case_index.to(pixels.probs.device),
            "spatial_dims": torch.full_like(case_index, probs.ndim - 2, device=pixels.probs.device),
            "nll": strata.sums(pixels.negative_log_likelihood()),
            "brier": strata.sums(pixels.brier()),
            "top_label": strata.bins(accumulate_bins, confidence, correct, pixels.valid, num_bins=self.num_bins),
            "classwise": torch.stack(
                [strata.bins(accumulate_bins, *entries, num_bins=self.num_bins) for entries in _class_by_class(pixels)], dim=3
            ),  # (N, 3, regions, K, B)
            "overlap": torch.stack(overlap_counts(pixels), dim=1),
        }
        if pixels.soft_labels is None:
            parts["soft"] = torch.full((n, len(SOFT), k), math.nan, dtype=torch.float64, device=pixels.probs.device)
        else:
            p, q, _ = pixels.per_class()
            tp, fp, fn = overlap_sums(p.double(), q.double(), pixels.valid[:, : p.shape[-1]])
            parts["soft"] = torch.stack([2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn), dice_at_thresholds(pixels)], dim=1)
        if self.detail:
            assert distance is not None
            parts |= self._details(pixels, strata, distance, confidence, correct)
        if self.surface_tolerance is not None:
            parts["surface"] = self._surface(probs, label, mask, spacing)
        self.case_rows.append(self.layout.join(parts))

    def compute(self) -> Evaluation:
        """The results over all cases seen so far.

        Raises:
            ValueError: If a case was seen twice.
        """
        rows = dim_zero_cat(self.case_rows) if len(self.case_rows) else self._no_rows()
        rows = rows[rows[:, 0].argsort()].cpu()
        parts = self.layout.split(rows)
        case_index = parts["case"].long().tolist()
        if len(set(case_index)) < len(case_index):
            seen_twice = sorted({i for i in case_index if case_index.count(i) > 1})
            raise ValueError(
                f"Expected every case once, but got case_index {seen_twice[:8]} more than once. Give each rank its own cases, without padding by repeats."
            )
        sums = {
            region: RegionSums(
                parts["nll"][:, g],
                parts["brier"][:, g],
                Bins(*parts["top_label"][:, :, g].unbind(1)),
                Bins(*parts["classwise"][:, :, g].unbind(1)),
                regions=self.activation == "sigmoid",
            )
            for g, region in enumerate(self.regions)
        }
        ordered = None
        if self.detail:
            fine = Bins(*(getattr(self, f"fine_{name}").cpu() for name in _SUMS))
            ordered = {region: {score: fine[o, g] for o, score in enumerate(self.scores)} for g, region in enumerate(self.regions)}
        return evaluation_of(
            self.schema,
            case_index,
            sums,
            overlap=parts["overlap"],
            soft=parts["soft"],
            settings=Settings(
                element="pixels" if len(rows) and bool((parts["spatial_dims"] < 3).all()) else "voxels",
                num_bins=self.num_bins,
                foreground_radius=self.foreground_radius,
                boundary_width=self.boundary_width,
                boundary_unit=self.boundary_unit,
                surface_tolerance=self.surface_tolerance,
                replicates=self.replicates,
            ),
            groups=self.groups,
            fine=ordered,
            ordered={region: parts["ordered"][:, g] for g, region in enumerate(self.regions)} if self.detail else {},
            profile=Bins(*parts["profile"].sum(0)) if self.detail else None,
            surface=parts.get("surface"),
        )

    def _blocks(self) -> dict[str, tuple[int, ...]]:
        """What a case's row holds, and its shape."""
        g, k, b = len(self.regions), self.schema.num_classes, self.num_bins
        blocks: dict[str, tuple[int, ...]] = {
            "case": (),
            "spatial_dims": (),
            "nll": (g,),
            "brier": (g,),
            "top_label": (3, g, b),
            "classwise": (3, g, k, b),
        }
        blocks |= {"overlap": (3, k), "soft": (len(SOFT), k)}
        if self.detail:
            blocks |= {"ordered": (g, len(ORDERED)), "profile": (3, _REACH)}
        if self.surface_tolerance is not None:
            blocks["surface"] = (2, k)
        return blocks

    def _distance(self, probs: Tensor, label: Tensor, spacing: Tensor | None) -> Tensor | None:
        """Distance to the boundary ``(N, P)`` where something needs it."""
        reach = max(self.boundary_width or 0, _REACH if self.detail else 0)
        if not reach:
            return None
        distance = boundary_distance(
            align_label(label, probs),
            spacing=spacing if self.boundary_unit == "mm" else None,
            reach=reach,
            activation=self.activation,
            ignore_index=self.schema.ignore_index,
        )
        return distance.flatten(1)

    def _memberships(self, pixels: Pixels, spatial: Sequence[int], distance: Tensor | None) -> list[Tensor]:
        """Masks ``(N, P)`` of the regions after the first, which is all voxels."""
        masks = []
        for region in self.regions[1:]:
            if region == "foreground":
                if pixels.num_regions is None:
                    structure = pixels.valid & (pixels.label_map != self.schema.background)
                else:
                    structure = (pixels.valid & (pixels.label_map == 1)).view(len(pixels.probs), pixels.num_regions, -1).any(1)
                masks.append(dilate(structure.view(-1, *spatial), self.foreground_radius).flatten(1))
            else:
                assert distance is not None
                assert self.boundary_width is not None
                masks.append(distance < self.boundary_width)
        return masks

    def _details(self, pixels: Pixels, strata: _Strata, distance: Tensor, confidence: Tensor, correct: Tensor) -> dict[str, Tensor]:
        values = {"confidence": confidence}
        if "logit_norm" in self.scores:
            values["logit_norm"] = torch.cat([logit_norm_score(block) for block in pixels.probs.split(_BLOCK, dim=2)], dim=1)
        fine = torch.stack(
            [strata.bins(accumulate_fine_bins, values[score], correct, pixels.valid) for score in self.scores], dim=2
        )  # (N, 3, scores, regions, F)
        for name, total in zip(_SUMS, fine.sum(0), strict=True):
            state = getattr(self, f"fine_{name}")
            setattr(self, f"fine_{name}", state + total.to(state.dtype))
        ordered = [
            torch.stack(
                [ordered_numbers({score: Bins(*case[:, o, g]) for o, score in enumerate(self.scores)}, self.num_bins) for g in range(case.shape[2])]
            )
            for case in fine
        ]
        n, copies = len(confidence), confidence.shape[1] // distance.shape[1]
        step = torch.where(distance < _REACH, distance, _REACH).long().repeat(1, copies)
        row = torch.arange(n, device=step.device).view(n, 1) * (_REACH + 1) + step
        profile = accumulate_bins(confidence, correct, num_bins=1, row=row, num_rows=n * (_REACH + 1), valid=pixels.valid)
        return {"ordered": torch.stack(ordered), "profile": _stacked(profile.view(n, _REACH + 1))[..., :_REACH]}

    def _surface(self, probs: Tensor, label: Tensor, mask: Tensor | None, spacing: Tensor | None) -> Tensor:
        assert self.surface_tolerance is not None
        options: dict[str, Any] = {
            "spacing": spacing,
            "mask": mask,
            "background": self.schema.background,
            "activation": self.activation,
            "ignore_index": self.schema.ignore_index,
            "validate_args": False,
        }
        distance = hausdorff_distance_95(probs, label, **options)
        return torch.stack([distance, normalized_surface_distance(probs, label, tolerance=self.surface_tolerance, **options)], dim=1)

    def _no_rows(self) -> Tensor:
        return torch.zeros(0, self.layout.width, dtype=torch.float64, device=self.device)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without a case takes part in the gathering with no rows of the right width; torchmetrics would send a single-precision vector.
        if not len(self.case_rows):
            self.case_rows = [self._no_rows()]
        super()._sync_dist(*args, **kwargs)


_BLOCK = 1 << 18
"""Voxels whose logits are normalised at a time."""
_SUMS = ("count", "confidence", "correct")


def _stacked(bins: Bins) -> Tensor:
    """Counts and sums of bins ``(N, ...)`` along a new axis 1, float64."""
    return torch.stack([bins.count.double(), bins.confidence, bins.correct], dim=1)


def _class_by_class(pixels: Pixels) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Probability, the reference's share and validity of one class or region after the other, each ``(N, P)``: all at once would take C times the memory."""
    if pixels.num_regions is None and pixels.soft_labels is None:
        for k in range(pixels.num_classes):
            yield pixels.probs[:, k], pixels.label_map == k, pixels.valid
    else:
        probs, shares, valid = pixels.per_class()
        for k in range(pixels.num_classes):
            yield probs[:, k], shares[:, k], valid[:, min(k, valid.shape[1] - 1)]


class _Strata:
    """The parts of cases that regions are made of: a voxel's stratum is the set of regions that it lies in, so that one pass serves them all.

    Args:
        masks: Membership of the regions after the first, each ``(N, P)``, bool; the first region is everything.
        like: ``(N, P)``.
    """

    def __init__(self, masks: Sequence[Tensor], like: Tensor) -> None:
        self.count = 1 << len(masks)
        self.index = torch.zeros_like(like, dtype=torch.int64)
        for i, mask in enumerate(masks):
            self.index = self.index + (mask.long() << i)
        strata = torch.arange(self.count, device=like.device)
        self.members = torch.stack([torch.ones_like(strata), *((strata >> i) & 1 for i in range(len(masks)))]).double()  # (regions, strata)

    def sums(self, values: Tensor) -> Tensor:
        """Sum per case and region, ``(N, regions)``, float64, of one value per voxel ``(N, P)`` (``(N, R P)`` for R questions per voxel)."""
        totals = torch.zeros(len(values), self.count, dtype=torch.float64, device=values.device)
        return totals.scatter_add_(1, self._index(values), values.double()) @ self.members.T

    def bins(self, accumulate: Callable[..., Bins], confidence: Tensor, correct: Tensor, valid: Tensor, **options: Any) -> Tensor:
        """Bins per case and region, ``(N, 3, regions, B)``."""
        n = len(confidence)
        row = torch.arange(n, device=confidence.device).view(n, 1) * self.count + self._index(confidence)
        bins = accumulate(confidence, correct, row=row, num_rows=n * self.count, valid=valid, **options)
        return torch.einsum("gs,nasb->nagb", self.members, _stacked(bins.view(n, self.count, -1)))

    def _index(self, values: Tensor) -> Tensor:
        copies = values.shape[1] // max(self.index.shape[1], 1)
        return self.index if copies == 1 else self.index.repeat(1, copies)


class _RowLayout:
    """Named arrays as one row of numbers per case, and back.

    Args:
        shapes: Shape of each array of one case.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.width = sum(self.sizes)

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """``(N, *shape)`` each to ``(N, width)``, float64."""
        return torch.cat([parts[name].double().reshape(len(parts[name]), -1) for name in self.shapes], dim=1)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """``(N, width)`` to ``(N, *shape)`` each."""
        columns = rows.split(self.sizes, dim=1)
        return {name: part.reshape(len(rows), *shape) for (name, shape), part in zip(self.shapes.items(), columns, strict=True)}
