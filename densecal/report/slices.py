"""Slices of an example: image, truth, prediction and confidence as pictures of equal size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave

from densecal.labels import LabelSchema

__all__ = ["CONFIDENCE_COLORMAP", "PANELS", "Example", "Panels", "example_figure", "slice_panels"]

CONFIDENCE_COLORMAP = "viridis"
PANELS = ("Image", "Truth", "Prediction", "Confidence")
_SIDE = (320, 512)  # least and most pixels of a panel's longer side: enlarged, outlines stay thin; not too large, pages stay light
_MAX_ASPECT = 5.0  # a plane longer than this shows little


@dataclass(frozen=True)
class Example:
    """One case to show.

    Args:
        case_id: Its name.
        image: One channel, ``(*spatial)``, 2 or 3 spatial dims, any floating scale.
        label: Label map ``(*spatial)``, integer, or a soft reference ``(C, *spatial)``, floating.
        probs: Predicted probabilities ``(C, *spatial)``.
        spacing: Distance between voxels per axis, in millimetres, for the aspect ratio. By default 1.
        axis_names: Name of the plane across each axis, such as ``("sagittal", "coronal", "axial")``.
    """

    case_id: str
    image: Any
    label: Any
    probs: Any
    spacing: Sequence[float] = ()
    axis_names: Sequence[str] = ()


@dataclass(frozen=True)
class Panels:
    """Four pictures of one slice.

    Args:
        title: Which slice.
        images: RGB per panel of ``PANELS``, ``(height, width, 3)``, uint8, square pixels.
    """

    title: str
    images: tuple[np.ndarray, ...]

    def png(self, panel: int) -> bytes:
        buffer = io.BytesIO()
        imsave(buffer, self.images[panel], format="png")
        return buffer.getvalue()


def slice_panels(example: Example, schema: LabelSchema, *, max_slices: int = 3) -> list[Panels]:
    """The most telling slices: for a volume, across each axis the one with most foreground in the reference (else in the prediction, else the middle).

    Args:
        example: The case.
        schema: Classes and palette.
        max_slices: At most so many.

    Returns:
        One entry per slice, a single one for a 2D image.

    Raises:
        ValueError: If the shapes of image, label and probabilities do not fit, or there are not 2 or 3 spatial dims.
    """
    image, label, probs = (_array(value) for value in (example.image, example.label, example.probs))
    spatial = image.shape
    if image.ndim not in (2, 3):
        raise ValueError(f"Expected the image of {example.case_id!r} with 2 or 3 spatial dimensions and no channel axis, but got {spatial}.")
    if probs.shape != (schema.num_classes, *spatial):
        raise ValueError(f"Expected `probs` of {example.case_id!r} of shape {(schema.num_classes, *spatial)}, but got {probs.shape}.")
    if label.shape == (1, *spatial):
        label = label[0]
    if label.shape == probs.shape:
        ignored = (label == schema.ignore_index).any(0) | (label == 0).all(0)
        label_map = np.where(ignored, schema.ignore_index, label.argmax(0))
    elif label.shape == spatial:
        label_map = label.astype(np.int64)
    else:
        raise ValueError(f"Expected `label` of {example.case_id!r} of shape {spatial} or {probs.shape}, but got {label.shape}.")
    spacing = tuple(float(s) for s in example.spacing) or (1.0,) * image.ndim
    if len(spacing) != image.ndim:
        raise ValueError(f"Expected `spacing` of {example.case_id!r} with {image.ndim} values, but got {spacing}.")
    prediction, confidence = probs.argmax(0), probs.max(0)
    window = _window(image)

    if image.ndim == 2:
        # Rows of an image run from top to bottom.
        return [Panels("", _draw((image, label_map, prediction, confidence), spacing, window, schema))]

    extent = [size * step for size, step in zip(spatial, spacing, strict=True)]
    planes = {axis: [a for a in range(3) if a != axis] for axis in range(3)}
    wide = [axis for axis, (a, b) in planes.items() if max(extent[a], extent[b]) <= _MAX_ASPECT * min(extent[a], extent[b])]
    result = []
    for axis in (wide or [0, 1, 2])[:max_slices]:
        across, up = planes[axis]
        index = _telling_slice(label_map, prediction, schema, axis)
        # The last remaining axis points up, as in a viewer of head scans.
        arrays = tuple(array.take(index, axis).T[::-1] for array in (image, label_map, prediction, confidence))
        name = f"{example.axis_names[axis]} " if len(example.axis_names) == 3 else ""
        title = f"{name}slice {index + 1} of {spatial[axis]}" + ("" if name else f" across axis {axis + 1}")
        result.append(Panels(title, _draw(arrays, (spacing[up], spacing[across]), window, schema)))
    return result


def example_figure(panels: Sequence[Panels], schema: LabelSchema, title: str) -> Figure:
    """All slices of an example in one figure, one row per slice."""
    figure = Figure(figsize=(11, 2.9 * len(panels) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), len(PANELS), squeeze=False)
    for row, item in zip(grid, panels, strict=True):
        for axes, name, image in zip(row, PANELS, item.images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(name, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(item.title, fontsize=9)
    figure.colorbar(ScalarMappable(Normalize(1 / schema.num_classes, 1), CONFIDENCE_COLORMAP), ax=list(grid[:, -1]), label="confidence", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    FigureCanvasAgg(figure)
    return figure


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _window(image: np.ndarray) -> tuple[float, float]:
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 1.0)
    return float(low), float(high if high > low else low + 1)


def _telling_slice(label_map: np.ndarray, prediction: np.ndarray, schema: LabelSchema, axis: int) -> int:
    others = tuple(a for a in range(3) if a != axis)
    for classes in (label_map, prediction):
        amount = np.isin(classes, schema.foreground).sum(others)
        if schema.background is not None and amount.any():
            return int(amount.argmax())
    return label_map.shape[axis] // 2


def _draw(arrays: Sequence[np.ndarray], spacing: Sequence[float], window: tuple[float, float], schema: LabelSchema) -> tuple[np.ndarray, ...]:
    """Pictures of a slice given as (rows, columns), resampled to square pixels by the nearest voxel."""
    extent = [size * step for size, step in zip(arrays[0].shape, spacing, strict=True)]
    side = min(max(*arrays[0].shape, _SIDE[0]), _SIDE[1])
    rows, columns = (
        (np.arange(length) * size) // length
        for size, length in ((size, max(1, round(side * part / max(extent)))) for size, part in zip(arrays[0].shape, extent, strict=True))
    )
    image, label_map, prediction, confidence = (array[np.ix_(rows, columns)] for array in arrays)
    low, high = window
    gray = np.clip(np.nan_to_num((image - low) / (high - low)), 0, 1)
    base = np.repeat(gray[..., None], 3, axis=2)
    floor = 1 / schema.num_classes
    colors = colormaps[CONFIDENCE_COLORMAP](np.clip((confidence - floor) / (1 - floor), 0, 1))[..., :3]
    panels = (base, _overlay(base, label_map, schema), _overlay(base, prediction, schema), colors)
    return tuple(np.round(panel * 255).astype(np.uint8) for panel in panels)


def _overlay(base: np.ndarray, classes: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Translucent fill and solid outline in the palette; the background is left as it is, ignored voxels are grey."""
    result = base.copy()
    outline = np.zeros(classes.shape, dtype=bool)
    for axis in range(2):
        length = classes.shape[axis] - 1
        change = np.diff(classes, axis=axis) != 0
        for start in (0, 1):
            index = [slice(None), slice(None)]
            index[axis] = slice(start, start + length)
            outline[tuple(index)] |= change
    for c in schema.foreground:
        color = np.array(schema.palette[c]) / 255
        inside = classes == c
        result[inside] = 0.55 * result[inside] + 0.45 * color
        result[inside & outline] = color
    result[classes == schema.ignore_index] = 0.5
    return result
