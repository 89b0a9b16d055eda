"""``summary.json`` and ``cases.csv``: the results for programs."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import densecal
from densecal.labels import LabelSchema
from densecal.metrics.class_prior import ClassPriorBaseline
from densecal.metrics.evaluation import Evaluation

__all__ = ["SCHEMA_VERSION", "cases_csv", "hex_color", "jsonable", "named_cases", "provenance", "summary", "to_json"]

SCHEMA_VERSION = 1
"""Raised when a key of ``summary.json`` changes its meaning or goes."""


def summary(
    evaluation: Evaluation,
    schema: LabelSchema,
    facts: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    case_ids: Sequence[str] | None = None,
    baseline: ClassPriorBaseline | None = None,
) -> dict[str, Any]:
    """Content of ``summary.json``.

    Keys of the result, all present:

    - ``schema_version``: 1.
    - ``densecal_version``: version of the package that wrote it.
    - ``run``: the facts of the run as given (data set, licence, seeds, model, loss, commit, ...).
    - ``notes``: sentences that a reader must know.
    - ``split``: which cases were evaluated, as given in the facts, else null.
    - ``classes``: per class ``index``, ``name``, ``color`` (``#rrggbb``), ``foreground`` (whether foreground means count it).
    - ``settings``: how it was measured, see :class:`densecal.metrics.results.Settings`, and ``ignore_index``.
    - ``definitions``: key -> one sentence that says how the number is computed.
    - ``mean``: scores per case averaged over cases; ``num_defined``: how many cases have the score.
    - ``fine_grained``: accuracy, IoU and Dice over the data set, per image, per class and of the worst images.
    - ``pooled``: per region (``all``, ``foreground``, ``boundary``) ``ece_top_label``, ``ece_classwise``, ``nll``, ``brier``, ``accuracy``, ..., ``num_voxels``.
    - ``baseline``: what a model scores that knows the class shares alone: ``class_shares``, by class or region, and ``scores`` by the keys of ``Evaluation.scalars``; null
      where the shares are not known.
    - ``intervals``: key -> ``[low, high]``, 95 % bootstrap interval over cases of the number of that key in ``mean``, ``fine_grained`` or, pooled, as
      ``Evaluation.scalars`` names it (``ece_foreground`` is ``ece_top_label`` of ``pooled.foreground``); may be empty.
    - ``curves``: ``risk_coverage``, ``risk_coverage_foreground``, ``boundary_distance``, those that there are.
    - ``bins``: per region and kind (``top_label``, ``classwise``) ``edges``, ``count``, ``mean_confidence``, ``accuracy``.
    - ``cases``: one row per case, ``case_id`` and its scores.

    Undefined numbers are null. ``docs/summary.md`` describes every key.

    Args:
        evaluation: The results.
        schema: The classes.
        facts: Facts of the run; values that JSON does not know are written as text.
        notes: Sentences to put beside the numbers.
        case_ids: Name of each case, by ``case_index``. By default the number itself.
        baseline: The class-prior baseline.

    Returns:
        Plain dicts, lists, strings and finite numbers.
    """
    content = {
        **provenance(schema, facts, notes),
        "settings": asdict(evaluation.settings) | {"ignore_index": schema.ignore_index},
        "definitions": evaluation.definitions,
        "mean": evaluation.mean,
        "num_defined": evaluation.num_defined,
        "fine_grained": evaluation.fine_grained,
        "pooled": evaluation.pooled,
        "baseline": None if baseline is None else asdict(baseline),
        "intervals": evaluation.intervals,
        "curves": evaluation.curves,
        "bins": evaluation.bins,
        "cases": named_cases(evaluation, case_ids),
    }
    return jsonable(content)


def provenance(schema: LabelSchema, facts: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """What every file of results starts with: who wrote it, what was run, which classes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "densecal_version": densecal.__version__,
        "run": {key: value for key, value in facts.items() if key not in ("notes", "split")},
        "notes": list(notes),
        "split": facts.get("split"),
        "classes": [
            {"index": c, "name": name, "color": hex_color(schema.palette[c]), "foreground": c in schema.foreground}
            for c, name in enumerate(schema.names)
        ],
    }


def named_cases(evaluation: Evaluation, case_ids: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows with ``case_id`` first.

    Raises:
        ValueError: If ``case_ids`` has no name for a case.
    """
    last = max((row["case_index"] for row in evaluation.cases), default=-1)
    if case_ids is not None and last >= len(case_ids):
        raise ValueError(f"Expected `case_ids` to name every case, but got {len(case_ids)} names for case_index up to {last}.")
    return [{"case_id": str(row["case_index"]) if case_ids is None else str(case_ids[row["case_index"]]), **row} for row in evaluation.cases]


def cases_csv(cases: Sequence[Mapping[str, Any]]) -> str:
    """One row per case; an undefined number is an empty field.

    Example:
        >>> print(cases_csv([{"case_id": "a", "dice": 0.5}, {"case_id": "b", "dice": float("nan")}]).replace(chr(13), ""), end="")
        case_id,dice
        a,0.5
        b,
    """
    columns = list(dict.fromkeys(key for row in cases for key in row)) or ["case_id"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in cases:
        writer.writerow({key: "" if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()})
    return text.getvalue()


def jsonable(value: Any) -> Any:
    """Plain JSON values: NaN and infinity become null, numpy and torch scalars numbers, anything else text.

    Example:
        >>> from pathlib import Path
        >>> jsonable({"dice": float("nan"), "path": Path("runs"), "seeds": (1, 2)})
        {'dice': None, 'path': 'runs', 'seeds': [1, 2]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, torch
        return jsonable(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, (datetime.date, datetime.datetime)) else str(value)


def to_json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def hex_color(rgb: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
