"""Images as pictures, and label maps painted over them in the palette."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from densecal.labels import LabelSchema

__all__ = ["as_array", "gray", "label_overlay", "paint_classes", "paint_ignored", "shown", "to_uint8"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_STRIPES = (0.5, 0.62)
"""Greys of what is ignored: no class looks striped, whatever the palette."""
_SHARE = {True: 0.45, False: 0.6}
"""Of the palette in the fill, with and without a background: beside what is left as it is a tint stands out, where everything is filled it must say the class."""


def label_overlay(image: Any, label_map: Any, schema: LabelSchema) -> NDArray[np.uint8]:
    """A label map in the palette over its image, at the image's size, as a report shows it.

    Each class has a translucent fill and a solid outline over the image in grey: two sources of colour could not be told apart. The background is left as it is,
    and so are labels that are no class; ignored pixels are striped in grey.

    Args:
        image: ``(H, W)``, or colour ``(H, W, 3)`` as red, green, blue. uint8 is shown as it is, any other type from its 0.5th to its 99.5th percentile.
        label_map: Reference or predicted classes, ``(H, W)``, integer.
        schema: Classes, background, ``ignore_index`` and palette.

    Returns:
        ``(H, W, 3)``, uint8, red, green, blue.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> schema = LabelSchema(("road", "car"), background=None, palette=((128, 64, 128), (0, 0, 142)))
        >>> picture = label_overlay(np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.int64), schema)
        >>> picture.shape, picture[0, 0].tolist()  # 60 % of the palette over black
        ((2, 3, 3), [77, 38, 77])
    """
    image, label_map = as_array(image), as_array(label_map)
    if label_map.ndim != 2 or image.shape not in (label_map.shape, (*label_map.shape, 3)):
        raise ValueError(
            f"Expected `image` (H, W) or (H, W, 3) and `label_map` (H, W) of the same size, but got {image.shape} and {label_map.shape}. "
            "Move a channel axis from the front to the end."
        )
    return to_uint8(paint_classes(gray(shown(image)), label_map, schema))


def as_array(value: Any) -> np.ndarray:
    """A tensor of any device, or anything that NumPy takes, as an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def shown(image: np.ndarray) -> np.ndarray:
    """Brightness 0 to 1: uint8 as it is, anything else from its 0.5th to its 99.5th percentile, all channels alike; NaN is black."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255
    finite = image[np.isfinite(image)]
    low, high = (float(end) for end in np.percentile(finite, (0.5, 99.5))) if finite.size else (0.0, 1.0)
    high = high if high > low else low + 1
    with np.errstate(invalid="ignore"):
        return np.clip(np.nan_to_num((image.astype(np.float32) - low) / (high - low), nan=0.0), 0, 1)


def gray(picture: np.ndarray) -> np.ndarray:
    """Luma ``(rows, columns)`` of a picture with or without a last axis of three colours."""
    return picture if picture.ndim == 2 else picture @ _LUMA


def paint_classes(base: np.ndarray, classes: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Fill and outline of the foreground classes over a grey picture ``(rows, columns)``; ``(rows, columns, 3)``, 0 to 1."""
    palette = np.array(schema.palette, dtype=np.float32) / 255
    inside = np.isin(classes, schema.foreground)
    share = inside * np.float32(_SHARE[schema.background is not None])
    share[inside & _outline(classes)] = 1
    result = base[..., None] * (1 - share[..., None]) + palette[np.where(inside, classes, 0)] * share[..., None]
    return paint_ignored(result, classes == schema.ignore_index)


def paint_ignored(picture: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Grey stripes where ``ignored``; changes ``picture``."""
    row, column = np.nonzero(ignored)
    width = max(2, max(ignored.shape) // 100)
    picture[row, column] = np.array(_STRIPES, dtype=np.float32)[(row + column) // width % 2, None]
    return picture


def to_uint8(picture: np.ndarray) -> NDArray[np.uint8]:
    return np.round(picture * 255).astype(np.uint8)


def _outline(classes: np.ndarray) -> np.ndarray:
    """Pixels beside another class, thicker in larger pictures, which are seen at a smaller scale."""
    import cv2

    outline = np.zeros(classes.shape, dtype=np.uint8)
    for axis in range(2):
        change = np.diff(classes, axis=axis) != 0
        length = change.shape[axis]
        for start in (0, 1):
            part = tuple(slice(start, start + length) if a == axis else slice(None) for a in range(2))
            outline[part] |= change
    thicker = round(max(classes.shape) / 700) - 1
    return (cv2.dilate(outline, np.ones((2 * thicker + 1,) * 2, np.uint8)) if thicker > 0 else outline).astype(bool)
