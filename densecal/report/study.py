"""Several runs of several methods: means, spread over seeds and folds, and paired differences, from the summaries that the runs left."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from scipy.stats import t as student_t

from densecal.metrics.results import flat_scores
from densecal.registry import near_matches
from densecal.report.measures import measure
from densecal.report.tables import UNDEFINED, Cell, Table, text
from densecal.runs import RECORD

__all__ = ["Scored", "StudyRun", "default_measures", "difference_table", "find_runs", "mean_table", "name_methods", "read_run"]

REPLICATES = ("seed", "data.fold")
"""Settings in which the runs of one method may differ."""
_NO_MATTER = (
    "output_dir",
    "experiment_name",
    "resume",
    "predictions",
    "data.root",
    "data.test_root",
    "data.num_workers",
    "data.cache",
    "data.download",
)
"""Settings that change nothing about the results."""
_NO_GROUPS = ("data", "experiment", "trainer")
"""Groups whose choice names no method: what they set is compared by itself."""


class Scored(Protocol):
    """Numbers of a run."""

    @property
    def scores(self) -> Mapping[str, float]:
        """By the keys of ``Evaluation.scalars``."""

    @property
    def pair(self) -> tuple[Any, ...]:
        """What runs of two methods have in common that are compared with each other: their seed and fold."""


@dataclass(frozen=True)
class StudyRun:
    """A finished run.

    Args:
        folder: The run directory.
        started: When, ISO 8601.
        choices: Group -> choice of its command line.
        settings: Dotted key -> value of its config.
        scores: The numbers of its test, by the keys of ``Evaluation.scalars``.
        data: What was tested: the data set, its classes and the cases.
    """

    folder: Path
    started: str
    choices: Mapping[str, str]
    settings: Mapping[str, Any]
    scores: Mapping[str, float]
    data: str

    @property
    def pair(self) -> tuple[Any, ...]:
        """Seed and fold."""
        return tuple(self.settings.get(key) for key in REPLICATES)


def find_runs(places: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The run directories at or below some places: those that are finished, and those that are not.

    Raises:
        FileNotFoundError: If a place holds no run.
    """
    finished: dict[Path, None] = {}
    others: dict[Path, None] = {}
    for place in places:
        found = [record.parent for record in sorted(place.rglob(RECORD))]
        if not found:
            raise FileNotFoundError(f"No run in {place}. Give run directories, runs/<experiment>/<time>, or folders of them.")
        for folder in found:
            (finished if (folder / "summary.json").is_file() else others)[folder] = None
    return list(finished), list(others)


def read_run(folder: Path) -> StudyRun:
    """A finished run from its ``run.json``, ``config.yaml`` and ``summary.json``.

    Raises:
        ValueError: If one of them is damaged; the text names it.
    """
    content: dict[str, Any] = {}
    for name in (RECORD, "config.yaml", "summary.json"):
        path = folder / name
        try:
            content[name] = (
                yaml.safe_load(path.read_text(encoding="utf-8")) if name.endswith(".yaml") else json.loads(path.read_text(encoding="utf-8"))
            )
            if not isinstance(content[name], dict):
                raise TypeError("no mapping")
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}). Leave the run out, or train it again.") from None
    record, config, summary = content.values()
    classes = ", ".join(row["name"] for row in summary["classes"])
    return StudyRun(
        folder,
        record["started"],
        {group: str(choice) for group, choice in record["choices"].items()},
        dict(_flat(config, "")),
        {key: value for key, value in flat_scores(summary["mean"], summary["fine_grained"], summary["pooled"]).items() if value is not None},
        f"{config['data']['name']} ({classes}): {summary['split']}",
    )


