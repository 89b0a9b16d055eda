"""What is wrong with the files of a volume and its label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.validate import BadFileError, CaseFacts, Problem, check_present, check_shares, first_line
from densecal.data.volumes.nifti import corner_shift, read_nifti

__all__ = ["inspect"]

_WHOLE = 1e-3
"""A label this near to a whole number is one: files may store labels scaled."""
_SUM = 1e-3
"""Soft labels stored as float32 or scaled integers sum to 1 within this."""
_SHIFT = 0.1
"""Image and label may disagree about a corner's place by this many voxels; headers store single precision."""


def inspect(case: Case, card: DataCard) -> CaseFacts:
    facts = CaseFacts(case.id)
    images: list[Any] = []
    for path in case.image:
        try:
            image = _read(path, case, card)
            _check_image(image, card, channels=card.image_channels if len(case.image) == 1 else 1)
            if images:
                _check_same_grid(images[0], image, case.image[0].name)
            images.append(image)
        except BadFileError as error:
            facts.problems.append(Problem(case.id, path, str(error)))
    if images:
        facts.shape = tuple(int(n) for n in images[0].shape[:3])
        facts.spacing = tuple(float(z) for z in images[0].header.get_zooms()[:3])
    if case.label is None:
        facts.problems.append(Problem(case.id, case.image[0], "has no label. List one beside it, or leave the case out."))
        return facts
    try:
        label = _read(case.label, case, card)
        if images:
            _check_same_grid(images[0], label, case.image[0].name)
        facts.label_voxels, facts.ignored_voxels = _count_labels(label, card)
    except BadFileError as error:
        facts.problems.append(Problem(case.id, case.label, str(error)))
    for companion in case.companions:
        for file in companion.files:
            try:
                volume = _read(file, case, card)
                if images:
                    _check_same_grid(images[0], volume, case.image[0].name)
                if companion.shares:
                    check_shares(volume.get_fdata(dtype=np.float32))
                else:
                    _count_labels(volume, card)
            except BadFileError as error:
                facts.problems.append(Problem(case.id, file, str(error)))
    return facts


def _read(path: Path, case: Case, card: DataCard) -> Any:
    check_present(path, case, card)
    try:
        image = read_nifti(path)
        image.get_fdata(dtype=np.float32)  # kept by nibabel; shows here whether the voxels can be read
    except Exception as error:
        raise BadFileError(f"cannot be read ({first_line(error)}). Copy or download it again.") from error
    if image.ndim < 3 or min(image.shape) < 1:
        raise BadFileError(f"expected a volume with three axes, but got shape {image.shape}.")
    return image


def _check_image(image: Any, card: DataCard, channels: int) -> None:
    found = int(np.prod(image.shape[3:]))
    if found != channels:
        raise BadFileError(
            f"expected {channels} channel(s), as `image_channels` says, but got {found} (shape {image.shape}). Mend the card or the file."
        )
    values = image.get_fdata(dtype=np.float32)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise BadFileError(f"holds {bad} NaN or infinite voxel(s). Replace them, with np.nan_to_num for example.")
    if values.min() == values.max():
        raise BadFileError(f"is empty: every voxel is {values.flat[0]:g}. Export it again, or leave the case out.")


def _check_same_grid(image: Any, other: Any, image_name: str) -> None:
    if image.shape[:3] != other.shape[:3]:
        raise BadFileError(f"has the shape {other.shape[:3]}, but {image_name} has {image.shape[:3]}. Resample one onto the grid of the other.")
    if not np.isfinite(image.affine).all() or not np.isfinite(other.affine).all():
        raise BadFileError(f"its affine or that of {image_name} has NaN or infinite entries. Copy a valid affine into both headers.")
    shift = corner_shift(image.shape[:3], image.affine, other.affine)
    if shift > _SHIFT * min(image.header.get_zooms()[:3]):
        raise BadFileError(
            f"lies elsewhere in space than {image_name}: the affines differ by up to {shift:.3g} mm. Copy the right affine into both headers."
        )


def _count_labels(label: Any, card: DataCard) -> tuple[NDArray[np.float64], float]:
    classes = len(card.classes)
    values = label.get_fdata(dtype=np.float32)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise BadFileError(f"holds {bad} NaN or infinite voxel(s). Replace them with a class or the ignore label {card.ignore_index}.")
    if card.soft_labels:
        return _count_soft(values, classes)
    if values.size != np.prod(values.shape[:3]):
        raise BadFileError(
            f"expected one label per voxel, but got shape {values.shape}. If these are shares per class, set `soft_labels: true` in the card."
        )
    whole = np.rint(values)
    if fractional := int((np.abs(values - whole) > _WHOLE).sum()):
        raise BadFileError(f"holds {fractional} label(s) that are not whole numbers. Resample labels with nearest neighbour.")
    whole = whole[whole != card.ignore_index]
    ignored = float(values.size - whole.size)
    outside = whole[(whole < 0) | (whole >= classes)]
    if outside.size:
        found = ", ".join(f"{int(v)} ({n} voxels)" for v, n in zip(*np.unique(outside, return_counts=True), strict=True))
        raise BadFileError(
            f"has labels outside the card's classes 0 to {classes - 1}: {found}. Add the class to the card, or map it to `ignore_index`."
        )
    return np.bincount(whole.astype(np.int64), minlength=classes).astype(float), ignored


def _count_soft(values: NDArray[np.float32], classes: int) -> tuple[NDArray[np.float64], float]:
    if values.ndim != 4 or values.shape[3] != classes:
        raise BadFileError(f"expected soft labels (X, Y, Z, {classes}), one share per class of the card, but got shape {values.shape}.")
    if values.min() < -_SUM or values.max() > 1 + _SUM:
        raise BadFileError(f"expected shares in [0, 1], but got {values.min():.4g} to {values.max():.4g}.")
    total = values.sum(axis=3)
    labelled = np.abs(total) > _SUM
    if wrong := int((np.abs(total[labelled] - 1) > _SUM).sum()):
        raise BadFileError(f"expected shares that sum to 1 (or to 0 where there is no label), but {wrong} voxel(s) do not. Divide by their sum.")
    return values[labelled].sum(axis=0, dtype=np.float64), float(labelled.size - labelled.sum())
