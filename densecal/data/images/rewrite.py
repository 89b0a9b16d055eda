"""Labels of images: read as classes, and written back into a file of the same kind, palette and numbers included."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densecal.data.card import DataCard
from densecal.data.images.files import read_label
from densecal.data.images.labels import LabelReader
from densecal.files import write_atomically

__all__ = ["read_classes", "rewrite_classes"]

_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy", ".npz")


def read_classes(path: Path, card: DataCard) -> NDArray[np.int64]:
    """Classes ``(H, W)`` and ``ignore_index``."""
    codes = LabelReader(card)(read_label(path))
    return np.where(codes == 0, card.ignore_index, codes.astype(np.int64) - 1)


def rewrite_classes(source: Path, target: Path, label_map: NDArray[np.int64], card: DataCard) -> Path:
    """Write a label file in which the pixels of another class have that class's number or colour, and the others what they had.

    Raises:
        ValueError: If labels of this format cannot be written, or the file cannot hold the number or colour.
    """
    suffix = source.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{source}: labels in {suffix} files cannot be written, but in {', '.join(_SUFFIXES)}. Convert them first.")
    changed = label_map != read_classes(source, card)
    wanted = label_map[changed]
    if suffix in (".npy", ".npz"):
        values = np.array(read_label(source).values)
        values[changed] = _numbers(card, source, values.dtype)[wanted]
        return write_atomically(target, _arrays(source, values))
    with Image.open(source) as image:
        values = np.array(image)
        colors = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3) if image.mode in ("P", "PA") else None
        channels = {"LA": 1, "PA": 1, "RGBA": 3}.get(image.mode, values.shape[2] if values.ndim == 3 else 1)  # the others are opacity
        stored = _colors(card, source, colors, channels) if card.label_encoding == "color" else _numbers(card, source, values.dtype)
        if values.ndim == 2:
            values[changed] = stored.reshape(len(stored), -1)[wanted, 0]
        else:
            values[changed, :channels] = np.broadcast_to(stored.reshape(len(stored), -1)[wanted], (len(wanted), channels))
        copy = Image.fromarray(values, mode=image.mode if colors is not None else None)
        if colors is not None:
            copy.putpalette(colors.ravel().tolist())
        buffer = io.BytesIO()
        copy.save(buffer, format=image.format)
    return write_atomically(target, buffer.getvalue())


def _arrays(source: Path, values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    if source.suffix.lower() == ".npy":
        np.save(buffer, values)
    else:
        with np.load(source, allow_pickle=False) as arrays:
            (name,) = arrays.files
        np.savez_compressed(buffer, **{name: values})  # type: ignore[arg-type]
    return buffer.getvalue()


def _numbers(card: DataCard, source: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """The first number that stands for each class, ``(K,)``, as a file of this type stores it."""
    first: dict[int, int] = {}
    for number, c in card.class_of_number().items():
        first.setdefault(c, number)
    numbers = np.array([first[c] for c in range(len(card.classes))], np.int64)
    if kind.kind == "b":  # one bit: white and black
        return numbers > 0
    if kind.kind in "ui" and numbers.max() > np.iinfo(kind).max:
        raise ValueError(f"{source}: its {kind} cannot hold {numbers.max()}, the number of a class. Store the labels with more bits.")
    return numbers.astype(kind)


def _colors(card: DataCard, source: Path, palette: NDArray[np.uint8] | None, channels: int) -> NDArray[Any]:
    """The colour of each class ``(K, 3)``, its place in the palette of the file ``(K,)``, or its grey ``(K, 1)``."""
    colors = np.array(card.palette, np.uint8)
    if palette is not None:
        places = [np.flatnonzero((palette == color).all(axis=1)) for color in colors]
        if missing := [name for name, place in zip(card.classes, places, strict=True) if not place.size]:
            raise ValueError(f"{source}: its palette has no colour for the class {missing[0]}. Store the labels in colours.")
        return np.array([place[0] for place in places], np.uint8)
    if channels == 1:
        if (colors != colors[:, :1]).any():
            raise ValueError(f"{source}: is grey and cannot hold the colours of the classes. Store the labels in colours.")
        return colors[:, :1]
    return colors
