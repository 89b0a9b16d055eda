"""A study as a page, tables and figures, from the scores of its runs alone."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from densecal.files import write_atomically
from densecal.metrics.results import Settings, filled_definitions
from densecal.registry import near_matches
from densecal.report import study_figures as figures
from densecal.report import tables
from densecal.report.html import render
from densecal.report.measures import measure
from densecal.report.reliability import REGION_TITLES
from densecal.report.study import difference_table, mean_table
from densecal.report.study_scores import StudyScores, paired_intervals
from densecal.report.tables import Table, number, text

__all__ = ["case_difference_table", "study_measures", "study_tables", "write_study"]

_LINES = 5
"""Methods in a chart of lines: more cannot be told apart."""


def study_measures(runs: Sequence[StudyScores]) -> list[str]:
    """What the columns of a study are by default: overlap, then calibration where it is decided, then everywhere."""
    structure = all("ece_foreground" in run.scores for run in runs)
    near = "_foreground" if structure else ""
    overlap = ["dice"] if structure else ["iou_dataset", "accuracy"]
    wanted = [*overlap, f"ece{near}", f"ece_classwise{near}", f"nll{near}", f"brier{near}", *(["ece", "nll"] if structure else ["ece_boundary"])]
    return [key for key in wanted if all(key in run.scores for run in runs)]


def case_difference_table(methods: Mapping[str, Sequence[StudyScores]], baseline: str, measures: Sequence[str], *, replicates: int = 1000) -> Table:
    """Each method minus the baseline, with 95 % intervals from resamples of the cases; in a word where an interval leaves 0 out.

    Raises:
        ValueError: If there is no such baseline.
    """
    if baseline not in methods:
        raise ValueError(f"baseline: no method {baseline!r}. {near_matches(baseline, methods)}")
    found = paired_intervals(methods, baseline, measures, replicates=replicates)
    rows = []
    for name, gaps in found.items():
        cells = [text(name)]
        for key in measures:
            if key not in gaps:
                cells.append(number(None))
                continue
            gap, low, high = gaps[key]
            better = measure(key).better
            word = "" if low <= 0 <= high or not better else "better" if (low > 0) == (better == "higher") else "worse"
            cells.append(number(gap, (low, high), digits=4, signed=True, remark=word))
        rows.append(tuple(cells))
    header = (text(f"minus {baseline}"), *(text(measure(key).short) for key in measures))
    note = "Means over runs; resamples of cases (of persons, all their cases), the same for every method. What other seeds could show is in the table of means."
    return Table("cases", f"Difference from {baseline}, with 95 % intervals, paired over cases", header, tuple(rows), note=note)


def study_tables(runs: Sequence[StudyScores], *, baseline: str | None = None, measures: Sequence[str] = ()) -> str:
    """The tables of :func:`write_study` as Markdown."""
    return "\n".join(tables.markdown(table) for some in _by_data(runs).values() for table in _tables(some, baseline, measures)[2])


def write_study(
    folder: Path,
    title: str,
    runs: Sequence[StudyScores],
    *,
    baseline: str | None = None,
    measures: Sequence[str] = (),
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> tuple[Path, str]:
    """Write ``comparison.md``, ``table.tex``, ``table.csv``, ``comparison.json``, ``figures/`` and ``report.html``; data sets have sections of their own.

    Args:
        folder: Where to write; made if missing.
        title: Of the page.
        runs: What was scored.
        baseline: Method that the others are compared with; by default the first.
        measures: Keys of the columns; by default :func:`study_measures`.
        notes: Sentences that a reader must know before the numbers.
        facts: What was run.

    Returns:
        Path of the page, and its tables as Markdown.

    Raises:
        ValueError: If there is no such method or measure.
    """
    page = folder / "report.html"
    sections = [
        _section(folder / "figures" / (f"set{i + 1}" if i else ""), data, some, baseline, measures)
        for i, (data, some) in enumerate(_by_data(runs).items())
    ]
    shown = [table for section in sections for table in section["tables"]]
    content = "\n".join(tables.markdown(table) for table in shown)
    page.unlink(missing_ok=True)
    write_atomically(folder / "comparison.md", content)
    write_atomically(folder / "table.tex", "\n".join(tables.latex(table) for table in shown))
    write_atomically(folder / "table.csv", _csv(runs))
    write_atomically(folder / "comparison.json", json.dumps([_row(run) for run in runs], indent=1) + "\n")
    html = render(
        "study",
        title=title,
        notes=list(notes),
        findings=[finding for section in sections for finding in section["findings"]],
        facts=[(name, str(value)) for name, value in (facts or {}).items()],
        sections=sections,
        num_runs=len({(run.method, tuple(run.replicate.items())) for run in runs}),
        num_methods=len({run.method for run in runs}),
        definitions=_definitions(runs, [key for section in sections for key in section["measures"]]),
        intervals=True,
    )
    return write_atomically(page, html), content


def _by_data(runs: Sequence[StudyScores]) -> dict[str, list[StudyScores]]:
    return {data: [run for run in runs if run.data == data] for data in dict.fromkeys(run.data for run in runs)}


def _tables(
    runs: Sequence[StudyScores], baseline: str | None, measures: Sequence[str]
) -> tuple[dict[str, list[StudyScores]], list[str], list[Table]]:
    """The methods of a data set, those as trained first; the measures; and the tables."""
    methods: dict[str, list[StudyScores]] = {}
    for run in sorted(runs, key=lambda run: bool(run.posthoc)):
        methods.setdefault(run.name, []).append(run)
    keys = list(measures) or study_measures(runs)
    reference = baseline or next(iter(methods))
    parts = [mean_table(methods, keys, f"{runs[0].data}. Mean and standard deviation over runs")]
    if len(methods) > 1:
        parts.append(case_difference_table(methods, reference, keys))
        if len(methods[reference]) > 1:
            caption = f"Difference from {reference}, paired by seed and fold, with the 95 % interval of their mean by Student's t"
            parts.append(difference_table(methods, reference, keys, caption))
    return methods, keys, parts


def _section(folder: Path, data: str, runs: Sequence[StudyScores], baseline: str | None, measures: Sequence[str]) -> dict[str, Any]:
    methods, keys, parts = _tables(runs, baseline, measures)
    reference = baseline or next(iter(methods))
    overlap = next((key for key in keys if measure(key).better == "higher"), keys[0])
    errors = [key for key in keys if measure(key).better == "lower"]
    best = figures.front(methods, (overlap, *errors[:3]))
    lines = list(dict.fromkeys([reference, *_spread(best, _LINES - 1)]))
    region = next((region for region in ("foreground", "all") if all(region in run.diagrams for run in runs)), "all")
    classes = [name for name in runs[0].facts["counted"] if f"{overlap}/{name}" in runs[0].scores]
    charts = []
    if errors:
        likelihood = [key for key in errors[1:] if key.startswith("nll")][:1]
        charts.append(figures.front_chart(methods, overlap, [errors[0], *likelihood]))
    charts.append(figures.reliability_grid(methods, region, REGION_TITLES[region]))
    if classes:
        charts.append(figures.class_chart(methods, overlap, region, classes))
    charts.append(figures.boundary_chart(methods, lines))
    trained = list(dict.fromkeys(methods[name][0].method for name in [reference, *best]))
    trained += [name for name, some in methods.items() if not some[0].posthoc and name not in trained]
    over = [overlap, *errors[:1], *(key for key in errors[1:] if key.startswith("nll"))][:3]
    charts += [chart for chart in (figures.length_chart(methods, trained[:_LINES], over), figures.size_chart(methods, over)) if chart is not None]
    for chart in charts:
        chart.save(folder)
    cases = {case for run in runs for case in run.cases.case_ids}
    persons = {person for run in runs for person in run.cases.subjects}
    words = f"{data}: {len(cases)} test cases" + (f" of {len(persons)} persons or scenes" if len(persons) < len(cases) else "")
    return {
        "title": words,
        "measures": keys,
        "tables": parts,
        "charts": {chart.name: [Markup(svg) for svg in chart.inline()] for chart in charts},
        "region": REGION_TITLES[region].lower(),
        "findings": [
            (
                f"{data.partition(' (')[0]}: no other method is better in {_listed([measure(key).short for key in (overlap, *errors[:3])])} at once",
                _listed(best) + ".",
            )
        ],
    }


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else "none"


def _definitions(runs: Sequence[StudyScores], keys: Sequence[str]) -> list[tuple[str, str]]:
    measured = dict(runs[0].facts["measured"])
    sentences = filled_definitions(Settings(**{key: value for key, value in measured.items() if key != "background"}), measured["background"])
    return [(measure(key).name, sentences[key]) for key in dict.fromkeys(keys) if key in sentences]


def _row(run: StudyScores) -> dict[str, Any]:
    scores = {key: None if not math.isfinite(value) else value for key, value in run.scores.items()}
    return {
        "method": run.method,
        "posthoc": run.posthoc or None,
        **{key.rpartition(".")[2]: value for key, value in run.replicate.items()},
        "data": run.data,
        "scores": scores,
    }


def _csv(runs: Sequence[StudyScores]) -> str:
    """One row per run and number, in full precision; an undefined number is an empty field."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    names = list(dict.fromkeys(key for run in runs for key in run.replicate))
    writer.writerow(["data", "method", "posthoc", *(name.rpartition(".")[2] for name in names), "measure", "value"])
    for run in runs:
        for key, value in run.scores.items():
            replicate = [run.replicate.get(name, "") for name in names]
            writer.writerow([run.data, run.method, run.posthoc, *replicate, key, value if math.isfinite(value) else ""])
    return stream.getvalue()
