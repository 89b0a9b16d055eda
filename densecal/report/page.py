"""Everything a run leaves for its readers, ``report.html`` last."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from densecal.files import write_atomically
from densecal.labels import LabelSchema
from densecal.metrics.evaluation import Evaluation
from densecal.report import figures
from densecal.report.slices import CONFIDENCE_COLORMAP, PANELS, Example, example_figure, slice_panels
from densecal.report.summary import cases_csv, hex_color, named_cases, summary, to_json

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
) -> Path:
    """Write ``summary.json``, ``cases.csv``, ``figures/`` and ``report.html`` into a run's folder.

    Each file appears whole or not at all. An older ``report.html`` is removed first and the new one is written last, so a page that is there belongs to
    the other files.

    Args:
        run_dir: Folder of the run; made if missing.
        evaluation: The results.
        schema: Classes and palette.
        facts: What was run, in the order to show: names such as ``"data set"``, ``"licence"``, ``"seed"``, ``"model"``, ``"loss"``, ``"epochs"``,
            ``"duration"``, ``"commit"``, ``"device"``, and values that are numbers, text, lists or mappings. ``"title"`` heads the page, ``"split"`` says
            which cases were evaluated, and ``"notes"`` (text or a list) is added to ``notes``.
        examples: Cases to show as slices.
        history: One row per epoch; see :func:`densecal.report.figures.history_figures`.
        notes: Sentences that a reader must know before the numbers, such as what they are not evidence for.
        case_ids: Name of each case, by ``case_index``. By default the number itself.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If an example's shapes do not fit or ``case_ids`` does not name every case.
    """
    run_dir = Path(run_dir)
    page = run_dir / "report.html"
    page.unlink(missing_ok=True)

    more_notes = facts.get("notes") or ()
    notes = list(dict.fromkeys([*notes, *([more_notes] if isinstance(more_notes, str) else more_notes)]))
    content = summary(evaluation, schema, facts, notes=notes, case_ids=case_ids)
    write_atomically(run_dir / "summary.json", to_json(content))
    write_atomically(run_dir / "cases.csv", cases_csv(named_cases(evaluation, case_ids)))

    regions = list(evaluation.pooled)
    folder = run_dir / "figures"
    _save(folder, "reliability", figures.reliability_figure(evaluation.bins, regions))
    for name, figure in figures.history_figures(history or ()):
        _save(folder, f"history_{name}", figure)
    slices = []
    for example in examples:
        panels = slice_panels(example, schema)
        picture = example_figure(panels, schema, example.case_id)
        write_atomically(folder / f"example_{re.sub(r'[^A-Za-z0-9._-]+', '_', example.case_id)}.png", figures.png_bytes(picture, dpi=110))
        slices.append(
            {"case_id": example.case_id, "scores": _example_scores(content["cases"], example.case_id), "rows": [_slice(item) for item in panels]}
        )

    charts = [
        figures.inline_svg(
            figures.reliability_figure(evaluation.bins, [region], theme=figures.IN_PAGE),
            label=f"Reliability diagram, {figures.REGION_TITLES[region].lower()}",
            prefix=f"reliability-{region}",
        )
        for region in regions
    ]
    curves = [
        figures.inline_svg(figure, label=f"{name} per epoch", prefix=f"history-{name}")
        for name, figure in figures.history_figures(history or (), theme=figures.IN_PAGE)
    ]
    ramp = [to_hex(colormaps[CONFIDENCE_COLORMAP](x)) for x in np.linspace(0, 1, 9)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = _score
    template = environment.from_string(files("densecal.report").joinpath("report.html.j2").read_text(encoding="utf-8"))
    html = template.render(
        title=str(facts.get("title", "Segmentation report")),
        split=content["split"],
        notes=notes,
        facts=[(name, _fact(value)) for name, value in content["run"].items() if name != "title"],
        num_cases=len(evaluation.cases),
        tiles=_tiles(evaluation),
        near=f"the reference structure and what lies within {evaluation.foreground_radius} voxels of it" if "foreground" in regions else "",
        findings=_findings(evaluation),
        scores=_score_rows(evaluation),
        regions=[figures.REGION_TITLES[region] for region in regions],
        charts=charts,
        curves=curves,
        classes=_class_rows(evaluation, schema),
        case_columns=_case_columns(evaluation),
        cases=_worst_first(content["cases"])[:_MAX_CASES],
        all_cases=len(content["cases"]),
        panels=PANELS,
        examples=slices,
        legend=[(hex_color(schema.palette[c]), schema.names[c]) for c in schema.foreground],
        ramp=ramp,
        floor=f"{1 / schema.num_classes:.2f}",
        definitions=_used_definitions(evaluation),
        version=content["densecal_version"],
    )
    return write_atomically(page, html)


def _save(folder: Path, name: str, figure: Any) -> None:
    write_atomically(folder / f"{name}.png", figures.png_bytes(figure))
    write_atomically(folder / f"{name}.svg", figures.svg_text(figure))


def _score(value: Any) -> str:
    """A number as a reader wants it: three decimals for scores, thousands marked for counts, a dash for undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list):
        items = [_fact(item) for item in value]
        return ("; " if any("," in item for item in items) else ", ").join(items)
    if isinstance(value, float):
        return f"{value:.4g}"
    return {None: "not known", True: "yes", False: "no"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _tiles(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The few numbers at the top."""
    numbers = evaluation.scalars()
    foreground = "foreground" in evaluation.pooled
    wanted = [
        ("dice", "Dice", "mean over cases"),
        ("ece_foreground" if foreground else "ece", "ECE", "near the structure" if foreground else "all voxels"),
        ("ece", "ECE", "all voxels") if foreground else ("ece_classwise", "ECE", "classwise"),
        ("nll_foreground" if foreground else "nll", "NLL", "near the structure" if foreground else "all voxels"),
    ]
    return [{"name": name, "where": where, "value": numbers[key], "definition": evaluation.definitions[key]} for key, name, where in wanted]


def _findings(evaluation: Evaluation) -> list[str]:
    """What the reliability diagram says, in words."""
    sentences = []
    for region, bins in evaluation.bins.items():
        top = bins["top_label"]
        count = np.array(top["count"], dtype=float)
        n = count.sum()
        if n == 0:
            continue
        confidence, accuracy = (np.nan_to_num(np.array(top[key], dtype=float)) for key in ("mean_confidence", "accuracy"))
        mean_confidence, mean_accuracy = float((count * confidence).sum() / n), float((count * accuracy).sum() / n)
        gap = mean_confidence - mean_accuracy
        where = {"all": "Over all voxels", "foreground": "In and near the structure"}[region]
        verdict = (
            "confidence matches accuracy on average"
            if abs(gap) < 0.005
            else f"the model is {'over' if gap > 0 else 'under'}-confident by {100 * abs(gap):.1f} percentage points"
        )
        sentence = f"{where}, {verdict}: mean confidence {100 * mean_confidence:.1f}\N{NO-BREAK SPACE}%, accuracy {100 * mean_accuracy:.1f}\N{NO-BREAK SPACE}%."
        gaps = count / n * np.abs(confidence - accuracy)
        worst = int(gaps.argmax())
        if gaps[worst] > 0:
            low, high = top["edges"][worst : worst + 2]
            sentence += (
                f" The bin that adds most to the error: of the {int(count[worst]):,} voxels predicted with a confidence of {100 * low:.0f} to "
                f"{100 * high:.0f}\N{NO-BREAK SPACE}% (mean {100 * confidence[worst]:.1f}\N{NO-BREAK SPACE}%), {100 * accuracy[worst]:.1f}\N{NO-BREAK SPACE}% are right."
            )
        sentences.append(sentence)
    return sentences


def _score_rows(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Two tables: overlap per case averaged, and pooled measures with one column per region."""
    overlap = []
    for key, name in (("dice", "Dice"), ("iou", "IoU"), ("soft_dice", "Soft Dice")):
        if key in evaluation.mean:
            values = np.array([row[key] for row in evaluation.cases], dtype=float)
            values = values[np.isfinite(values)]
            low, high = (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)
            overlap.append(
                {
                    "name": name,
                    "mean": evaluation.mean[key],
                    "low": low,
                    "high": high,
                    "count": values.size,
                    "definition": evaluation.definitions[key],
                }
            )
    pooled = []
    for key, name, definition in (
        ("ece_top_label", "ECE, top label", "ece"),
        ("ece_classwise", "ECE, classwise", "ece_classwise"),
        ("nll", "Negative log-likelihood", "nll"),
        ("brier", "Brier score", "brier"),
        ("accuracy", "Accuracy", "accuracy"),
        ("num_voxels", "Voxels", ""),
    ):
        values_by_region = [evaluation.pooled[region][key] for region in evaluation.pooled]
        pooled.append(
            {"name": name, "values": values_by_region, "definition": evaluation.definitions.get(definition, "Number of voxels that count.")}
        )
    return {"overlap": overlap, "pooled": pooled}


def _class_rows(evaluation: Evaluation, schema: LabelSchema) -> list[dict[str, Any]]:
    rows = []
    for c, name in enumerate(schema.names):
        errors = []
        for bins in evaluation.bins.values():
            count, confidence, frequency = (np.array(bins["classwise"][key][c], dtype=float) for key in ("count", "mean_confidence", "accuracy"))
            n = count.sum()
            errors.append(float(np.nansum(count * np.abs(confidence - frequency)) / n) if n else math.nan)
        rows.append(
            {
                "name": name,
                "color": hex_color(schema.palette[c]),
                "foreground": c in schema.foreground,
                "dice": evaluation.mean[f"dice/{name}"],
                "iou": evaluation.mean[f"iou/{name}"],
                "count": evaluation.num_defined[f"dice/{name}"],
                "errors": errors,
                "reference": sum(row[f"voxels_reference/{name}"] for row in evaluation.cases),
                "predicted": sum(row[f"voxels_predicted/{name}"] for row in evaluation.cases),
            }
        )
    return rows


def _case_columns(evaluation: Evaluation) -> list[dict[str, str]]:
    columns = [{"key": "dice", "name": "Dice"}]
    if 1 < len(evaluation.foreground) <= 8:
        columns += [{"key": f"dice/{evaluation.class_names[c]}", "name": f"Dice {evaluation.class_names[c]}"} for c in evaluation.foreground]
    columns += [{"key": "iou", "name": "IoU"}]
    for region in evaluation.pooled:
        suffix, where = ("", "all") if region == "all" else (f"_{region}", "near")
        columns += [{"key": f"case_{key}{suffix}", "name": f"{name} {where}"} for key, name in (("ece", "ECE"), ("nll", "NLL"))]
    for column in columns:
        key = column["key"]
        column["definition"] = evaluation.definitions.get(key) or evaluation.definitions[f"{key.split('/')[0]}/<class>"]
    return columns


def _worst_first(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(cases, key=lambda row: (row["dice"] is None, row["dice"], row["case_id"]))


def _example_scores(cases: Sequence[Mapping[str, Any]], case_id: str) -> list[tuple[str, Any]]:
    for row in cases:
        if row["case_id"] == case_id:
            near = "case_ece_foreground" if "case_ece_foreground" in row else "case_ece"
            return [("Dice", row["dice"]), ("ECE near the structure" if near.endswith("foreground") else "ECE", row[near])]
    return []


def _slice(panels: Any) -> dict[str, Any]:
    pictures = [f"data:image/png;base64,{base64.b64encode(panels.png(i)).decode()}" for i in range(len(PANELS))]
    return {"title": panels.title, "pictures": pictures}


def _used_definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    numbers = {**evaluation.scalars(), **evaluation.mean}
    keys = dict.fromkeys(key if "/" not in key else f"{key.split('/')[0]}/<class>" for key in numbers)
    return [(key, evaluation.definitions[key]) for key in keys]
