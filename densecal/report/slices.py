"""Slices of an example: image, truth, prediction, confidence and errors as pictures of equal size."""

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
from matplotlib.patches import Patch

from densecal.labels import LabelSchema
from densecal.report.drawing import plain_text
from densecal.report.summary import hex_color

__all__ = ["CONFIDENCE_COLORMAP", "ERROR_COLORS", "PANELS", "Example", "Panels", "example_figure", "slice_panels"]

CONFIDENCE_COLORMAP = "viridis"
PANELS = ("Image", "Truth", "Prediction", "Confidence", "Error")
ERROR_COLORS = {"wrong": (70, 120, 190), "wrong with a confidence above 0.9": (255, 90, 20)}
"""Of doubtful and of confident errors: dim and bright, so that they differ without colour, too."""
_CONFIDENT = 0.9
_SIDE = (320, 512)  # least and most pixels of a panel's longer side: enlarged, outlines stay thin; not too large, pages stay light
_MAX_ASPECT = 5.0  # a plane longer than this shows little


@dataclass(frozen=True)
class Example:
    """One case to show.

    Args:
        case_id: Its name.
        image: One channel, ``(*spatial)``, 2 or 3 spatial dims, any floating scale; ``None`` where there is none to show.
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
    """The pictures of one slice.

    Args:
        title: Which slice.
        images: RGB per panel, ``(height, width, 3)``, uint8, square pixels.
        names: What each panel shows: ``PANELS``, without the image where there is none.
    """

    title: str
    images: tuple[np.ndarray, ...]
    names: tuple[str, ...] = PANELS

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
    label, probs = _array(example.label), _array(example.probs)
    image = np.zeros(probs.shape[1:]) if example.image is None else _array(example.image)
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
    first = 1 if example.image is None else 0

    def panels(title: str, arrays: tuple[np.ndarray, ...], steps: Sequence[float]) -> Panels:
        return Panels(title, _draw(arrays, steps, window, schema)[first:], PANELS[first:])

    if image.ndim == 2:
        # Rows of an image run from top to bottom.
        return [panels("", (image, label_map, prediction, confidence), spacing)]

    extent = [size * step for size, step in zip(spatial, spacing, strict=True)]
    planes = {axis: [a for a in range(3) if a != axis] for axis in range(3)}
    wide = [axis for axis, (a, b) in planes.items() if max(extent[a], extent[b]) <= _MAX_ASPECT * min(extent[a], extent[b])]
    result = []
    for axis in (wide or [0, 1, 2])[:max_slices]:
        across, up = planes[axis]
        index = _telling_slice(label_map, prediction, schema, axis)
        # The last remaining axis points up, as in a viewer of head scans.
        arrays = tuple(np.take(array, index, axis).T[::-1] for array in (image, label_map, prediction, confidence))
        name = f"{example.axis_names[axis]} " if len(example.axis_names) == 3 else ""
        title = f"{name}slice {index + 1} of {spatial[axis]}" + ("" if name else f" across axis {axis + 1}")
        result.append(panels(title, arrays, (spacing[up], spacing[across])))
    return result


def example_figure(panels: Sequence[Panels], schema: LabelSchema, title: str) -> Figure:
    """All slices of an example in one figure, one row per slice."""
    figure = Figure(figsize=(13.5, 2.9 * len(panels) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), len(panels[0].names), squeeze=False)
    for row, item in zip(grid, panels, strict=True):
        for axes, name, image in zip(row, item.names, item.images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(name, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(item.title, fontsize=9)
    figure.colorbar(
        ScalarMappable(Normalize(1 / schema.num_classes, 1), CONFIDENCE_COLORMAP), ax=list(grid[:, -1]), pad=0.02, label="confidence", shrink=0.8
    )
    figure.suptitle(plain_text(title, max_length=100), fontsize=11)
    named = {**{schema.names[c]: schema.palette[c] for c in schema.foreground}, **ERROR_COLORS}
    handles = [Patch(color=hex_color(color), label=plain_text(name, max_length=40)) for name, color in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), fontsize=9, frameon=False)
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
    panels = (
        base,
        _overlay(base, label_map, schema),
        _overlay(base, prediction, schema),
        colors,
        _errors(base, label_map, prediction, confidence, schema),
    )
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


def _errors(base: np.ndarray, label_map: np.ndarray, prediction: np.ndarray, confidence: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Wrong voxels over the faded image: dim where the model had doubts, bright where it was sure; ignored voxels are grey."""
    result = 0.15 + 0.55 * base
    ignored = label_map == schema.ignore_index
    wrong = (prediction != label_map) & ~ignored
    doubtful, sure = (np.array(color) / 255 for color in ERROR_COLORS.values())
    result[wrong] = 0.25 * result[wrong] + 0.75 * doubtful
    result[wrong & (confidence > _CONFIDENT)] = sure
    result[ignored] = 0.5
    return result
