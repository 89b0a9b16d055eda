"""From what a label file holds to classes: one byte per pixel, or shares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densecal.data.card import DataCard
from densecal.data.images.files import StoredLabel, read_label
from densecal.data.layouts import Case
from densecal.data.raters import fuse
from densecal.data.validate import BadFileError

__all__ = ["LabelReader"]

_SUM = 1e-3
"""Shares stored as float32 or 8-bit brightness sum to 1 within this."""
_MOST = 1 << 16
"""Numbers from here on, and negative ones, are looked up by a longer way than the table."""


class LabelReader:
    """Turn stored labels into the form that is kept in memory.

    Class ``c`` becomes ``c + 1`` and "no class" 0; ``padding`` marks what an augmentation adds around an image. Soft labels have one share per class and, last, one for
    "no class", so that the shares of a pixel sum to 1 and those of padding to 0. The mean of several raters is kept in that form, too.

    Args:
        card: Which numbers, colours or shares the files hold.

    Attributes:
        soft: Whether labels are kept as shares.
    """

    def __init__(self, card: DataCard) -> None:
        self.card = card
        self.num_classes = len(card.classes)
        self.soft = card.soft
        self.dtype = np.dtype(np.uint8 if self.num_classes < 255 else np.int16)
        self._unknown = 255 if self.dtype == np.uint8 else -1
        self.padding = 0 if self.soft else self._unknown  # a code that no file holds
        self._codes = {number: c + 1 for number, c in card.class_of_number().items()}
        self._table = np.full(_MOST, self._unknown, self.dtype)
        for number, code in self._codes.items():
            if 0 <= number < _MOST:
                self._table[number] = code

    def __call__(self, stored: StoredLabel) -> NDArray[Any]:
        """One file: codes ``(H, W)``, uint8 (int16 for 255 classes and more), or shares ``(H, W, K + 1)``, float32.

        Raises:
            BadFileError: If the file holds something else than the card says.
        """
        if self.card.soft_labels:
            return self._shares(stored.values)
        if self.card.label_encoding == "color":
            return self._from_colors(stored)
        return self._from_numbers(stored)

    def of_case(self, case: Case) -> NDArray[Any]:
        """The label of a case: codes ``(H, W)``; shares ``(H, W, K + 1)``, float32; or, of several raters whose mean is not asked for, codes ``(H, W, R)`` to draw one from.

        Raises:
            Exception: If a file cannot be read, or holds something else than the card says.
        """
        labels = [self(read_label(file)) for file in case.label_files]
        if not self.card.rater_files:
            return labels[0]
        fused = fuse(self.label_maps(labels), self.num_classes, self.card.rater_fusion, ignore_index=-1).numpy()
        if self.soft:
            return np.ascontiguousarray(np.moveaxis(np.concatenate([fused, fused.sum(0, keepdims=True) == 0], dtype=np.float32), 0, -1))
        return np.ascontiguousarray(np.moveaxis(fused + 1, 0, -1).astype(self.dtype))

    def label_maps(self, codes: Sequence[NDArray[Any]]) -> Tensor:
        """Codes of several raters, each ``(H, W)``, as classes ``(R, H, W)``, int64, -1 for none."""
        return torch.from_numpy(np.stack(codes).astype(np.int64) - 1)

    def count(self, label: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
        """Pixels of each class (fractions of them for shares), and pixels without one."""
        if self.soft:
            sums = label.sum(axis=(0, 1), dtype=np.float64)
            return sums[:-1], float(sums[-1])
        counts = np.bincount(label.ravel(), minlength=self.num_classes + 1).astype(float)
        return counts[1:], float(counts[0])

    def _from_numbers(self, stored: StoredLabel) -> NDArray[Any]:
        values = stored.values
        if values.ndim == 3 and values.shape[2] == 3:
            if (values != values[..., :1]).any():
                raise BadFileError("is a colour image. Set `label_encoding: color` and `palette` in the card, or store the class numbers.")
            values = values[..., 0]
        if values.ndim != 2:
            raise BadFileError(
                f"expected one number per pixel, but got shape {values.shape}. If these are shares per class, set `soft_labels: true` in the card."
            )
        if values.dtype.kind == "f":
            whole = np.rint(values)
            if (whole != values).any():
                raise BadFileError("holds numbers that are not whole. Resize labels to the nearest, or set `soft_labels: true` in the card.")
            values = whole.astype(np.int64)
        if values.dtype.kind not in "uib":
            raise BadFileError(f"expected whole numbers, but got {values.dtype}.")
        if values.dtype == bool:  # one bit: white is 255 where that is a class, else 1
            values = values * np.uint8(255 if self._codes.get(255, 0) else 1)
        if values.dtype == np.uint8:
            codes = cv2.LUT(values, self._table[:256])  # several times as fast as an index
        elif values.dtype == np.uint16 or (values.size and values.min() >= 0 and values.max() < _MOST):
            codes = self._table[values]
        else:
            numbers, inverse = np.unique(values, return_inverse=True)
            codes = np.array([self._codes.get(int(number), self._unknown) for number in numbers], self.dtype)[inverse].reshape(values.shape)
        # The code of an unknown number is the largest or the smallest there is, which is found faster than any other.
        if codes.size and self._unknown == (codes.max() if self._unknown > 0 else codes.min()):
            found = _spell(values[codes == self._unknown])
            raise BadFileError(f"has labels outside {self._expected()}: {found}. Add the class to the card, or list the number in `ignore_values`.")
        if stored.palette is not None:
            self._check_palette(values, stored.palette)
        return codes

    def _expected(self) -> str:
        return "those of `label_values`" if self.card.label_values else f"the card's classes 0 to {self.num_classes - 1}"

    def _check_palette(self, values: NDArray[Any], palette: NDArray[np.uint8]) -> None:
        """Where file and card both colour the classes, other colours mean another order of classes. A grey ramp colours nothing."""
        if not self.card.palette:
            return
        for number in np.flatnonzero(np.bincount(values.ravel())).tolist():
            c = self._codes[number] - 1
            if c < 0:
                continue
            found, expected = tuple(int(v) for v in palette[number]), tuple(self.card.palette[c])
            if found != expected and found != (number,) * 3:
                raise BadFileError(
                    f"its palette shows {number} as {found}, but the card's {self.card.classes[c]} is {expected}: the classes may have another order. "
                    "Mend the order of `classes`, or leave `palette` out of the card."
                )

    def _from_colors(self, stored: StoredLabel) -> NDArray[Any]:
        values = stored.values if stored.palette is None else stored.palette[stored.values]
        if values.dtype == bool:
            values = 255 * values.astype(np.uint8)
        if values.ndim == 2 and values.dtype == np.uint8:
            values = np.repeat(values[..., None], 3, axis=2)
        if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
            raise BadFileError(f"expected a colour image, as `label_encoding` says, but got {values.dtype} of shape {values.shape}.")
        with_alpha = cv2.cvtColor(np.ascontiguousarray(values), cv2.COLOR_RGB2RGBA)
        packed = with_alpha.view("<u4")[..., 0] & 0xFFFFFF  # red in the lowest byte
        codes = self._codes_of_colors[packed]
        if (codes < 0).any():
            colors, counts = np.unique(packed[codes < 0], return_counts=True)
            most = [(int(colors[i]), counts[i]) for i in np.argsort(-counts, kind="stable")[:3]]
            found = ", ".join(f"({color & 255}, {color >> 8 & 255}, {color >> 16}) at {count} pixel(s)" for color, count in most)
            more = f" and {len(colors) - 3} more colours" if len(colors) > 3 else ""
            raise BadFileError(
                f"has colours outside the card's `palette` and `ignore_colors`: {found}{more}. "
                "Add the colour, store the label without loss, or set `color_tolerance`."
            )
        return codes.astype(self.dtype)

    @cached_property
    def _codes_of_colors(self) -> NDArray[np.int16]:
        """Code of each colour, -1 for those that mean nothing: 32 MB, but several times faster than a search."""
        codes, reach = np.full((256, 256, 256), -1, np.int16), self.card.color_tolerance
        for code, color in [*enumerate(self.card.palette, start=1), *((0, color) for color in self.card.ignore_colors)]:
            codes[tuple(slice(max(value - reach, 0), value + reach + 1) for value in reversed(color))] = code
        return codes.ravel()

    def _shares(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if values.ndim == 2 and self.num_classes == 2 and values.dtype.kind in "ub":
            second = values.astype(np.float32) / (1 if values.dtype == bool else np.iinfo(values.dtype).max)
            shares = np.stack([1 - second, second], axis=2)
        elif values.ndim == 3 and values.shape[2] == self.num_classes and values.dtype.kind == "f":
            shares = values.astype(np.float32)
        else:
            grey = " or a grey image" if self.num_classes == 2 else ""
            raise BadFileError(
                f"expected soft labels (H, W, {self.num_classes}), one floating share per class{grey}, but got {values.dtype} of shape {values.shape}."
            )
        if not np.isfinite(shares).all():
            raise BadFileError("holds NaN or infinite shares. Set the shares of a pixel without a label to 0.")
        if shares.min() < -_SUM or shares.max() > 1 + _SUM:
            raise BadFileError(f"expected shares in [0, 1], but got {shares.min():.4g} to {shares.max():.4g}.")
        total = shares.sum(axis=2, keepdims=True)
        labelled = total > _SUM
        if wrong := int((np.abs(total[labelled] - 1) > _SUM).sum()):
            raise BadFileError(f"expected shares that sum to 1 (or to 0 where there is no label), but {wrong} pixel(s) do not. Divide by their sum.")
        return np.concatenate([np.where(labelled, shares, 0), ~labelled], axis=2, dtype=np.float32)


def _spell(values: NDArray[Any]) -> str:
    numbers, counts = np.unique(values, return_counts=True)
    shown = ", ".join(f"{int(number)} ({count} pixels)" for number, count in list(zip(numbers, counts, strict=True))[:5])
    return shown + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
