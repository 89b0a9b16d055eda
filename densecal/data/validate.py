"""Look at every file of a data set before anything is trained on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.volumes import corner_shift, read_nifti

__all__ = ["CaseFacts", "DataProblems", "Problem", "find_problems", "survey"]

_WHOLE = 1e-3
"""A label this near to a whole number is one: files may store labels scaled."""
_SUM = 1e-3
"""Soft labels stored as float32 or scaled integers sum to 1 within this."""
_SHIFT = 0.1
"""Image and label may disagree about a corner's place by this many voxels; headers store single precision."""


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
    card's classes; soft labels that do not sum to 1; NaN and infinite voxels; images of one value; a wrong number of channels; cases listed twice; no cases.

    Args:
        cases: Cases to read.
        card: What the files should hold.
        progress: Show a progress bar.
        root: Folder to name where there are no cases.

    Returns:
        The problems, at most one per file, in the order of the cases. Empty for a data set that can be used.
    """
    if not cases:
        where = "imagesTr and labelsTr, or dataset.json" if card.layout == "decathlon" else "images and labels"
        folder = root or Path(card.root or card.folder or card.name)
        return [Problem("", folder, f"found no cases in the layout {card.layout!r} ({where}). Check data.root and the card's `layout`.")]
    return [problem for facts in survey(cases, card, progress) for problem in facts.problems]


def survey(cases: Sequence[Case], card: DataCard, progress: bool = False) -> list[CaseFacts]:
    """Shape, spacing, label counts and problems of each case, read by several threads."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # each holds a case in memory, and more than the cores gain nothing
        results: Iterable[CaseFacts] = pool.map(lambda case: _inspect(case, card), cases)
        facts = list(tqdm(results, total=len(cases), desc="Checking data", unit="case", disable=not progress, leave=False))
    counts = Counter(case.id for case in cases)
    for case, fact in zip(cases, facts, strict=True):
        if counts.pop(case.id, 1) > 1:
            fact.problems.append(Problem(case.id, case.image[0], "is listed more than once. Keep one entry, or it may be trained and tested on."))
    return facts


class _BadFileError(Exception):
    pass


def _inspect(case: Case, card: DataCard) -> CaseFacts:
    facts = CaseFacts(case.id)
    images: list[Any] = []
    for path in case.image:
        try:
            image = _read(path)
            _check_image(image, card, channels=card.image_channels if len(case.image) == 1 else 1)
            if images:
                _check_same_grid(images[0], image, case.image[0].name)
            images.append(image)
        except _BadFileError as error:
            facts.problems.append(Problem(case.id, path, str(error)))
    if images:
        facts.shape = tuple(int(n) for n in images[0].shape[:3])
        facts.spacing = tuple(float(z) for z in images[0].header.get_zooms()[:3])
    if case.label is None:
        facts.problems.append(Problem(case.id, case.image[0], "has no label. List one beside it, or leave the case out."))
        return facts
    try:
        label = _read(case.label)
        if images:
            _check_same_grid(images[0], label, case.image[0].name)
        facts.label_voxels, facts.ignored_voxels = _count_labels(label, card)
    except _BadFileError as error:
        facts.problems.append(Problem(case.id, case.label, str(error)))
    return facts


def _read(path: Path) -> Any:
    if not path.is_file():
        raise _BadFileError("is missing. Restore the file, or leave the case out.")
    try:
        image = read_nifti(path)
        image.get_fdata(dtype=np.float32)  # kept by nibabel; shows here whether the voxels can be read
    except Exception as error:
        raise _BadFileError(f"cannot be read ({_first_line(error)}). Copy or download it again.") from error
    if image.ndim < 3 or min(image.shape) < 1:
        raise _BadFileError(f"expected a volume with three axes, but got shape {image.shape}.")
    return image


def _check_image(image: Any, card: DataCard, channels: int) -> None:
    found = int(np.prod(image.shape[3:]))
    if found != channels:
        raise _BadFileError(
            f"expected {channels} channel(s), as `image_channels` says, but got {found} (shape {image.shape}). Mend the card or the file."
        )
    values = image.get_fdata(dtype=np.float32)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise _BadFileError(f"holds {bad} NaN or infinite voxel(s). Replace them, with np.nan_to_num for example.")
    if values.min() == values.max():
        raise _BadFileError(f"is empty: every voxel is {values.flat[0]:g}. Export it again, or leave the case out.")


def _check_same_grid(image: Any, other: Any, image_name: str) -> None:
    if image.shape[:3] != other.shape[:3]:
        raise _BadFileError(f"has the shape {other.shape[:3]}, but {image_name} has {image.shape[:3]}. Resample one onto the grid of the other.")
    if not np.isfinite(image.affine).all() or not np.isfinite(other.affine).all():
        raise _BadFileError(f"its affine or that of {image_name} has NaN or infinite entries. Copy a valid affine into both headers.")
    shift = corner_shift(image.shape[:3], image.affine, other.affine)
    if shift > _SHIFT * min(image.header.get_zooms()[:3]):
        raise _BadFileError(
            f"lies elsewhere in space than {image_name}: the affines differ by up to {shift:.3g} mm. Copy the right affine into both headers."
        )


def _count_labels(label: Any, card: DataCard) -> tuple[NDArray[np.float64], float]:
    classes = len(card.classes)
    values = label.get_fdata(dtype=np.float32)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise _BadFileError(f"holds {bad} NaN or infinite voxel(s). Replace them with a class or the ignore label {card.ignore_index}.")
    if card.soft_labels:
        return _count_soft(values, classes)
    if values.size != np.prod(values.shape[:3]):
        raise _BadFileError(
            f"expected one label per voxel, but got shape {values.shape}. If these are shares per class, set `soft_labels: true` in the card."
        )
    whole = np.rint(values)
    if fractional := int((np.abs(values - whole) > _WHOLE).sum()):
        raise _BadFileError(f"holds {fractional} label(s) that are not whole numbers. Resample labels with nearest neighbour.")
    whole = whole[whole != card.ignore_index]
    ignored = float(values.size - whole.size)
    outside = whole[(whole < 0) | (whole >= classes)]
    if outside.size:
        found = ", ".join(f"{int(v)} ({n} voxels)" for v, n in zip(*np.unique(outside, return_counts=True), strict=True))
        raise _BadFileError(
            f"has labels outside the card's classes 0 to {classes - 1}: {found}. Add the class to the card, or map it to `ignore_index`."
        )
    return np.bincount(whole.astype(np.int64), minlength=classes).astype(float), ignored


def _count_soft(values: NDArray[np.float32], classes: int) -> tuple[NDArray[np.float64], float]:
    if values.ndim != 4 or values.shape[3] != classes:
        raise _BadFileError(f"expected soft labels (X, Y, Z, {classes}), one share per class of the card, but got shape {values.shape}.")
    if values.min() < -_SUM or values.max() > 1 + _SUM:
        raise _BadFileError(f"expected shares in [0, 1], but got {values.min():.4g} to {values.max():.4g}.")
    total = values.sum(axis=3)
    labelled = np.abs(total) > _SUM
    if wrong := int((np.abs(total[labelled] - 1) > _SUM).sum()):
        raise _BadFileError(f"expected shares that sum to 1 (or to 0 where there is no label), but {wrong} voxel(s) do not. Divide by their sum.")
    return values[labelled].sum(axis=0, dtype=np.float64), float(labelled.size - labelled.sum())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no detail'}".splitlines()[0].rstrip(".")
