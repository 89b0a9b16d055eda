"""Several models on the same cases, side by side."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from densecal.files import write_atomically
from densecal.labels import LabelSchema
from densecal.metrics.evaluation import Evaluation
from densecal.report import measures, tables
from densecal.report.figures import comparison_chart
from densecal.report.html import describe_facts, merge_notes, render
from densecal.report.reliability import REGION_TITLES
from densecal.report.summary import hex_color, jsonable, named_cases, provenance, to_json
from densecal.report.tables import Cell, Table, number, text

__all__ = ["write_comparison"]

Difference = tuple[float, float, float]

_MAX_CASES = 100  # rows of the page's case table; each model's cases.csv has all


def write_comparison(
    folder: Path | str,
    evaluations: Mapping[str, Evaluation],
    schema: LabelSchema,
    facts: Mapping[str, Any],
    *,
    differences: Mapping[str, Mapping[str, Difference]] | None = None,
    notes: Sequence[str] = (),
    case_ids: Sequence[str] | None = None,
) -> Path:
    """Write ``comparison.json``, ``table.md``, ``table.tex``, ``table.csv``, ``figures/comparison.{png,svg}`` and ``report.html``.

    The page links each model to ``<name>/report.html``, where :func:`densecal.report.write_report` puts it when given ``folder / name``.

    Args:
        folder: Where to write; made if missing.
        evaluations: Results by the name of the model, the one to compare with first. Names are names of folders.
        schema: Classes and palette of all of them.
        facts: What was run; as for ``write_report``.
        differences: Model -> key of ``Evaluation.scalars`` or ``mean`` -> (its value minus the first model's, lower and upper end of the 95 % interval,
            paired over cases).
        notes: Sentences that a reader must know before the numbers.
        case_ids: Name of each case, by ``case_index``. By default the number itself.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If there is no evaluation, a name cannot be a folder, classes are not those of ``schema``, ``differences`` is not about the other
            models, or ``case_ids`` does not name every case.
    """
    _check(evaluations, schema, differences or {})
    folder = Path(folder)
    page = folder / "report.html"
    page.unlink(missing_ok=True)

    differences = {name: dict(differences[name]) for name in evaluations if differences and name in differences}
    notes = merge_notes([*notes, *_unlike_cases(evaluations)], facts)
    content = _content(evaluations, schema, facts, notes, differences)
    write_atomically(folder / "comparison.json", to_json(content))
    keys = _main_keys(evaluations)
    main = {name: {key: found[key] for key in (*keys, "signed_ce") if key in found} for name, found in differences.items()}
    parts = {
        "models": _model_table(evaluations, keys),
        "differences": _difference_table(evaluations, main),
        "classes": _class_table(evaluations, schema),
    }
    filled = [table for table in parts.values() if table.rows]
    write_atomically(folder / "table.md", "\n".join(tables.markdown(table) for table in filled))
    write_atomically(folder / "table.tex", "\n".join(tables.latex(table) for table in filled))
    write_atomically(folder / "table.csv", _csv(evaluations, differences))
    region = "foreground" if all("foreground" in evaluation.bins for evaluation in evaluations.values()) else "all"
    chart = comparison_chart(evaluations, region)
    chart.save(folder / "figures")

    html = render(
        "comparison",
        title=str(facts.get("title", f"Comparison of {len(evaluations)} models")),
        notes=notes,
        findings=_findings(evaluations, keys, main),
        facts=describe_facts(content["run"]),
        num_cases=max(len(evaluation.cases) for evaluation in evaluations.values()),
        num_models=len(evaluations),
        split=content["split"],
        region=REGION_TITLES[region].lower(),
        charts=[Markup(svg) for svg in chart.inline()],
        **parts,
        measures=_measure_table(evaluations),
        all_differences=_all_differences_table(evaluations, differences),
        cases=_case_table(evaluations, case_ids),
        definitions=measures.used_definitions(list(evaluations.values())),
        intervals=any(evaluation.intervals for evaluation in evaluations.values()),
    )
    return write_atomically(page, html)


def _check(evaluations: Mapping[str, Evaluation], schema: LabelSchema, differences: Mapping[str, Any]) -> None:
    if not evaluations:
        raise ValueError("Expected at least one evaluation to compare, but got none.")
    for name, evaluation in evaluations.items():
        if not name or name.startswith(".") or set(name) & set("/\\"):
            raise ValueError(
                f"Expected model names that can be folders beside the page, without slashes and not starting with a dot, but got {name!r}."
            )
        if evaluation.class_names != schema.names:
            raise ValueError(f"Expected the evaluation of {name!r} with the classes of the schema, {schema.names}, but got {evaluation.class_names}.")
    first, *others = evaluations
    if unknown := [name for name in differences if name not in others]:
        raise ValueError(f"Expected `differences` of {others} from {first!r}, the first model, but got some of {unknown}.")


def _unlike_cases(evaluations: Mapping[str, Evaluation]) -> list[str]:
    seen = {tuple((row["case_index"], row["num_voxels"]) for row in evaluation.cases) for evaluation in evaluations.values()}
    return ["The models were not tested on the same cases: their numbers cannot be compared with one another."] if len(seen) > 1 else []


def _content(
    evaluations: Mapping[str, Evaluation], schema: LabelSchema, facts: Mapping[str, Any], notes: Sequence[str], differences: Mapping[str, Any]
) -> dict[str, Any]:
    models = {
        name: {
            "num_cases": len(evaluation.cases),
            "settings": asdict(evaluation.settings),
            "mean": evaluation.mean,
            "num_defined": evaluation.num_defined,
            "pooled": evaluation.pooled,
            "intervals": evaluation.intervals,
        }
        for name, evaluation in evaluations.items()
    }
    definitions = dict(measures.used_definitions(list(evaluations.values())))
    return jsonable(
        {
            **provenance(schema, facts, notes),
            "definitions": definitions,
            "models": models,
            "compared_with": next(iter(evaluations)),
            "differences": {
                name: {key: dict(zip(("difference", "low", "high"), values, strict=True)) for key, values in found.items()}
                for name, found in differences.items()
            },
        }
    )


def _main_keys(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """The columns of the first table: few, and what a paper would print."""
    there = {key for evaluation in evaluations.values() for key in measures.all_numbers(evaluation)}
    region = "_foreground" if "ece_foreground" in there else ""
    structure = _leading(evaluations)[0] == "dice"
    overlap = ["dice", "nsd", "hd95"] if structure else ["iou_dataset", "iou_image", "iou_class", "accuracy"]
    calibration = ["ece_foreground", "ece"] if region else ["ece", "ece_boundary"]
    wanted = [*overlap, *calibration, f"nll{region}", f"brier{region}", f"aurc{region}"]
    return [key for key in wanted if key in there]


def _leading(evaluations: Mapping[str, Evaluation]) -> tuple[str, str]:
    """Keys of the overlap that comes first, of all cases and of one."""
    return next(iter(evaluations.values())).leading


def _value(evaluation: Evaluation, key: str, **options: Any) -> Cell:
    value = measures.all_numbers(evaluation).get(key)
    return number(value, evaluation.intervals.get(key), digits=measures.measure(key).digits, **options)


def _best(evaluations: Mapping[str, Evaluation], key: str) -> list[str]:
    """Names of the best models, none where there is nothing to choose."""
    values = {name: measures.all_numbers(evaluation).get(key, math.nan) for name, evaluation in evaluations.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    better = measures.measure(key).better
    if len(values) < 2 or not better:
        return []
    top = max(values.values()) if better == "higher" else min(values.values())
    return [name for name, value in values.items() if value == top]


def _model_table(evaluations: Mapping[str, Evaluation], keys: Sequence[str]) -> Table:
    best = {key: _best(evaluations, key) for key in keys}
    rows = tuple(
        (text(name, href=f"{quote(name)}/report.html"), *(_value(evaluation, key, strong=name in best[key]) for key in keys))
        for name, evaluation in evaluations.items()
    )
    return Table("models", "Models side by side", _header("Model", keys, evaluations), rows, note="The best of each column is bold.")


def _difference_table(evaluations: Mapping[str, Evaluation], differences: Mapping[str, Mapping[str, Difference]]) -> Table:
    first = next(iter(evaluations))
    keys = list(dict.fromkeys(key for found in differences.values() for key in found))
    rows = tuple(
        (
            text(name),
            *(_difference(key, found.get(key)) for key in keys),
        )
        for name, found in differences.items()
    )
    note = "Differences with 95 % intervals, paired over cases; words where an interval does not include 0."
    return Table("differences", f"Difference from {first}", _header("Model", keys, evaluations), rows, note=note)


def _all_differences_table(evaluations: Mapping[str, Evaluation], differences: Mapping[str, Mapping[str, Difference]]) -> Table:
    """One row per measure, one column per model."""
    keys = dict.fromkeys(key for found in differences.values() for key in found)
    rows = tuple((text(measures.measure(key).name), *(_difference(key, found.get(key)) for found in differences.values())) for key in keys)
    first = next(iter(evaluations))
    return Table("all_differences", f"Difference from {first}, all measures", (text("Measure"), *(text(name) for name in differences)), rows)


def _difference(key: str, difference: Difference | None) -> Cell:
    if difference is None:
        return number(None)
    return number(difference[0], difference[1:], digits=measures.measure(key).digits, signed=True, remark=_verdict(key, difference))


def _verdict(key: str, difference: Difference) -> str:
    """In a word, where the interval does not include 0."""
    _, low, high = difference
    if not (low > 0 or high < 0):
        return ""
    better = measures.measure(key).better
    return "differs" if not better else "better" if (low > 0) == (better == "higher") else "worse"


def _class_table(evaluations: Mapping[str, Evaluation], schema: LabelSchema) -> Table:
    lead, _ = _leading(evaluations)
    keys = {name: f"{lead}/{name}" for name in schema.names}
    best = {name: _best(evaluations, key) for name, key in keys.items()}
    rows = tuple(
        (
            text(name, color=hex_color(schema.palette[c]), remark="" if c in schema.foreground else "not in means"),
            *(_value(evaluation, keys[name], strong=model in best[name]) for model, evaluation in evaluations.items()),
        )
        for c, name in enumerate(schema.names)
    )
    caption = "Dice per class" if lead == "dice" else "IoU per class, whole data set"
    return Table("classes", caption, (text("Class"), *(text(name) for name in evaluations)), rows)


def _measure_table(evaluations: Mapping[str, Evaluation]) -> Table:
    keys = dict.fromkeys(key for evaluation in evaluations.values() for key in measures.all_numbers(evaluation) if "/" not in key)
    rows = []
    for key in keys:
        sentence = next(filter(None, (measures.definition(evaluation, key) for evaluation in evaluations.values())), "")
        best = _best(evaluations, key)
        cells = (_value(evaluation, key, strong=name in best) for name, evaluation in evaluations.items())
        rows.append((text(measures.measure(key).name, definition=sentence), *cells))
    return Table("measures", "All measures", (text("Measure"), *(text(name) for name in evaluations)), tuple(rows))


def _case_table(evaluations: Mapping[str, Evaluation], case_ids: Sequence[str] | None) -> Table:
    """Overlap of every model per case, the first model's worst first."""
    _, lead = _leading(evaluations)
    named: dict[str, dict[str, float]] = {}
    for name, evaluation in evaluations.items():
        for row in named_cases(evaluation, case_ids):
            named.setdefault(row["case_id"], {})[name] = row[lead]
    first = next(iter(evaluations))

    def rank(item: tuple[str, dict[str, float]]) -> tuple[bool, float]:
        value = item[1].get(first, math.nan)
        return not math.isfinite(value), value if math.isfinite(value) else 0.0

    shown = sorted(named.items(), key=rank)[:_MAX_CASES]
    rows = tuple((text(case_id), *(number(values.get(name)) for name in evaluations)) for case_id, values in shown)
    note = f"{len(rows)} of {len(named)} cases; each model's cases.csv has all." if len(rows) < len(named) else ""
    caption = f"{measures.MEASURES[lead].name} per case"
    return Table("cases", caption, (text("Case"), *(text(name) for name in evaluations)), rows, sorted_by=1, note=note)


