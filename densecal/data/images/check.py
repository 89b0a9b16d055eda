"""What is wrong with an image and its label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densecal.data.card import DataCard
from densecal.data.images.files import decode_fully, read_image, read_label, read_shares
from densecal.data.images.labels import LabelReader
from densecal.data.layouts import Case
from densecal.data.validate import BadFileError, CaseFacts, Problem, check_present, check_shares, first_line

__all__ = ["inspect"]


def inspect(case: Case, card: DataCard, reader: LabelReader) -> CaseFacts:
    """What the files of a case hold, and what is wrong with them."""
    facts = CaseFacts(case.id)
    path = case.image[0]
    try:
        facts.shape = _image(path, case, card).shape[:2]
    except BadFileError as error:
        facts.problems.append(Problem(case.id, path, str(error)))
    assert case.label is not None
    try:
        label = reader(_stored(case.label, case, card))
        if facts.shape and label.shape[:2] != facts.shape:
            raise BadFileError(_other_size(label.shape[:2], facts.shape, path, card))
        facts.label_voxels, facts.ignored_voxels = reader.count(label)
    except BadFileError as error:
        facts.problems.append(Problem(case.id, case.label, str(error)))
    for companion in case.companions:
        for file in companion.files:
            try:
                check_present(file, case, card)
                size = _shares(file).shape[1:] if companion.shares else reader(_stored(file, case, card)).shape[:2]
                if facts.shape and size != facts.shape:
                    raise BadFileError(_other_size(size, facts.shape, path, card))
            except BadFileError as error:
                facts.problems.append(Problem(case.id, file, str(error)))
    return facts


def _shares(path: Path) -> NDArray[np.float32]:
    try:
        values = read_shares(path)
    except Exception as error:
        raise BadFileError(f"cannot be read ({first_line(error)}). Write it again.") from error
    check_shares(values)
    return values


def _image(path: Path, case: Case, card: DataCard) -> NDArray[Any]:
    check_present(path, case, card)
    try:
        decode_fully(path)
        image = read_image(path, card.image_channels, card.exif)
    except Exception as error:
        raise BadFileError(f"cannot be read ({first_line(error)}). Copy or download it again.") from error
    if image.dtype != np.uint8 and (not np.isfinite(image).all() or image.min() < 0 or image.max() > 1):
        raise BadFileError(f"expected floats in [0, 1], but got {image.min():.4g} to {image.max():.4g}. Scale them.")
    if image.min() == image.max():
        raise BadFileError(f"is empty: every pixel is {image.flat[0]:g}. Export it again, or leave the case out.")
    return image


def _stored(path: Path, case: Case, card: DataCard) -> Any:
    check_present(path, case, card)
    try:
        return read_label(path)
    except Exception as error:
        raise BadFileError(f"cannot be read ({first_line(error)}). Copy or download it again.") from error


def _other_size(label: tuple[int, ...], image: tuple[int, ...], path: Path, card: DataCard) -> str:
    text = f"is {_size(label)}, but {path.name} is {_size(image)} (rows x columns)."
    other = "ignore" if card.exif == "apply" else "apply"
    if read_image(path, card.image_channels, other).shape[:2] == label:
        return f"{text} The camera's note of orientation turns the image: with `exif: {other}` in the card the two agree."
    return f"{text} Resize the label to the nearest, or find the right one."


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
