"""Images as pictures, and label maps painted over them in the palette."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from densecal.labels import LabelSchema

__all__ = ["as_array", "gray", "label_overlay", "paint_ignored", "paint_label", "shown", "to_uint8"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_STRIPES = (0.5, 0.62)
"""Greys of what is ignored: no class looks striped, whatever the palette."""
_SHARE = {True: 0.45, False: 0.6}
"""Of the palette in the fill, with and without a background: beside what is left as it is a tint stands out, where everything is filled it must say the class."""


def label_overlay(image: Any, label_map: Any, schema: LabelSchema) -> NDArray[np.uint8]:
    """A label map in the palette over its image, at the image's size, as a report shows it.

    Each class has a translucent fill and a solid outline over the image in grey: two sources of colour could not be told apart. The background is left as it is,
    and so are labels that are no class; ignored pixels are striped in grey. Of regions that overlap the smaller one is on top, and each has its outline.

    Args:
        image: ``(H, W)``, or colour ``(H, W, 3)`` as red, green, blue. uint8 is shown as it is, any other type from its 0.5th to its 99.5th percentile.
        label_map: Reference or predicted classes, ``(H, W)``, integer; of regions one map each, ``(R, H, W)``, 1 inside and 0 outside.
        schema: Classes, background, ``ignore_index`` and palette; or regions.

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
    channels = () if schema.activation == "softmax" else (schema.num_classes,)
    size = label_map.shape[len(channels) :]
    if label_map.shape[: len(channels)] != channels or len(size) != 2 or image.shape not in (size, (*size, 3)):
        wanted = "(H, W)" if not channels else f"({schema.num_classes}, H, W)"
        raise ValueError(
            f"Expected `image` (H, W) or (H, W, 3) and `label_map` {wanted} of the same size, but got {image.shape} and {label_map.shape}. "
            "Move a channel axis of the image from the front to the end."
        )
    return to_uint8(paint_label(gray(shown(image)), label_map, schema))


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


def paint_label(base: np.ndarray, label: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Fill and outline of the foreground classes ``(rows, columns)``, or of regions ``(R, rows, columns)``, over a grey picture; ``(rows, columns, 3)``, 0 to 1."""
    if schema.activation == "sigmoid":
        return _paint_regions(base, label, schema)
    palette = np.array(schema.palette, dtype=np.float32) / 255
    inside = np.isin(label, schema.foreground)
    share = inside * np.float32(_SHARE[schema.has_structure])
    share[inside & _outline(label)] = 1
    result = base[..., None] * (1 - share[..., None]) + palette[np.where(inside, label, 0)] * share[..., None]
    return paint_ignored(result, label == schema.ignore_index)


def _paint_regions(base: np.ndarray, maps: np.ndarray, schema: LabelSchema) -> np.ndarray:
    palette = np.array(schema.palette, dtype=np.float32) / 255
    inside, share = maps == 1, np.float32(_SHARE[True])
    result = np.repeat(base[..., None], 3, axis=2)
    for r in np.argsort(-inside.sum((1, 2)), kind="stable"):
        result[inside[r]] = base[inside[r], None] * (1 - share) + palette[r] * share
    for r, region in enumerate(inside):
        result[region & _outline(region)] = palette[r]
    return paint_ignored(result, (maps == schema.ignore_index).any(0))


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
