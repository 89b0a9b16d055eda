from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import mask, photo, save, voc_palette
from PIL import Image
from scipy.io import savemat
from volumes import save as save_volume

from densecal.data.images.files import decode_fully, read_image, read_label


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.PNG"])
def test_read_image_gives_what_was_saved(tmp_path: Path, name: str) -> None:
    colors, grey = photo(1), photo(1)[..., 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / name, colors), 3), colors)
    np.testing.assert_array_equal(read_image(save(tmp_path / name, grey), 1), grey[..., None])
    np.testing.assert_array_equal(read_image(save(tmp_path / name, grey), 3), np.dstack([grey] * 3))


def test_read_image_turns_colours_into_grey_by_their_brightness(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", np.tile(np.array([255, 0, 0], np.uint8), (4, 6, 1))), 1)
    assert image.shape == (4, 6, 1)
    assert set(image.ravel()) == {round(0.299 * 255)}


def test_read_image_leaves_transparency_out(tmp_path: Path) -> None:
    colors = photo(2)
    alpha = np.dstack([colors, mask([0, 255])])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", alpha), 3), colors)


def test_read_image_reads_palettes_and_one_bit(tmp_path: Path) -> None:
    numbers = mask(range(21))
    np.testing.assert_array_equal(read_image(save(tmp_path / "p.png", numbers, palette=voc_palette()), 3), voc_palette()[numbers])
    bits = mask([0, 1]).astype(bool)
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", bits), 1)[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_read_image_scales_16_bits(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 1, 32768, 65535]] * 2, np.uint16)
    image = read_image(save(tmp_path / name, values), 1)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[..., 0], values / 65535, rtol=1e-6)


def test_read_image_keeps_floats(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((6, 5), np.float32)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", values), 1)[..., 0], values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_turns_as_the_camera_noted(tmp_path: Path, orientation: int) -> None:
    """The eight cases of the Exif standard: the row and column that the first row and column of the file are when shown."""
    stored = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((8, 16), np.uint8))  # four flat blocks survive JPEG
    first = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left")}
    first |= {5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}
    rows, columns = first[orientation]  # where the stored first row, and the stored first column, are seen
    shown = stored if orientation < 5 else stored.T
    vertical, horizontal = (rows, columns) if orientation < 5 else (columns, rows)
    shown = shown[::-1] if vertical == "bottom" else shown
    shown = shown[:, ::-1] if horizontal == "right" else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", stored, exif=exif, quality=100)
    np.testing.assert_allclose(read_image(path, 1, "apply")[..., 0], shown, atol=2)
    np.testing.assert_allclose(read_image(path, 1, "ignore")[..., 0], stored, atol=2)


def test_read_image_refuses_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match="not an image that OpenCV can read"):
            read_image(tmp_path / name, 3)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "c.png", 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_decode_fully_notices_a_file_cut_short(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, photo(0))
    decode_fully(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises((OSError, SyntaxError)):
        decode_fully(path)
    with pytest.raises(FileNotFoundError):
        decode_fully(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize(
    ("name", "dtype", "top"),
    [("a.png", np.uint8, 255), ("a.png", np.uint16, 65535), ("a.tif", np.int32, 10**6), ("a.tif", np.float32, 3), ("a.png", bool, 1)],
)
def test_read_label_keeps_numbers(tmp_path: Path, name: str, dtype: Any, top: int) -> None:
    values = np.array([[0, 1, top], [top, 0, 1]]).astype(dtype)
    stored = read_label(save(tmp_path / name, values))
    np.testing.assert_array_equal(stored.values, values)
    assert stored.values.dtype == dtype
    assert stored.palette is None


def test_read_label_keeps_the_numbers_of_a_palette(tmp_path: Path) -> None:
    numbers = mask([*range(21), 255])
    for name in ("a.png", "a.gif"):
        stored = read_label(save(tmp_path / name, numbers, palette=voc_palette(), **({"optimize": False} if name.endswith("gif") else {})))
        np.testing.assert_array_equal(stored.values, numbers)
        assert stored.palette is not None
        np.testing.assert_array_equal(stored.palette[numbers], voc_palette()[numbers])


def test_read_label_leaves_transparency_out(tmp_path: Path) -> None:
    colors, alpha = photo(0), mask([0, 255])
    np.testing.assert_array_equal(read_label(save(tmp_path / "a.png", np.dstack([colors, alpha]))).values, colors)
    np.testing.assert_array_equal(read_label(save(tmp_path / "b.png", np.dstack([alpha, alpha]))).values, alpha)


def test_read_label_reads_arrays(tmp_path: Path) -> None:
    shares = np.random.default_rng(0).random((4, 5, 3), np.float32)
    np.save(tmp_path / "a.npy", shares)
    np.savez_compressed(tmp_path / "a.npz", probs=shares)
    for name in ("a.npy", "a.npz"):
        np.testing.assert_array_equal(read_label(tmp_path / name).values, shares)
    np.savez(tmp_path / "b.npz", one=shares, two=shares)
    with pytest.raises(ValueError, match="expected one array, but it has one, two"):
        read_label(tmp_path / "b.npz")
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_label(tmp_path / "b.npy")


def test_read_label_refuses_another_matlab_file(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"labels": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="expected the variable GTcls of the Semantic Boundaries Dataset"):
        read_label(tmp_path / "a.mat")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)], ids=str)
def test_slices_in_nifti_files_are_images_and_labels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.arange(35, dtype=np.float32).reshape(shape) * 10 - 100
    path = save_volume(tmp_path / "i.nii.gz", values)
    image = read_image(path, 3)
    assert image.shape == (7, 5, 3)  # rows are the file's second axis
    assert image[0, 1].tolist() == pytest.approx([7 / 34] * 3)
    assert (image.min(), image.max()) == (0, 1)
    label = save_volume(tmp_path / "l.nii.gz", (values > 0).astype(np.uint8))
    assert (read_label(label).values == (values.reshape(5, 7).T > 0)).all()
    assert not read_image(save_volume(tmp_path / "c.nii.gz", np.full(shape, 7, np.int16)), 1).any()


def test_a_volume_is_no_image(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "v.nii.gz", np.zeros((5, 7, 3), np.uint8))
    for read in (lambda: read_image(path, 1), lambda: read_label(path)):
        with pytest.raises(ValueError, match=r"expected one slice \(X, Y\) or \(X, Y, 1\), but got shape \(5, 7, 3\)"):
            read()
