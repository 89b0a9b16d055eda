"""Look at every file of a data set before anything is trained on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.medium import medium_of

__all__ = ["CaseFacts", "DataProblems", "Problem", "find_problems", "survey"]

_SHARE = 1e-3
"""Shares stored as float16 or scaled integers keep to [0, 1] within this."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one case; its text is one line that names the file and the repair."""

    case_id: str
    file: Path
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


class DataProblems(ValueError):
    """A data set that must not be trained on as it is. The text lists its problems, one a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


@dataclass
class CaseFacts:
    """What was seen of one case.

    Args:
        case_id: The case.
        shape: Voxels per axis; empty if the image cannot be read.
        spacing: Voxel size in mm per axis.
        label_voxels: Voxels per class (fractional for soft labels).
        ignored_voxels: Voxels without a class.
        problems: At most one per file.
    """

    case_id: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    label_voxels: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    ignored_voxels: float = 0.0
    problems: list[Problem] = field(default_factory=list)


def find_problems(cases: Sequence[Case], card: DataCard, progress: bool = False, root: Path | None = None) -> list[Problem]:
    """Read every file and list what is wrong with it.

    Found are: files that are missing, unreadable or damaged; image and label of different shape or place in space; label values that are not whole or not among the
    card's classes; colours that are not among the card's; soft labels that do not sum to 1; NaN and infinite voxels; images of one value; a wrong number of channels;
    cases listed twice or with two files; no cases.

    Args:
        cases: Cases to read.
        card: What the files should hold.
        progress: Show a progress bar.
        root: Folder to name where there are no cases.

    Returns:
        The problems, at most one per file, in the order of the cases. Empty for a data set that can be used.
    """
    if not cases:
        where, keys = "imagesTr and labelsTr, or dataset.json", "the card's `layout`"
        if card.layout == "paired":
            where, keys = f"{card.image_files} and {' or '.join(card.label_files)}", "the card's `image_files` and `label_files`"
        folder = root or Path(card.root or card.folder or card.name)
        return [Problem("", folder, f"found no cases in the layout {card.layout!r} ({where}). Check data.root and {keys}.")]
    return [problem for facts in survey(cases, card, progress) for problem in facts.problems]


def survey(cases: Sequence[Case], card: DataCard, progress: bool = False) -> list[CaseFacts]:
    """Shape, spacing, label counts and problems of each case, read by several threads."""
    inspect = medium_of(card).inspector(card)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # each holds a case in memory, and more than the cores gain nothing
        results: Iterable[CaseFacts] = pool.map(inspect, cases)
        facts = list(tqdm(results, total=len(cases), desc="Checking data", unit="case", disable=not progress, leave=False))
    first: dict[str, Case] = {}
    named: set[str] = set()
    for case, fact in zip(cases, facts, strict=True):
        if case.id not in first:
            first[case.id] = case
        elif case.id not in named:
            named.add(case.id)
            fact.problems.append(_repeated(case, first[case.id]))
    return facts


def _repeated(case: Case, twin: Case) -> Problem:
    """Two cases of one name."""
    kind, file, other = "image", case.image[0], twin.image[0]
    if file == other and case.label is not None and twin.label is not None and case.label != twin.label:
        kind, file, other = "label", case.label, twin.label
    if file != other:
        return Problem(case.id, file, f"is a second {kind} of the case {case.id!r}, beside {other}. Rename or remove one of them.")
    places = f" ({twin.listed} and {case.listed})" if case.listed else ""
    return Problem(case.id, file, f"is listed more than once{places}. Keep one entry, or it may be trained and tested on.")


class BadFileError(Exception):
    """What is wrong with a file, without its name."""


def first_line(error: Exception) -> str:
    """Kind and first line of an error, to be put in brackets."""
    return f"{type(error).__name__}: {str(error).strip() or 'no detail'}".splitlines()[0].rstrip(".")


def check_present(path: Path, case: Case, card: DataCard) -> None:
    """Refuse a file of the case that is not there.

    Raises:
        BadFileError: If so, with the place in a list that names it, and the other places that were looked at.
    """
    if path.is_file():
        return
    others = (
        " So are the other files that `label_files` allows." if path == case.label and card.layout == "paired" and len(card.label_files) > 1 else ""
    )
    listed = f", though {case.listed} names it" if case.listed else ""
    raise BadFileError(f"is missing{listed}.{others} Restore the file, or leave the case out.")


def check_shares(values: NDArray[np.float32]) -> None:
    """Refuse shares of a companion that are none.

    Raises:
        BadFileError: If some are not finite or lie outside [0, 1].
    """
    if not np.isfinite(values).all():
        raise BadFileError("holds NaN or infinite shares. Write it again.")
    if values.min() < -_SHARE or values.max() > 1 + _SHARE:
        raise BadFileError(f"expected shares in [0, 1], but got {values.min():.4g} to {values.max():.4g}.")
