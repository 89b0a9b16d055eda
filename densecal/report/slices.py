"""Slices of an example: image, truth, prediction, confidence and errors as pictures of equal size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch

from densecal.labels import LabelSchema
from densecal.ops.activation import most_probable
from densecal.pictures import as_array, gray, paint_ignored, paint_label, shown, to_uint8
from densecal.report.drawing import plain_text
from densecal.report.summary import hex_color

__all__ = [
    "AGREEMENT",
    "CONFIDENCE_COLORMAP",
    "ERROR_COLORS",
    "PANELS",
    "Example",
    "Panels",
    "example_figure",
    "plane_title",
    "slice_panels",
    "square_pixels",
    "upright",
]

CONFIDENCE_COLORMAP = "viridis"
PANELS = ("Image", "Truth", "Prediction", "Confidence", "Error")
AGREEMENT = "Agreement"
"""Panel before that of the confidence, in its colours: the largest share of a soft reference, of several raters how many agree."""
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
        image: One channel ``(*spatial)`` or colour ``(*spatial, 3)`` as red, green, blue, 2 or 3 spatial dims; ``None`` where there is none to show. uint8 is
            shown as it is, any other type from its 0.5th to its 99.5th percentile.
        label: Label map ``(*spatial)``, integer, or a soft reference ``(C, *spatial)``, floating; of regions ``(R, *spatial)``, 0 and 1, integer, or shares, floating.
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
        names: What each panel shows: ``PANELS``, without the image where there is none and with ``AGREEMENT`` where the reference is soft.
        photograph: Whether the image is in colour.
    """

    title: str
    images: tuple[np.ndarray, ...]
    names: tuple[str, ...] = PANELS
    photograph: bool = False

    @property
    def wide(self) -> bool:
        """Whether the pictures are wider than high, so that a row of all of them would show little."""
        height, width = self.images[0].shape[:2]
        return width > 1.2 * height

    def data_url(self, panel: int) -> str:
        """A picture as part of a page: photographs as JPEG, a third of the size that they have without loss."""
        photograph = self.photograph
        buffer = io.BytesIO()
        # Full resolution of colours, or outlines would blur.
        imsave(
            buffer, self.images[panel], format="jpeg" if photograph else "png", pil_kwargs={"quality": 90, "subsampling": 0} if photograph else None
        )
        return f"data:image/{'jpeg' if photograph else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
    label, probs = as_array(example.label), as_array(example.probs)
    spatial = probs.shape[1:]
    if probs.shape[:1] != (schema.num_classes,) or len(spatial) not in (2, 3):
        raise ValueError(
            f"Expected `probs` of {example.case_id!r} of shape ({schema.num_classes}, *spatial), 2 or 3 spatial dims, but got {probs.shape}."
        )
    image = np.zeros(spatial) if example.image is None else as_array(example.image)
    if image.shape not in (spatial, (*spatial, 3)):
        raise ValueError(f"Expected the image of {example.case_id!r} of shape {spatial} or, in colour, {(*spatial, 3)}, but got {image.shape}.")
    reference, agreement = _reference(label, probs, schema, example.case_id)
    spacing = tuple(float(s) for s in example.spacing) or (1.0,) * len(spatial)
    if len(spacing) != len(spatial):
        raise ValueError(f"Expected `spacing` of {example.case_id!r} with {len(spatial)} values, but got {spacing}.")
    prediction, confidence = (values.numpy() for values in most_probable(torch.from_numpy(np.ascontiguousarray(probs)), schema.activation, dim=0))
    picture = shown(image)
    first = 1 if example.image is None else 0
    names = (*PANELS[:3], AGREEMENT, *PANELS[3:]) if agreement else PANELS
    maps = (picture, reference, prediction, confidence, *agreement)

    def panels(title: str, arrays: tuple[np.ndarray, ...], steps: Sequence[float]) -> Panels:
        return Panels(title, _draw(arrays, steps, schema)[first:], names[first:], picture.ndim > len(spatial))

    if len(spatial) == 2:
        # Rows of an image run from top to bottom.
        return [panels("", maps, spacing)]

    extent = [size * step for size, step in zip(spatial, spacing, strict=True)]
    planes = {axis: [a for a in range(3) if a != axis] for axis in range(3)}
    wide = [axis for axis, (a, b) in planes.items() if max(extent[a], extent[b]) <= _MAX_ASPECT * min(extent[a], extent[b])]
    result = []
    for axis in (wide or [0, 1, 2])[:max_slices]:
        across, up = planes[axis]
        index = _telling_slice(reference, prediction, schema, axis)
        arrays = (upright(picture, axis, index), *(upright(array, axis, index, first=array.ndim - 3) for array in maps[1:]))
        result.append(panels(plane_title(example.axis_names, axis, index, spatial[axis]), arrays, (spacing[up], spacing[across])))
    return result


