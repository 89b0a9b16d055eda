"""Everything a run leaves for its readers, ``report.html`` last."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from densecal.files import write_atomically
from densecal.labels import LabelSchema
from densecal.metrics.class_prior import ClassPriorBaseline
from densecal.metrics.evaluation import Evaluation
from densecal.report import figures, measures, tables
from densecal.report.drawing import Chart, png_bytes
from densecal.report.findings import findings
from densecal.report.html import describe_facts, merge_notes, render
from densecal.report.reliability import dataset_reliability_chart, reliability_chart
from densecal.report.slices import AGREEMENT, CONFIDENCE_COLORMAP, ERROR_COLORS, Example, Panels, example_figure, slice_panels
from densecal.report.summary import cases_csv, hex_color, named_cases, summary, to_json
from densecal.report.training_cases import CaseLevels, levels_chart, levels_rows, levels_table

__all__ = ["write_report"]

_MAX_CASES = 100  # rows of the page's case table; cases.csv has all


def write_report(
    run_dir: Path | str,
    evaluation: Evaluation,
    schema: LabelSchema,
    facts: Mapping[str, Any],
    examples: Sequence[Example] = (),
    history: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    *,
    case_ids: Sequence[str] | None = None,
    baseline: ClassPriorBaseline | None = None,
    case_levels: CaseLevels | None = None,
) -> Path:
    """Write ``summary.json``, ``cases.csv``, ``table.md``, ``table.tex``, ``figures/`` and ``report.html`` into a run's folder.

    Each file appears whole or not at all. An older ``report.html`` is removed first and the new one is written last, so a page that is there belongs to
    the other files. What the evaluation does not have (intervals, bins per case, curves) is left out.

    Args:
        run_dir: Folder of the run; made if missing.
        evaluation: The results.
        schema: Classes and palette.
        facts: What was run, in the order to show: names such as ``"data set"``, ``"licence"``, ``"seed"``, ``"model"``, ``"loss"``, ``"epochs"``,
            ``"duration"``, ``"commit"``, ``"device"``, and values that are numbers, text, lists or mappings. ``"title"`` heads the page, ``"split"`` says
            which cases were evaluated, and ``"notes"`` (text or a list) is added to ``notes``.
        examples: Cases to show as slices; the worst is evaluation first.
        history: One row per epoch; see :func:`densecal.report.figures.history_charts`.
        notes: Sentences that a reader must know before the numbers, such as what they are not evidence for.
        case_ids: Name of each case, by ``case_index``. By default the number itself.
        baseline: What a model scores that knows the class shares alone, see :func:`densecal.metrics.class_prior_baseline`.
        case_levels: Numbers that the loss kept of each training case, name -> case -> number; written to ``training_cases.csv``.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If an example's shapes do not fit or ``case_ids`` does not name every case.
    """
    run_dir = Path(run_dir)
    page = run_dir / "report.html"
    page.unlink(missing_ok=True)

    notes = merge_notes(notes, facts)
    content = summary(evaluation, schema, facts, notes=notes, case_ids=case_ids, baseline=baseline)
    write_atomically(run_dir / "summary.json", to_json(content))
    write_atomically(run_dir / "cases.csv", cases_csv(named_cases(evaluation, case_ids)))
    case_levels = case_levels or {}
    if case_levels:
        write_atomically(run_dir / "training_cases.csv", cases_csv(levels_rows(case_levels)))
    element = evaluation.settings.element
    cases = _worst_first(content["cases"], evaluation.leading[1])
    parts = {
        "overlap": measures.overlap_table(evaluation),
        "fine_grained": measures.fine_grained_table(evaluation),
        "pooled": measures.pooled_table(evaluation, element=element),
        "baseline": measures.baseline_table(evaluation, baseline),
        "further": measures.further_table(evaluation),
        "classes": measures.class_table(evaluation, schema),
    }
    filled = [table for table in parts.values() if table.rows]
    write_atomically(run_dir / "table.md", "\n".join(tables.markdown(table) for table in filled))
    write_atomically(run_dir / "table.tex", "\n".join(tables.latex(table) for table in filled))
    charts = _charts(evaluation, history or (), case_levels)
    for chart in (chart for group in charts.values() for chart in group):
        _save(run_dir / "figures", chart)
    slices = _slices(examples, schema, evaluation, cases, run_dir / "figures")

    html = render(
        "report",
        title=str(facts.get("title", "Segmentation report")),
        split=content["split"],
        notes=notes,
        findings=findings(evaluation, content["cases"], element=element, baseline=baseline),
        facts=describe_facts(content["run"]),
        num_cases=len(evaluation.cases),
        element=element,
        structure=evaluation.leading[0] == "dice",
        tiles=_tiles(evaluation),
        near=f"the reference structure and what lies within {evaluation.settings.foreground_radius} {element} of it"
        if "foreground" in evaluation.pooled
        else "",
        **{name: [Markup(svg) for chart in group for svg in chart.inline()] for name, group in charts.items()},
        band=bool(evaluation.case_bins) and len(evaluation.cases) > 1,
        **parts,
        training_cases=levels_table(case_levels),
        cases=_shown_cases(measures.case_table(evaluation, cases[:_MAX_CASES]), len(cases)),
        examples=slices,
        legend=[(hex_color(schema.palette[c]), schema.names[c]) for c in schema.foreground],
        colors=[hex_color(color) for color in schema.palette],
        names=schema.names,
        error_legend=[(hex_color(color), name) for name, color in ERROR_COLORS.items()],
        ramp=[to_hex(colormaps[CONFIDENCE_COLORMAP](x)) for x in np.linspace(0, 1, 9)],
        agreement=any(name == AGREEMENT for example in slices for row in example["rows"] for name, _ in row["pictures"]),
        floor=f"{1 / schema.num_outcomes:.2f}",
        definitions=measures.used_definitions([evaluation]),
        intervals=bool(evaluation.intervals),
    )
    return write_atomically(page, html)


def _charts(evaluation: Evaluation, history: Sequence[Mapping[str, Any]], case_levels: CaseLevels) -> dict[str, list[Chart]]:
    """All charts by their place in the page; those without data are left out."""
    distance = evaluation.curves.get("boundary_distance")
    groups = {
        "reliability": [reliability_chart(evaluation)],
        "dataset_reliability": [dataset_reliability_chart(evaluation)],
        "use": [figures.risk_coverage_chart(evaluation), *([figures.boundary_distance_chart(distance)] if distance else [])],
        "class_charts": [figures.class_chart(evaluation)],
        "curves": figures.history_charts(history, overlap=evaluation.leading[0]),
        "levels": [levels_chart(case_levels)],
    }
    return {name: [chart for chart in group if chart.panels] for name, group in groups.items()}


def _save(folder: Path, chart: Chart) -> None:
    chart.save(folder)


def _tiles(evaluation: Evaluation) -> list[dict[str, str]]:
    """The few numbers at the top."""
    numbers = evaluation.scalars()
    tiles = []
    for known in measures.headline(evaluation):
        value, _, interval = tables.number(numbers[known.key], evaluation.intervals.get(known.key)).text.partition(" (")
        sentence = measures.definition(evaluation, known.key)
        tiles.append({"name": known.name, "value": value, "interval": interval.removesuffix(")"), "definition": sentence})
    return tiles


def _worst_first(cases: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return sorted(cases, key=lambda row: (row[key] is None, row[key], row["case_id"]))


def _shown_cases(table: tables.Table, num_cases: int) -> tables.Table:
    shown = len(table.rows)
    return replace(table, note=f"The {shown} worst of {num_cases}; cases.csv has all of them.") if shown < num_cases else table


def _slices(
    examples: Sequence[Example], schema: LabelSchema, evaluation: Evaluation, cases: Sequence[Mapping[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """Pictures of each example, also written as a file, in the order of ``cases``."""
    rank = {row["case_id"]: i for i, row in enumerate(cases)}
    slices = []
    for example in sorted(examples, key=lambda example: rank.get(example.case_id, len(cases))):
        panels = slice_panels(example, schema)
        picture = example_figure(panels, schema, example.case_id)
        write_atomically(folder / f"example_{re.sub(r'[^A-Za-z0-9._-]+', '_', example.case_id)}.png", png_bytes(picture, dpi=110))
        row = cases[rank[example.case_id]] if example.case_id in rank else {}
        wide = len(panels) == 1 and panels[0].wide
        scores = _example_scores(evaluation, row)
        slices.append({"case_id": example.case_id, **scores, "wide": wide, "rows": [_slice(item) for item in panels]})
    return slices


def _example_scores(evaluation: Evaluation, row: Mapping[str, Any]) -> dict[str, Any]:
    """A few numbers of a case, and the overlap of the classes that it has."""
    lead = evaluation.leading[1]
    if lead == "dice":
        named = {"dice": "Dice", "case_ece_foreground": "ECE near the structure"}
    else:
        named = {"iou": "mIoU", "case_accuracy": f"{evaluation.settings.element.removesuffix('s')} accuracy", "case_ece": "ECE"}
    of_class = [row.get(f"{lead}/{name}") for name in evaluation.class_names]
    return {
        "scores": [(name, tables.number(row[key]).text) for key, name in named.items() if key in row],
        "overlap": measures.MEASURES[lead].name,
        "classes": [(c, tables.number(value, digits=2).text) for c, value in enumerate(of_class) if value is not None and c in evaluation.foreground],
    }


def _slice(panels: Panels) -> dict[str, Any]:
    return {"title": panels.title, "pictures": [(name, panels.data_url(i)) for i, name in enumerate(panels.names)]}
