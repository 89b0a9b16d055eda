"""Where the files of a data set lie: from a folder to its cases."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densecal.data.card import DataCard

__all__ = ["Case", "decathlon", "find_cases", "paired"]

SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Case:
    """One volume of a data set.

    Args:
        id: Name of the case, from its file name.
        image: Image file; several are stacked as channels.
        label: Label file, or ``None`` where the set lists none.
        subject: Person (or phantom) the volume comes from; a subject is never on two sides of a split.
    """

    id: str
    image: tuple[Path, ...]
    label: Path | None
    subject: str


def find_cases(root: Path, card: DataCard) -> list[Case]:
    """The cases below ``root`` in the card's layout, sorted by id. Files are not opened and need not exist."""
    return {"decathlon": decathlon, "paired": paired}[card.layout](root, card)


def decathlon(root: Path, card: DataCard) -> list[Case]:
    """Cases in the layout of the Medical Segmentation Decathlon.

    ``dataset.json`` lists the training pairs relative to ``root``; without that file they are ``imagesTr/<id>.nii.gz`` and ``labelsTr/<id>.nii.gz``.

    Raises:
        ValueError: If ``dataset.json`` is not a list of such pairs.
    """
    listing = root / "dataset.json"
    if not listing.is_file():
        return _pairs(root / "imagesTr", root / "labelsTr", card)
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))["training"]
        cases = [_listed(root, entry, card) for entry in entries]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{listing}: expected "training" to be a list of {{"image": path, "label": path}} ({type(error).__name__}: {error}).'
        ) from None
    return sorted((case for case in cases if not case.image[0].name.startswith("._")), key=lambda case: case.id)


def paired(root: Path, card: DataCard) -> list[Case]:
    """Cases as ``images/<id>.nii.gz`` and ``labels/<id>.nii.gz`` (or ``.nii``)."""
    return _pairs(root / "images", root / "labels", card)


def _listed(root: Path, entry: Any, card: DataCard) -> Case:
    image = root / (entry if isinstance(entry, str) else entry["image"])
    label = None if isinstance(entry, str) else entry.get("label")
    case_id = _case_id(image)
    return Case(case_id, (image,), root / label if label else None, subject_of(case_id, card))


def _pairs(images: Path, labels: Path, card: DataCard) -> list[Case]:
    """A case for every id on either side, so that a missing partner is noticed when the files are checked."""
    image_files, label_files = _volumes(images), _volumes(labels)
    return [
        Case(
            case_id,
            (image_files.get(case_id, images / f"{case_id}.nii.gz"),),
            label_files.get(case_id, labels / f"{case_id}.nii.gz"),
            subject_of(case_id, card),
        )
        for case_id in sorted(image_files | label_files)
    ]


def _volumes(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {_case_id(path): path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES) and not path.name.startswith(".")}


def _case_id(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)


def subject_of(case_id: str, card: DataCard) -> str:
    """The subject of a case by the card's rule; without one, each case is its own.

    Raises:
        ValueError: If the id does not match the card's pattern.

    Example:
        >>> from densecal.data.card import load_card
        >>> [subject_of(f"hippocampus_{n}", load_card("hippocampus")) for n in ("003", "004", "005")]
        ['2', '2', '3']
    """
    if card.subject_pattern is None:
        return case_id
    match = re.search(card.subject_pattern, case_id)
    if match is None:
        raise ValueError(
            f"Case {case_id!r} does not match `subject_pattern` {card.subject_pattern!r} of the card {card.name}, so its subject is unknown."
        )
    subject = match.group(1)
    if card.subject_size == 1:
        return subject
    if not subject.isdecimal():
        raise ValueError(
            f"Expected `subject_pattern` to find a number in the case id {case_id!r}, as `subject_size` is {card.subject_size}, but got {subject!r}."
        )
    return str((int(subject) + card.subject_size - 1) // card.subject_size)