def example_figure(panels: Sequence[Panels], schema: LabelSchema, title: str) -> Figure:
    """All slices of an example in one figure, one row per slice; the pictures of a single wide image in two."""
    pictures = [
        (name, image, item.title if i == 0 else "") for item in panels for i, (name, image) in enumerate(zip(item.names, item.images, strict=True))
    ]
    columns = 3 if len(panels) == 1 and panels[0].wide else len(panels[0].names)
    rows = -(-len(pictures) // columns)
    height, width = panels[0].images[0].shape[:2]
    legend = [Patch(color=hex_color(schema.palette[c]), label=plain_text(schema.names[c], max_length=40)) for c in schema.foreground]
    legend += [Patch(facecolor="#808080", edgecolor="#9e9e9e", hatch="////", linewidth=0, label="ignored")]
    legend += [Patch(color=hex_color(color), label=name) for name, color in ERROR_COLORS.items()]
    of_row = 0.4 + 12.4 / columns * min(1.0, height / width) if columns == 3 else 2.9
    figure = Figure(figsize=(13.5, of_row * rows + 0.5 + 0.25 * -(-len(legend) // 7)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(pictures) :]:
        axes.axis("off")
    for axes, (name, image, row_title) in zip(grid.flat, pictures, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(row_title, fontsize=9)
    figure.colorbar(
        ScalarMappable(Normalize(1 / schema.num_outcomes, 1), CONFIDENCE_COLORMAP),
        ax=list(grid[:, -1]),
        pad=0.02,
        label="confidence" + (", agreement" if AGREEMENT in panels[0].names else ""),
        shrink=0.8,
    )
    figure.suptitle(plain_text(title, max_length=100), fontsize=11)
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 7), fontsize=9, frameon=False)
    FigureCanvasAgg(figure)
    return figure


def _reference(label: np.ndarray, probs: np.ndarray, schema: LabelSchema, case_id: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The class of each voxel ``(*spatial)``, or one map per region ``(R, *spatial)``; of a soft reference what has the largest share, and that share."""
    spatial = probs.shape[1:]
    if label.shape == probs.shape:
        ignored = (label == schema.ignore_index).any(0)
        if schema.activation == "softmax":
            ignored |= (label == 0).all(0)
        reference, share = (values.numpy() for values in most_probable(torch.from_numpy(np.ascontiguousarray(label)), schema.activation, dim=0))
        return np.where(ignored, schema.ignore_index, reference), [np.where(ignored, 0.0, share)] if label.dtype.kind == "f" else []
    if schema.activation == "softmax" and label.shape in (spatial, (1, *spatial)):
        return label.reshape(spatial).astype(np.int64), []
    expected = f"{spatial} or {probs.shape}" if schema.activation == "softmax" else f"{probs.shape}"
    raise ValueError(f"Expected `label` of {case_id!r} of shape {expected}, but got {label.shape}.")


def _telling_slice(label: np.ndarray, prediction: np.ndarray, schema: LabelSchema, axis: int) -> int:
    others = tuple(a for a in range(-3, 0) if a != axis - 3)
    for values in (label, prediction):
        structure = (values == 1).any(0) if schema.activation == "sigmoid" else np.isin(values, schema.foreground)
        amount = structure.sum(others)
        if schema.has_structure and amount.any():
            return int(amount.argmax())
    return label.shape[axis - 3] // 2


def plane_title(axis_names: Sequence[str], axis: int, index: int, length: int) -> str:
    """Which slice of a volume it is, counted from 1."""
    name = f"{axis_names[axis]} " if len(axis_names) == 3 else ""
    return f"{name}slice {index + 1} of {length}" + ("" if name else f" across axis {axis + 1}")


def upright(array: np.ndarray, axis: int, index: int, *, first: int = 0) -> np.ndarray:
    """A slice of a volume as rows and columns: the last remaining axis points up, as in a viewer of head scans. Axes before the ``first`` of the volume, and colours
    after the last, stay."""
    return np.flip(np.take(array, index, first + axis).swapaxes(first, first + 1), first)


def square_pixels(arrays: Sequence[np.ndarray], spacing: Sequence[float]) -> list[np.ndarray]:
    """A picture, with or without colours, and maps ``(..., rows, columns)`` of its size, resampled to square pixels: maps by the nearest, a picture that shrinks by its
    mean."""
    picture, *others = arrays
    size = picture.shape[:2]
    extent = [n * step for n, step in zip(size, spacing, strict=True)]
    side = min(max(*size, _SIDE[0]), _SIDE[1])
    lengths = [max(1, round(side * part / max(extent))) for part in extent]
    rows, columns = ((np.arange(length) * n) // length for n, length in zip(size, lengths, strict=True))
    if all(length <= n for n, length in zip(size, lengths, strict=True)):
        picture = cv2.resize(np.ascontiguousarray(picture), (lengths[1], lengths[0]), interpolation=cv2.INTER_AREA)
    else:
        picture = picture[np.ix_(rows, columns)]
    return [picture, *(array[..., rows[:, None], columns] for array in others)]


def _draw(arrays: Sequence[np.ndarray], spacing: Sequence[float], schema: LabelSchema) -> tuple[np.ndarray, ...]:
    """Pictures of a slice given as (rows, columns), resampled to square pixels: classes by the nearest voxel, an image that shrinks by its mean."""
    picture, label, prediction, confidence, *agreement = square_pixels(arrays, spacing)
    base = gray(picture)
    wrong = (prediction != label) & (label != schema.ignore_index)
    sure = wrong & (confidence > _CONFIDENT)
    ignored = label == schema.ignore_index
    if schema.activation == "sigmoid":
        # One picture of all regions: what is wrong in any of them, and how sure model and raters are of the one in doubt.
        wrong, sure, ignored = (mask.any(0) for mask in (wrong, sure, ignored))
        confidence, *agreement = (share.min(0) for share in (confidence, *agreement))
    panels = (
        picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2),
        paint_label(base, label, schema),
        paint_label(base, prediction, schema),
        *(paint_ignored(_in_colors(share, schema), ignored) for share in agreement),
        _in_colors(confidence, schema),
        _errors(base, wrong, sure, ignored),
    )
    return tuple(to_uint8(panel) for panel in panels)


def _in_colors(share: np.ndarray, schema: LabelSchema) -> np.ndarray:
    """Largest share or probability of each pixel, from that of chance to 1."""
    floor = 1 / schema.num_outcomes
    return colormaps[CONFIDENCE_COLORMAP](np.clip((share - floor) / (1 - floor), 0, 1))[..., :3]


def _errors(base: np.ndarray, wrong: np.ndarray, sure: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Wrong voxels over the faded image in grey: dim where the model had doubts, bright where it was sure; ignored voxels are striped."""
    result = np.repeat(0.15 + 0.55 * base[..., None], 3, axis=2)
    doubtful, confident = (np.array(color) / 255 for color in ERROR_COLORS.values())
    result[wrong] = 0.25 * result[wrong] + 0.75 * doubtful
    result[sure] = confident
    return paint_ignored(result, ignored)
