from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from densecal.data.card import DataCard
from densecal.data.images.files import StoredLabel
from densecal.data.images.labels import LabelReader
from densecal.data.validate import BadFileError


def reader(classes: str = "abc", **changes: Any) -> LabelReader:
    return LabelReader(DataCard(**({"name": "x", "classes": list(classes), "patch_size": [8, 8]} | changes)))


def read(reader: LabelReader, values: Any, palette: Any = None, dtype: Any = np.uint8) -> list[Any]:
    """Codes: 0 for no class, c + 1 for class c."""
    full = None if palette is None else np.resize(np.array(palette, np.uint8), (256, 3))
    return reader(StoredLabel(np.array(values, dtype), full)).tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.int64, np.float32])
def test_label_reader_takes_numbers_of_any_type(dtype: Any) -> None:
    assert read(reader(ignore_index=100), [[0, 1], [2, 100]], dtype=dtype) == [[1, 2], [3, 0]]


@pytest.mark.parametrize(("number", "dtype"), [(-1, np.int16), (-90, np.int8), (70_000, np.int32), (65_535, np.uint16)])
def test_label_reader_takes_numbers_beyond_a_byte(number: int, dtype: Any) -> None:
    values = [[0, number, 2], [number, 1, 1]]
    assert read(reader(ignore_values=[number]), values, dtype=dtype) == [[1, 0, 3], [0, 2, 2]]
    assert read(reader(label_values=[0, [1, number], 2]), values, dtype=dtype) == [[1, 2, 3], [2, 2, 2]]
    with pytest.raises(BadFileError, match=rf"0 to 2: {number} \(2 pixels\)"):
        read(reader(), values, dtype=dtype)


def test_label_reader_joins_ranges_and_lists() -> None:
    card = {"label_values": ["0-127", [128, "130-140"], 255], "ignore_values": [129, "200-210"]}
    assert read(reader(**card), [[0, 127, 128, 129, 130, 140, 205, 255]]) == [[1, 1, 2, 0, 2, 2, 0, 3]]
    with pytest.raises(BadFileError, match=r"outside those of `label_values`: 141 \(1 pixels\), 199 \(2 pixels\)\. "):
        read(reader(**card), [[141, 199, 199]])


