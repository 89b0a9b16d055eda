"""What a study keeps of a run, and of each way its probabilities were repaired: enough for every table, interval and figure, without the network or the data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densecal.files import write_atomically
from densecal.metrics.bootstrap import CaseBootstrap
from densecal.metrics.results import Evaluation, RegionSums, case_overlap
from densecal.report.figures import classwise_errors

__all__ = ["CaseSums", "StudyScores", "pair_of", "paired_intervals", "read_scores"]

_VERSION = 1
_OVERLAPS = ("dice", "iou")
_DIGITS = 5
"""Of the numbers in a file: more than any table shows."""


@dataclass(frozen=True)
class CaseSums:
    """What the measures of a study are made of, case by case, so that a resample of cases has its own figures.

    Args:
        case_ids: The n cases.
        subjects: Whose each is.
        overlap: Overlap of each case by the key of its mean, ``"dice"``, ``"dice/<class>"``, ``"iou"``, ...; ``(n,)``, NaN where a case has none.
        counts: Voxels in the intersection, in the prediction and in the reference, of the classes that means count, ``(n, 3, K')``.
        regions: Region -> ``count``, ``correct``, ``nll`` and ``brier``, sums ``(n,)``, and the gaps of confidence and accuracy, summed over the voxels of a bin:
            ``gap`` ``(n, B)`` of the predicted class, ``class_gap`` ``(n, K, B)`` of every class.
    """

    case_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    overlap: Mapping[str, Tensor]
    counts: Tensor
    regions: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, evaluation: Evaluation, case_ids: Sequence[str], subjects: Sequence[str]) -> CaseSums:
        """Of an evaluation whose ``case_index`` counts these cases."""
        names = [row["case_index"] for row in evaluation.cases]
        keys = [key for key in evaluation.cases[0] if key.partition("/")[0] in _OVERLAPS] if evaluation.cases else []
        return cls(
            tuple(str(case_ids[i]) for i in names),
            tuple(str(subjects[i]) for i in names),
            {key: torch.tensor([row[key] for row in evaluation.cases], dtype=torch.float64) for key in keys},
            case_overlap(evaluation)[..., list(evaluation.foreground)],
            {region: _sums(part) for region, part in evaluation.case_sums.items()},
        )

    def figures(self, weights: Tensor) -> dict[str, Tensor]:
        """The measures of resamples.

        Args:
            weights: How often each resample holds each case, ``(R, n)``, float64. A row of ones is the cases themselves.

        Returns:
            By the keys of ``Evaluation.scalars``, ``(R,)``, float64; NaN where a resample has nothing to say.
        """
        found = {}
        for key, values in self.overlap.items():
            defined = ~values.isnan()
            found[key] = weights @ values.nan_to_num(nan=0.0) / (weights @ defined.double())
        both, predicted, reference = torch.einsum("rn,nqk->qrk", weights, self.counts)
        found["dice_dataset"] = (2 * both / (predicted + reference)).nanmean(1)
        found["iou_dataset"] = (both / (predicted + reference - both)).nanmean(1)
        for region, sums in self.regions.items():
            suffix = "" if region == "all" else f"_{region}"
            count = weights @ sums["count"]
            for key, name in (("accuracy", "correct"), ("nll", "nll"), ("brier", "brier")):
                found[key + suffix] = weights @ sums[name] / count
            found[f"ece{suffix}"] = (weights @ sums["gap"]).abs().sum(-1) / count
            gaps = torch.einsum("rn,nkb->rkb", weights, sums["class_gap"])
            found[f"ece_classwise{suffix}"] = gaps.abs().sum(-1).mean(-1) / count
        return found


def _sums(part: RegionSums) -> dict[str, Tensor]:
    top, classwise = part.top_label, part.classwise
    return {
        "count": top.count.sum(-1).double(),
        "correct": top.correct.sum(-1).double(),
        "nll": part.nll.double(),
        "brier": part.brier.double(),
        "gap": (top.confidence - top.correct).double(),
        "class_gap": (classwise.confidence - classwise.correct).double(),
    }


@dataclass(frozen=True)
class StudyScores:
    """The results of one run of a study, as trained or repaired after training.

    Args:
        method: What was compared, ``"svls"``.
        posthoc: The calibrator that repaired its probabilities, ``""`` where none did.
        replicate: Which of its runs this is: ``{"seed": 0, "data.fold": 1}``.
        data: What was tested: the data set, its classes and which cases.
        facts: What a reader wants to know: ``settings`` of its own, ``commit``, what the calibrator ``found``, ...; and ``counted``, the classes that means
            count, and ``measured``, how.
        scores: All numbers, by the keys of ``Evaluation.scalars``.
        cases: The same, case by case.
        diagrams: Region -> the bins of a reliability diagram, as in ``Evaluation.bins`` under ``"top_label"``.
        class_errors: Region -> class -> its expected calibration error.
        boundary_distance: Error and confidence by distance from a boundary, as in ``Evaluation.curves``; may be empty.
        history: Validation numbers by epoch.
    """

    method: str
    posthoc: str
    replicate: Mapping[str, Any]
    data: str
    facts: Mapping[str, Any]
    scores: Mapping[str, float]
    cases: CaseSums
    diagrams: Mapping[str, Mapping[str, list]] = field(default_factory=dict)
    class_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    boundary_distance: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        method: str,
        *,
        posthoc: str = "",
        replicate: Mapping[str, Any],
        data: str,
        case_ids: Sequence[str],
        subjects: Sequence[str],
        background: bool,
        facts: Mapping[str, Any] | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> StudyScores:
        """Of an evaluation.

        Args:
            evaluation: The results, with details.
            method: As above; so are ``posthoc``, ``replicate``, ``data``, ``facts`` and ``history``.
            case_ids: Name of each case, by ``case_index``.
            subjects: Whose each is, likewise.
            background: Whether a class is left out of foreground means.
        """
        known = {
            "counted": [evaluation.class_names[c] for c in evaluation.foreground],
            "measured": asdict(evaluation.settings) | {"background": background},
        }
        return cls(
            method=method,
            posthoc=posthoc,
            replicate=dict(replicate),
            data=data,
            facts=dict(facts or {}) | known,
            scores=evaluation.scalars(),
            cases=CaseSums.of(evaluation, case_ids, subjects),
            diagrams={region: kinds["top_label"] for region, kinds in evaluation.bins.items()},
            class_errors={region: dict(zip(evaluation.class_names, classwise_errors(evaluation, region), strict=True)) for region in evaluation.bins},
            boundary_distance=evaluation.curves.get("boundary_distance", {}),
            history=list(history),
        )

    @property
    def name(self) -> str:
        """Method and repair, as a table has it."""
        return f"{self.method} + {self.posthoc}" if self.posthoc else self.method

    @property
    def pair(self) -> tuple[Any, ...]:
        """Seed and fold."""
        return pair_of(self.replicate)

    @property
    def file_name(self) -> str:
        """Of its file."""
        words = [
            self.method,
            *(f"{key.rpartition('.')[2]}{value}" for key, value in self.replicate.items()),
            *([self.posthoc] if self.posthoc else []),
        ]
        return "_".join(words) + ".json"

    def write(self, folder: Path) -> Path:
        """Write it into a folder of scores."""
        content = {"schema_version": _VERSION, **{key: value for key, value in vars(self).items() if key != "cases"}, "cases": asdict(self.cases)}
        return write_atomically(folder / self.file_name, json.dumps(_plain(content), separators=(",", ":")) + "\n")


def pair_of(replicate: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What runs of two methods have in common that are compared with each other."""
    return tuple(sorted((key, str(value)) for key, value in replicate.items()))


def read_scores(folder: Path) -> list[StudyScores]:
    """All scores in a folder, sorted by the names of their files.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is damaged or of another version; the text names it.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"No scores in {folder}. tools/compare.py study=NAME leaves those of its runs in scores/ of its output.")
    return [_read(path) for path in paths]


def _read(path: Path) -> StudyScores:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema_version") != _VERSION:
            raise ValueError("of another version of densecal")
        cases = content.pop("cases")
        sums = CaseSums(
            tuple(cases["case_ids"]),
            tuple(cases["subjects"]),
            {key: _tensor(values) for key, values in cases["overlap"].items()},
            _tensor(cases["counts"]),
            {region: {key: _tensor(values) for key, values in part.items()} for region, part in cases["regions"].items()},
        )
        content["scores"] = {key: math.nan if value is None else value for key, value in content["scores"].items()}
        return StudyScores(**content, cases=sums)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as the scores of a study ({str(error).splitlines()[0]}).") from None


def paired_intervals(
    methods: Mapping[str, Sequence[StudyScores]], baseline: str, measures: Sequence[str], *, replicates: int = 1000
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """How each method differs from the baseline, with 95 % intervals from resamples of the cases.

    A method's figure is the mean over its runs of each run's figure on its own cases. A resample draws subjects (all their cases) from those of all runs, for
    both methods alike; so the interval says what other cases could have shown, not what other seeds could.

    Args:
        methods: Name -> runs; pairs are runs of one replicate, others are left out.
        baseline: Name of the method to compare with.
        measures: Keys of :meth:`CaseSums.figures`; those that there are none of are left out.
        replicates: Number of resamples.

    Returns:
        Method -> measure -> (difference, lower and upper end). The baseline is left out, and a method without a run on the same cases.
    """
    reference = {run.pair: run for run in methods[baseline]}
    case_ids = list(dict.fromkeys(case for runs in methods.values() for run in runs for case in run.cases.case_ids))
    subjects = {
        case: subject for runs in methods.values() for run in runs for case, subject in zip(run.cases.case_ids, run.cases.subjects, strict=True)
    }
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects[case] for case in case_ids))}
    bootstrap = CaseBootstrap(len(case_ids), replicates=replicates, groups=[numbers[subjects[case]] for case in case_ids])
    weights = torch.cat([torch.ones(1, len(case_ids)), bootstrap.weights]).double()  # the first row is the cases themselves
    place = {case: i for i, case in enumerate(case_ids)}
    tail = (1 - bootstrap.level) / 2
    kept: dict[tuple, dict[str, Tensor]] = {}

    def figures(run: StudyScores) -> dict[str, Tensor]:
        key = (run.name, run.pair)
        if key not in kept:
            kept[key] = run.cases.figures(weights[:, [place[case] for case in run.cases.case_ids]])
        return kept[key]

    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, runs in methods.items():
        pairs = [(run, reference[run.pair]) for run in runs if run.pair in reference and run.cases.case_ids == reference[run.pair].cases.case_ids]
        if name == baseline or not pairs:
            continue
        gaps: dict[str, tuple[float, float, float]] = {}
        for key in measures:
            both = [(figures(run), figures(other)) for run, other in pairs]
            if all(key in one and key in other for one, other in both):
                gap = torch.stack([one[key] - other[key] for one, other in both]).nanmean(0)
                low, high = gap[1:].nanquantile(torch.tensor([tail, 1 - tail], dtype=gap.dtype)).tolist()
                gaps[key] = (float(gap[0]), low, high)
        found[name] = gaps
    return found


def _tensor(values: Iterable) -> Tensor:
    return torch.tensor(_numbers(values), dtype=torch.float64)


def _numbers(values: Any) -> Any:
    return [_numbers(value) for value in values] if isinstance(values, list) else math.nan if values is None else values


def _plain(value: Any) -> Any:
    """Lists and short numbers; null where undefined."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short.is_integer() else short
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