def _header(first: str, keys: Iterable[str], evaluations: Mapping[str, Evaluation]) -> tuple[Cell, ...]:
    evaluation = next(iter(evaluations.values()))
    return (text(first), *(text(measures.measure(key).short, definition=measures.definition(evaluation, key)) for key in keys))


def _csv(evaluations: Mapping[str, Evaluation], differences: Mapping[str, Mapping[str, Difference]]) -> str:
    """One row per model and number, in full precision; an undefined number is an empty field."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["model", "measure", "value", "low", "high", "difference", "difference_low", "difference_high"])
    for name, evaluation in evaluations.items():
        for key, value in measures.all_numbers(evaluation).items():
            interval = evaluation.intervals.get(key, (math.nan,) * 2)
            difference = differences.get(name, {}).get(key, (math.nan,) * 3)
            writer.writerow([name, key, *("" if not math.isfinite(v) else v for v in (value, *interval, *difference))])
    return stream.getvalue()


def _findings(
    evaluations: Mapping[str, Evaluation], keys: Sequence[str], differences: Mapping[str, Mapping[str, Difference]]
) -> list[tuple[str, str]]:
    """Who is best in what, and which differences are more than chance."""
    found = []
    for key in (key for key in (_leading(evaluations)[0], "ece_foreground" if "ece_foreground" in keys else "ece") if key in keys):
        if len(best := _best(evaluations, key)) == 1:
            known, numbers = measures.measure(key), {name: _value(evaluation, key).text for name, evaluation in evaluations.items()}
            others = "; ".join(f"{name} {value}" for name, value in numbers.items() if name != best[0])
            found.append((f"{known.name}: {best[0]} is {'highest' if known.better == 'higher' else 'lowest'}", f"{numbers[best[0]]}; {others}."))
    first = next(iter(evaluations))
    for name, changes in differences.items():
        words: dict[str, list[str]] = {"better": [], "worse": [], "differs": [], "": []}
        for key, change in changes.items():
            words[_verdict(key, change)].append(measures.measure(key).name)
        sentences = [f"{(verdict or 'no clear difference').capitalize()}: {'; '.join(names)}." for verdict, names in words.items() if names]
        found.append((f"{name} compared with {first}, case by case", " ".join(sentences)))
    return found
