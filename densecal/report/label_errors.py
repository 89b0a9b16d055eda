"""The page of suspicious labels: cases in order of suspicion, a picture of each finding, and which classes are taken for which."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densecal.data.corrupted_copy import KnownError
from densecal.files import write_atomically
from densecal.label_errors import SCORES, Suspicion, average_precision, precision_at, rank_by
from densecal.labels import LabelSchema
from densecal.pictures import as_array, gray, paint_ignored, paint_label, shown, to_uint8
from densecal.report.html import describe_facts, merge_notes, render
from densecal.report.slices import Example, Panels, plane_title, square_pixels, upright
from densecal.report.summary import hex_color
from densecal.report.tables import Cell, Table, number, text

__all__ = ["FLAGGED_COLORS", "TABLE", "finding_panels", "known_summary", "write_label_errors"]

TABLE = "label_errors.csv"
FLAGGED_COLORS = {"largest region": (255, 90, 20), "other flagged": (70, 120, 190)}
"""Bright and dim, so that they differ without colour, too."""
_MAX_CASES = 100  # rows of the page's table; the file has all
_MAX_PAIRS = 20
_WHOLE = 320
"""A plane of no more pixels along its longer side is shown whole, a larger one around the region."""
_WINDOW = 0.35
"""Of a larger plane at least this share of each side is shown."""


def write_label_errors(
    folder: Path | str,
    schema: LabelSchema,
    suspicions: Sequence[Suspicion],
    score: str,
    confusion: Any,
    findings: Iterable[tuple[Example, Any]],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    known: Mapping[str, KnownError] | None = None,
) -> Path:
    """Write ``label_errors.csv`` and ``report.html``.

    Args:
        folder: Where they go; made if missing.
        schema: Classes and palette.
        suspicions: The cases, worst first.
        score: Name of the score that they are ranked by.
        confusion: Flagged pixels by given and suggested class ``(K, K)``.
        findings: Cases to show, in the order of ``suspicions``, each with its flagged pixels ``(*spatial)``; taken one at a time.
        facts: What was looked at, in the order to show; ``"title"`` heads the page.
        notes: Sentences that a reader must know.
        known: What is known to be wrong, by case, to see how many of it come first.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If the shapes of a finding do not fit.
    """
    folder = Path(folder)
    page = folder / "report.html"
    page.unlink(missing_ok=True)
    dims = next((len(one.region.box) for one in suspicions if one.region), 3)
    element = "voxels" if dims == 3 else "pixels"
    write_atomically(folder / TABLE, _csv(schema, suspicions, score, known))
    by_case = {one.case_id: (rank, one) for rank, one in enumerate(suspicions, start=1)}
    pictures = [_finding(example, flagged, *by_case[example.case_id], schema, score, known or {}) for example, flagged in findings]
    html = render(
        "label_errors",
        title=str(facts.get("title", "Label errors")),
        num_cases=len(suspicions),
        notes=merge_notes(notes, facts),
        findings=_in_short(schema, suspicions, score, as_array(confusion), element, known),
        facts=describe_facts(facts),
        cases=_case_table(schema, suspicions[:_MAX_CASES], len(suspicions), score, element, known),
        pictures=pictures,
        known=_known_tables(suspicions, score, known),
        confusion=_confusion_table(schema, as_array(confusion), element),
        legend=[(hex_color(schema.palette[c]), schema.names[c]) for c in schema.foreground],
        flagged_legend=[(hex_color(color), name) for name, color in FLAGGED_COLORS.items()],
        definitions=[(name, f"{sentence[0].upper()}{sentence[1:]}. In [0, 1]; lower looks worse.") for name, sentence in SCORES.items()]
        + [
            (
                "flagged",
                f"By confident learning (Northcutt et al. 2021) as in cleanlab: those {element} of all cases whose label has the lowest probability, as many as there are "
                "in which another class is predicted with at least the mean probability that it has where it is the label; only where another class is predicted.",
            ),
            ("largest region", f"Connected flagged {element} (diagonals included) with one label and one predicted class."),
        ],
        intervals=False,
    )
    return write_atomically(page, html)


def known_summary(suspicions: Sequence[Suspicion], score: str, known: Mapping[str, KnownError]) -> list[str]:
    """How many of the known errors come first, where each kind of them stands, and how other scores would have ranked them; a line each."""
    wrong = {one.case_id for one in suspicions if one.case_id in known}
    if not wrong:
        return ["none of the known errors is in a case that was looked at"]

    def words(name: str) -> str:
        precision, average = _precisions(suspicions, name, wrong)
        return f"precision at {len(wrong)} {precision:.3f}, average precision {average:.3f}"

    lines = [
        f"{len(wrong)} known error{'s' if len(wrong) != 1 else ''} in {len(suspicions)} cases: {words(score)} (by chance {len(wrong) / len(suspicions):.3f})"
    ]
    lines += [f"{kind}: rank {', '.join(map(str, ranks))}" for kind, ranks in _ranks_by_kind(suspicions, known).items()]
    lines += [f"by {other}: {words(other)}" for other in SCORES if other != score]
    missing = len(set(known) - wrong)
    return [*lines, *([f"{missing} more known errors are in cases that were not looked at"] if missing else [])]


def _precisions(suspicions: Sequence[Suspicion], score: str, wrong: set[str]) -> tuple[float, float]:
    """Precision at the number of wrong ones and average precision."""
    names = [one.case_id for one in rank_by(suspicions, score)]
    return precision_at(names, wrong, len(wrong)), average_precision(names, wrong)


def _ranks_by_kind(suspicions: Sequence[Suspicion], known: Mapping[str, KnownError]) -> dict[str, list[int]]:
    by_kind: dict[str, list[int]] = {}
    for rank, one in enumerate(suspicions, start=1):
        if one.case_id in known:
            by_kind.setdefault(f"{known[one.case_id].kind} {known[one.case_id].severity:g}", []).append(rank)
    return dict(sorted(by_kind.items()))


def _known_tables(suspicions: Sequence[Suspicion], score: str, known: Mapping[str, KnownError] | None) -> list[Table]:
    wrong = {one.case_id for one in suspicions if known and one.case_id in known}
    if not known or not wrong:
        return []
    rows = [(text(name, strong=name == score), *map(number, _precisions(suspicions, name, wrong))) for name in SCORES]
    scores = Table(
        "known_scores", "How early the known errors come", tuple(map(text, ("score", f"precision at {len(wrong)}", "average precision"))), tuple(rows)
    )
    ranks = _ranks_by_kind(suspicions, known)
    kinds = tuple((text(kind), number(len(of_kind)), text(", ".join(map(str, of_kind)))) for kind, of_kind in ranks.items())
    return [
        scores,
        Table("known_kinds", f"Where each kind of them stands, by {score}", tuple(map(text, ("kind and severity", "cases", "ranks"))), kinds),
    ]


def finding_panels(example: Example, flagged: Any, schema: LabelSchema, region: Any = None) -> Panels:
    """Image, label, prediction and flagged pixels in the plane with most of the region; of a large plane what lies around it.

    Args:
        example: The case.
        flagged: Flagged pixels ``(*spatial)``.
        schema: Classes and palette.
        region: The region to show ``(*spatial)``. By default all that is flagged.

    Raises:
        ValueError: If the shapes of image, label and probabilities do not fit, or there are not 2 or 3 spatial dims.
    """
    label, prediction, flagged = as_array(example.label).astype(np.int64), as_array(example.probs).argmax(0), as_array(flagged).astype(bool)
    region = flagged if region is None else as_array(region).astype(bool)
    spatial = prediction.shape
    image = np.zeros(spatial) if example.image is None else as_array(example.image)
    if len(spatial) not in (2, 3) or label.shape != spatial or flagged.shape != spatial or image.shape not in (spatial, (*spatial, 3)):
        raise ValueError(
            f"Expected image, label and flagged pixels of {example.case_id!r} of the shape {spatial} of its probabilities, 2 or 3 spatial dims, "
            f"but got {image.shape}, {label.shape} and {flagged.shape}."
        )
    arrays: list[np.ndarray] = [shown(image), label, prediction, flagged, region]
    spacing, title = list(example.spacing) or [1.0] * len(spatial), ""
    if len(spatial) == 3:
        axis, index = _plane(region if region.any() else np.isin(label, schema.foreground))
        title = plane_title(example.axis_names, axis, index, spatial[axis])
        arrays = [upright(array, axis, index) for array in arrays]
        across, up = (a for a in range(3) if a != axis)
        spacing = [spacing[up], spacing[across]]
    whole, window = arrays[0], _window(arrays[-1])
    picture, label, prediction, flagged, region = square_pixels([array[window] for array in arrays], spacing)
    base = gray(picture)
    marked = np.repeat(0.15 + 0.55 * base[..., None], 3, axis=2)
    for mask, color in zip((region, flagged & ~region), FLAGGED_COLORS.values(), strict=True):
        marked[mask] = np.array(color) / 255
    marked = paint_ignored(marked, label == schema.ignore_index)
    panels = {
        "Image": picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2),
        "Label": paint_label(base, label, schema),
        "Prediction": paint_label(base, prediction, schema),
        "Flagged": marked,
    }
    if window != (slice(None), slice(None)):
        panels = {"Place in the whole": _place(whole, window, spacing), **panels}
    if example.image is None:
        panels = {name: panel for name, panel in panels.items() if name not in ("Place in the whole", "Image")}
    return Panels(title, tuple(to_uint8(panel) for panel in panels.values()), tuple(panels), picture.ndim == 3)


def _plane(mask: np.ndarray) -> tuple[int, int]:
    """Axis and index of the plane that holds most of a mask."""
    amounts = [mask.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    axis = int(np.argmax([amount.max() for amount in amounts]))
    return axis, int(amounts[axis].argmax()) if mask.any() else mask.shape[axis] // 2


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """The part of a plane to show, of its proportions: three times the box around a mask, in the middle as far as the plane reaches; all of a small plane."""
    if max(mask.shape) <= _WHOLE or not mask.any():
        return slice(None), slice(None)
    ends = [np.flatnonzero(mask.any(1 - axis))[[0, -1]].tolist() for axis in range(2)]
    share = max(_WINDOW, *(3 * (last - first + 1) / length for (first, last), length in zip(ends, mask.shape, strict=True)))
    if share >= 1:
        return slice(None), slice(None)
    sides = []
    for (first, last), length in zip(ends, mask.shape, strict=True):
        size = round(share * length)
        start = min(max((first + last + 1 - size) // 2, 0), length - size)
        sides.append(slice(start, start + size))
    return sides[0], sides[1]


def _place(picture: np.ndarray, window: tuple[slice, slice], spacing: Sequence[float]) -> np.ndarray:
    """The whole plane with a frame around the window."""
    frame = np.zeros(picture.shape[:2], bool)
    frame[window] = True
    small, frame = square_pixels([picture, frame], spacing)
    colored = small if small.ndim == 3 else np.repeat(small[..., None], 3, axis=2)
    rows, columns = (np.flatnonzero(frame.any(axis)) for axis in (1, 0))
    inner = np.zeros_like(frame)
    inner[rows[0] + 2 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1] = True
    colored = colored.copy()
    colored[frame & ~inner] = np.array(FLAGGED_COLORS["largest region"]) / 255
    return colored


def _finding(
    example: Example, flagged: Any, rank: int, one: Suspicion, schema: LabelSchema, score: str, known: Mapping[str, KnownError]
) -> dict[str, Any]:
    region = None
    if one.region is not None:
        label, prediction = as_array(example.label), as_array(example.probs).argmax(0)
        inside = np.zeros(prediction.shape, bool)
        inside[tuple(slice(first, last + 1) for first, last in one.region.box)] = True
        region = inside & as_array(flagged) & (label == one.region.given) & (prediction == one.region.suggested)
    panels = finding_panels(example, flagged, schema, region)
    return {
        "case_id": one.case_id,
        "rank": rank,
        "score": f"{score} {number(one.scores[score]).text}",
        "region": _region_words(one, schema),
        "known": known[one.case_id].kind if one.case_id in known else "",
        "title": panels.title,
        "pictures": [(name, panels.data_url(i)) for i, name in enumerate(panels.names)],
    }


def _region_words(one: Suspicion, schema: LabelSchema) -> str:
    if one.region is None:
        return "nothing flagged"
    pair = f"{schema.names[one.region.given]} → {schema.names[one.region.suggested]}"
    return f"{one.num_flagged:,} flagged; largest region {one.region.size:,}: {pair}"


def _in_short(
    schema: LabelSchema, suspicions: Sequence[Suspicion], score: str, confusion: np.ndarray, element: str, known: Mapping[str, KnownError] | None
) -> list[tuple[str, str]]:
    flagged, total = sum(one.num_flagged for one in suspicions), sum(one.num_pixels for one in suspicions)
    cases = sum(one.num_flagged > 0 for one in suspicions)
    share = f" ({100 * flagged / total:.2g} %)" if total else ""
    found = [
        (
            f"{flagged:,} of {total:,} {element} are flagged{share}",
            f"They lie in {cases} of {len(suspicions)} cases. A flag is a reason to look, no proof.",
        )
    ]
    if confusion.any():
        given, suggested = np.unravel_index(int(confusion.argmax()), confusion.shape)
        pair = f"{schema.names[given]}, where the models see {schema.names[suggested]}"
        found.append(
            (
                f"Most of them are labelled {pair}",
                f"{confusion[given, suggested]:,} {element}, {100 * confusion.max() / flagged:.0f} % of the flagged.",
            )
        )
    if known is not None:
        first = known_summary(suspicions, score, known)[0]
        found.append((first[0].upper() + first[1:], "Of the cases that come first, as many as there are errors, this share has one."))
    return found


def _case_table(
    schema: LabelSchema, suspicions: Sequence[Suspicion], total: int, score: str, element: str, known: Mapping[str, KnownError] | None
) -> Table:
    header = ["case", "rank", score, f"flagged {element}", "largest region", "label", "prediction", *(["known error"] if known is not None else [])]
    rows = []
    for rank, one in enumerate(suspicions, start=1):
        region = one.region
        cells: list[Cell] = [
            text(one.case_id),
            number(rank),
            number(one.scores[score]),
            number(one.num_flagged),
            number(region.size if region else None),
        ]
        cells += [text(schema.names[c] if region else "") for c in ((region.given, region.suggested) if region else (0, 0))]
        if known is not None:
            cells.append(text(known[one.case_id].kind if one.case_id in known else ""))
        rows.append(tuple(cells))
    note = f"The first {len(rows)} of {total}; {TABLE} has all of them." if len(rows) < total else ""
    return Table("cases", "Cases, worst first", tuple(text(name) for name in header), tuple(rows), sorted_by=1, note=note)


def _confusion_table(schema: LabelSchema, confusion: np.ndarray, element: str) -> Table:
    pairs = sorted(((int(n), int(a), int(b)) for (a, b), n in np.ndenumerate(confusion) if n), reverse=True)
    total = max(sum(n for n, _, _ in pairs), 1)
    rows = tuple(
        (text(f"{schema.names[a]} → {schema.names[b]}"), number(n), Cell(f"{100 * n / total:.1f} %", n / total)) for n, a, b in pairs[:_MAX_PAIRS]
    )
    header = tuple(text(name) for name in ("label → prediction", f"flagged {element}", "share of the flagged"))
    note = f"The {len(rows)} most frequent of {len(pairs)} pairs." if len(rows) < len(pairs) else ""
    return Table("confusion", "Which class is taken for which", header, rows, note=note)


def _csv(schema: LabelSchema, suspicions: Sequence[Suspicion], score: str, known: Mapping[str, KnownError] | None) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    more = ["known_error"] if known is not None else []
    writer.writerow(
        ["case_id", "rank", "score", "num_pixels", "num_flagged", "region_size", "region_box", "region_given", "region_suggested", *SCORES, *more]
    )
    for rank, one in enumerate(suspicions, start=1):
        region = one.region
        place = (
            [region.size, " ".join(f"{first}:{last}" for first, last in region.box), schema.names[region.given], schema.names[region.suggested]]
            if region
            else [0, "", "", ""]
        )
        values = [f"{one.scores[name]:.6f}" for name in SCORES]
        kind = [known[one.case_id].kind if one.case_id in known else ""] if known is not None else []
        writer.writerow([one.case_id, rank, f"{one.scores[score]:.6f}", one.num_pixels, one.num_flagged, *place, *values, *kind])
    return stream.getvalue()