def _flat(node: Any, key: str) -> Iterable[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _flat(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def name_methods(runs: Sequence[StudyRun]) -> list[str]:
    """What each run is, in as few words as tell the methods apart: the choices that differ, and the settings that differ among runs of the same choices.

    Runs of one name differ in seed and fold alone.
    """
    groups = [
        group
        for group in dict.fromkeys(group for run in runs for group in run.choices)
        if group not in _NO_GROUPS and len({run.choices.get(group) for run in runs}) > 1
    ]
    keys = [
        key for key in dict.fromkeys(key for run in runs for key in run.settings) if _matters(key) and len({_spell(run, key) for run in runs}) > 1
    ]

    def told(key: str) -> bool:
        """Whether the choice of a group tells the value."""
        group = key.partition(".")[0]
        if group not in groups:
            return False
        values: dict[str | None, set[str]] = {}
        for run in runs:
            values.setdefault(run.choices.get(group), set()).add(_spell(run, key))
        return all(len(found) == 1 for found in values.values())

    settings = [key for key in keys if not told(key)]
    names = []
    for run in runs:
        words = [f"{group}={run.choices.get(group, 'null').replace('None', 'null')}" for group in groups]
        words += [f"{key}={_spell(run, key)}" for key in settings if key in run.settings]
        names.append(" ".join(words) or run.choices.get("loss", "run"))
    return names


def _matters(key: str) -> bool:
    return key not in (*REPLICATES, *_NO_MATTER) and not key.startswith("trainer.")


def _spell(run: StudyRun, key: str) -> str:
    return str(run.settings.get(key))


def default_measures(runs: Sequence[StudyRun]) -> list[str]:
    """Overlap, accuracy and calibration: what a report has at its top, of those that every run has."""
    first = ["dice", "iou"] if any("ece_foreground" in run.scores for run in runs) else ["iou_dataset", "iou_class"]
    wanted = [*first, "accuracy", "ece", "ece_foreground", "ece_boundary", "ece_classwise", "nll"]
    return [key for key in wanted if all(key in run.scores for run in runs)]


def mean_table(methods: Mapping[str, Sequence[Scored]], measures: Sequence[str], caption: str) -> Table:
    """Mean and standard deviation (of a sample, n - 1) over the runs of each method; the best mean of each column stands out.

    Raises:
        ValueError: If no run has a measure.
    """
    _check(measures, methods)
    rows = []
    best = {key: _best(key, [statistics.fmean(_values(runs, key)) for runs in methods.values()]) for key in measures}
    for name, runs in methods.items():
        cells = [text(name), Cell(str(len(runs)), len(runs))]
        for key in measures:
            values = _values(runs, key)
            mean = statistics.fmean(values)
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(Cell(f"{mean:.4f}{spread}".replace("-", "\N{MINUS SIGN}"), mean, strong=len(methods) > 1 and mean == best[key]))
        rows.append(tuple(cells))
    return Table("means", caption, (text("method"), text("runs"), *(text(_head(key)) for key in measures)), tuple(rows))


def difference_table(methods: Mapping[str, Sequence[Scored]], baseline: str, measures: Sequence[str], caption: str) -> Table:
    """Each method minus the baseline, paired by seed and fold: the mean, and in brackets its 95 % interval by Student's t, where there are two pairs or more.

    Raises:
        ValueError: If there is no such baseline, or no run has a measure.
    """
    _check(measures, methods)
    if baseline not in methods:
        raise ValueError(f"baseline: no method {baseline!r}. {near_matches(baseline, methods)}")
    reference = {run.pair: run for run in methods[baseline]}
    rows = []
    for name, runs in methods.items():
        if name == baseline:
            continue
        pairs = [(run, reference[run.pair]) for run in runs if run.pair in reference]
        cells = [text(name), Cell(str(len(pairs)), len(pairs))]
        for key in measures:
            cells.append(_difference([run.scores[key] - other.scores[key] for run, other in pairs if key in run.scores and key in other.scores]))
        rows.append(tuple(cells))
    return Table("differences", caption, (text(f"minus {baseline}"), text("pairs"), *(text(_head(key)) for key in measures)), tuple(rows))


def _difference(values: Sequence[float]) -> Cell:
    if not values:
        return Cell(UNDEFINED, None)
    mean = statistics.fmean(values)
    interval = ""
    if len(values) > 1:
        half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        interval = f" ({mean - half:+.4f} to {mean + half:+.4f})"
    return Cell(f"{mean:+.4f}{interval}".replace("-", "\N{MINUS SIGN}"), mean)


def _check(measures: Sequence[str], methods: Mapping[str, Sequence[Scored]]) -> None:
    for key in measures:
        for name, runs in methods.items():
            if not _values(runs, key):
                known = {key for run in runs for key in run.scores if "/" not in key}
                raise ValueError(f"measures: {name} has no {key!r}. {near_matches(key, known)}")


def _values(runs: Sequence[Scored], key: str) -> list[float]:
    return [run.scores[key] for run in runs if key in run.scores]


def _best(key: str, means: Sequence[float]) -> float | None:
    better = measure(key).better
    return None if not better else max(means) if better == "higher" else min(means)


def _head(key: str) -> str:
    one = measure(key)
    return (one.short or one.name) + {"higher": " ↑", "lower": " ↓"}.get(one.better, "")