def test_label_reader_names_the_first_unknown_numbers() -> None:
    with pytest.raises(BadFileError, match=r"classes 0 to 2: 3 \(1 pixels\), 4 .*, 5 .*, 6 .*, 7 \(1 pixels\) and 2 more"):
        read(reader(), [[3, 4, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize(
    ("label_values", "expected"),
    [([], [1, 2]), ([0, 255], [1, 2]), ([0, 1], [1, 2]), (["0-127", "128-255"], [1, 2]), ([1, 0], [2, 1]), ([255, 0], [2, 1])],
    ids=["plain", "white-255", "white-1", "halves", "turned-1", "turned-255"],
)
def test_label_reader_takes_one_bit(label_values: list[Any], expected: list[int]) -> None:
    """Black and white of a file of one bit mean what 0 and 255, or 0 and 1, do in one of eight."""
    assert read(reader("ab", label_values=label_values), [[False, True]], dtype=bool) == [expected]


def test_label_reader_takes_numbers_stored_as_grey_colours() -> None:
    assert read(reader(), [[[2, 2, 2], [0, 0, 0]]]) == [[3, 1]]
    with pytest.raises(BadFileError, match="is a colour image"):
        read(reader(), [[[2, 2, 1], [0, 0, 0]]])


def test_label_reader_keeps_256_classes_apart() -> None:
    many = LabelReader(DataCard(name="x", classes=[f"c{n}" for n in range(300)], patch_size=[8, 8], ignore_index=65535))
    codes = many(StoredLabel(np.array([[0, 254, 255, 299, 65535]], np.uint16)))
    assert codes.dtype == np.int16
    assert codes.tolist() == [[1, 255, 256, 300, 0]]
    assert many.padding not in codes


COLORS = {"label_encoding": "color", "palette": [[0, 0, 0], [128, 0, 0], [0, 0, 255]], "ignore_colors": [[255, 255, 255]]}


def test_label_reader_takes_colours() -> None:
    values = [[[0, 0, 0], [128, 0, 0]], [[0, 0, 255], [255, 255, 255]]]
    assert read(reader(**COLORS), values) == [[1, 2], [3, 0]]
    assert read(reader(**COLORS), [[3, 0], [1, 2]], palette=[[0, 0, 255], [0, 0, 0], [255, 255, 255], [128, 0, 0]]) == [[2, 3], [1, 0]], (
        "a palette file"
    )
    assert read(reader(**COLORS), [[0, 255]]) == [[1, 0]], "a grey file: black and white"
    assert read(reader(**COLORS), [[False, True]], dtype=bool) == [[1, 0]], "and one of one bit"
    with pytest.raises(BadFileError, match="expected a colour image, as `label_encoding` says, but got uint16"):
        read(reader(**COLORS), [[0, 1]], dtype=np.uint16)


def test_label_reader_names_the_most_frequent_wrong_colours() -> None:
    values = [[[1, 0, 0], [9, 9, 9], [9, 9, 9], [0, 0, 0]], [[3, 0, 0], [4, 0, 0], [4, 0, 0], [4, 0, 0]]]
    expected = r"\(4, 0, 0\) at 3 pixel\(s\), \(9, 9, 9\) at 2 pixel\(s\), \(1, 0, 0\) at 1 pixel\(s\) and 1 more colours\. .*`color_tolerance`"
    with pytest.raises(BadFileError, match=expected):
        read(reader(**COLORS), values)


def test_label_reader_takes_nearby_colours_up_to_the_tolerance() -> None:
    near = reader(**COLORS, color_tolerance=5)
    assert read(near, [[[5, 5, 0], [123, 5, 5], [0, 4, 250], [250, 255, 251]]]) == [[1, 2, 3, 0]]
    with pytest.raises(BadFileError, match=r"\(6, 0, 0\) at 1 pixel"):
        read(near, [[[6, 0, 0], [5, 0, 0]]])


def test_label_reader_checks_the_colours_of_a_palette_file() -> None:
    card = {"palette": [[0, 0, 0], [128, 0, 0], [0, 0, 255]], "ignore_index": 255}
    right = [[0, 0, 0], [128, 0, 0], [0, 0, 255], *[[9, 9, 9]] * 253]
    assert read(reader(**card), [[0, 1, 2, 255]], palette=right) == [[1, 2, 3, 0]], "what is no class may have any colour"
    grey = np.arange(256)[:, None].repeat(3, axis=1)
    assert read(reader(**card), [[0, 1, 2]], palette=grey) == [[1, 2, 3]], "a grey ramp colours nothing"
    swapped = [right[0], right[2], right[1], *right[3:]]
    assert read(reader(**card), [[0, 0]], palette=swapped) == [[1, 1]], "numbers that do not occur are not looked at"
    with pytest.raises(BadFileError, match=r"its palette shows 1 as \(0, 0, 255\), but the card's b is \(128, 0, 0\)"):
        read(reader(**card), [[0, 1]], palette=swapped)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535), (bool, 1)])
def test_label_reader_takes_brightness_as_the_share_of_the_second_class(dtype: Any, top: int) -> None:
    values = [[0, top], [top, 0]] if dtype is bool else [[0, top], [top // 5, 4 * (top // 5)]]
    shares = reader("ab", soft_labels=True)(StoredLabel(np.array(values, dtype)))
    assert shares.shape == (2, 2, 3)
    np.testing.assert_allclose(shares[..., 1], np.array(values) / top, atol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=2), 1, atol=1e-6)
    assert not shares[..., 2].any()


def test_label_reader_gives_pixels_without_shares_to_no_class() -> None:
    soft = reader(soft_labels=True)
    stored = np.array([[[0.5, 0.25, 0.25], [0, 0, 0]]], np.float64)
    assert soft(StoredLabel(stored)).tolist() == [[[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]]
    counts, ignored = soft.count(soft(StoredLabel(stored)))
    assert (counts.tolist(), ignored) == ([0.5, 0.25, 0.25], 1.0)


def test_label_reader_counts_pixels() -> None:
    hard = reader(ignore_index=255)
    counts, ignored = hard.count(hard(StoredLabel(np.array([[0, 2, 2], [255, 2, 255]], np.uint8))))
    assert (counts.tolist(), ignored) == ([1.0, 0.0, 3.0], 2.0)
