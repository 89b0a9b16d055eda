"""Saved probabilities of every format come back as they were, with other values in them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from densecal.data.arrays import open_array
from densecal.data.repair import StoredPrediction, find_predictions

PROBS = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5, 6)).astype(np.float32)  # (X, Y, Z, C)
FIRST = np.moveaxis(PROBS, -1, 0)


def nifti(path: Path, values: np.ndarray, *, sixteen_bits: bool = False) -> None:
    affine = np.array([[0.9, -0.3, 0.2, -12.0], [0.25, 1.1, -0.1, 7.5], [-0.2, 0.15, 1.8, 30.0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.rint(65535 * values.astype(float)).astype(np.uint16) if sixteen_bits else values, affine)
    if sixteen_bits:
        image.header.set_slope_inter(1 / 65535, 0)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


WRITERS = {
    "nnunet.npz": lambda path: np.savez_compressed(path, probabilities=FIRST.transpose(0, 3, 2, 1)),
    "several.npz": lambda path: np.savez(path, probs=FIRST, spacing=np.ones(3)),
    "first.npy": lambda path: np.save(path, FIRST),
    "last.npy": lambda path: np.save(path, PROBS),
    "batch.npy": lambda path: np.save(path, FIRST[None]),
    "half.npy": lambda path: np.save(path, FIRST.astype(np.float16)),
    "double.npy": lambda path: np.save(path, FIRST.astype(np.float64)),
    "brain.safetensors": lambda path: save_file({"probs": torch.from_numpy(FIRST.copy()).bfloat16()}, path, {"by": "me"}),
    "volume.nii.gz": lambda path: nifti(path, PROBS),
    "unused_axis.nii": lambda path: nifti(path, PROBS[:, :, :, None]),
    "sixteen_bits.nii.gz": lambda path: nifti(path, PROBS, sixteen_bits=True),
}
FOREGROUND = {
    "grey.png": lambda path: Image.fromarray(np.rint(255 * PROBS[..., 0, 0]).astype(np.uint8)).save(path),
    "grey_16.png": lambda path: Image.fromarray(np.rint(65535 * PROBS[..., 0, 0]).astype(np.uint16)).save(path),
    "grey.tif": lambda path: Image.fromarray(PROBS[..., 0, 0]).save(path),
    "map.nii.gz": lambda path: nifti(path, PROBS[..., 0]),
    "one_channel.npy": lambda path: np.save(path, PROBS[None, ..., 0]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_file_comes_back_as_it_was(name, tmp_path):
    source, target = tmp_path / name, tmp_path / "out" / name
    WRITERS[name](source)
    stored = StoredPrediction.open(source, 3, "softmax")
    values = stored.read(3, "softmax")
    assert values.shape[0] == 3
    flat = values.flatten(1).sort(1).values.double()
    np.testing.assert_allclose(flat, np.sort(FIRST.reshape(3, -1), axis=1), atol=5e-3 if name.startswith("brain") else 1e-3)
    stored.write(target, values)
    before, after = open_array(source, ("probabilities", "probs")), open_array(target, ("probabilities", "probs"))
    for key in ("format", "shape", "dtype", "key", "spacing"):
        assert getattr(before, key) == getattr(after, key), key
    np.testing.assert_array_equal(before.read(), after.read())
    assert [path.name for path in target.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", FOREGROUND)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probability_of_the_foreground_is_two_classes_or_a_region(name, activation, tmp_path):
    source, target = tmp_path / name, tmp_path / "out" / name
    FOREGROUND[name](source)
    stored = StoredPrediction.open(source, 2 if activation == "softmax" else 1, activation)
    values = stored.read(2 if activation == "softmax" else 1, activation)
    assert values.shape[0] == (2 if activation == "softmax" else 1)
    stored.write(target, values)
    before, after = open_array(source), open_array(target)
    assert (before.shape, before.dtype) == (after.shape, after.dtype)
    np.testing.assert_array_equal(before.read(), after.read())
    stored.write(target, 1 - values)
    np.testing.assert_allclose(open_array(target).read().astype(float) / stored._scale, 1 - before.read().astype(float) / stored._scale, atol=1e-6)


def test_nifti_keeps_its_place_and_scale(tmp_path):
    WRITERS["sixteen_bits.nii.gz"](tmp_path / "a.nii.gz")
    stored = StoredPrediction.open(tmp_path / "a.nii.gz", 3, "softmax")
    stored.write(tmp_path / "b.nii.gz", stored.read(3, "softmax").flip(0))
    before, after = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(before.affine, after.affine)
    assert before.header.get_xyzt_units() == after.header.get_xyzt_units()
    assert after.header.get_data_dtype() == np.uint16
    assert after.dataobj.slope == pytest.approx(1 / 65535)
    np.testing.assert_allclose(after.get_fdata(), before.get_fdata()[..., ::-1], atol=1 / 65535)


def test_what_else_a_file_holds_stays(tmp_path):
    for name in ("several.npz", "brain.safetensors"):
        WRITERS[name](tmp_path / name)
        stored = StoredPrediction.open(tmp_path / name, 3, "softmax")
        stored.write(tmp_path / "out" / name, stored.read(3, "softmax"))
    with np.load(tmp_path / "out" / "several.npz") as archive:
        np.testing.assert_array_equal(archive["spacing"], np.ones(3))
    with safe_open(tmp_path / "out" / "brain.safetensors", framework="pt") as file:
        assert file.metadata() == {"by": "me"}


def test_remains_of_cropping_are_background(tmp_path):
    probs = FIRST.transpose(0, 3, 2, 1).copy()
    probs[:, 0] = 0
    np.savez(tmp_path / "a.npz", probabilities=probs)
    values = StoredPrediction.open(tmp_path / "a.npz", 3, "softmax").read(3, "softmax")
    assert values[0, 0].eq(1).all()
    assert values[1:, 0].eq(0).all()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path.with_suffix(".npy"), np.zeros((4, 5, 6), np.uint8)), r"without an axis of 3 classes"),
        (lambda path: np.save(path.with_suffix(".npy"), np.zeros((3, 4, 5), np.uint8)), r"hard label map"),
        (lambda path: np.save(path.with_suffix(".npy"), np.zeros((3, 4, 3), np.float32)), r"two axes may be that of 3 classes.*axes=channels_first"),
        (lambda path: np.save(path.with_suffix(".npy"), np.zeros((4, 5, 6), np.float32)), r"without an axis of 3 classes"),
        (lambda path: path.with_suffix(".npz").write_bytes(b"half"), r"cannot be read"),
    ],
    ids=["label-map", "label-map-of-three-slices", "two-axes", "no-axis", "damaged"],
)
def test_what_cannot_be_repaired_is_named(write, message, tmp_path):
    write(tmp_path / "a")
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
        StoredPrediction.open(path, 3, "softmax")


def test_nan_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.full((3, 4, 5), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"a\.npy: holds NaN"):
        StoredPrediction.open(tmp_path / "a.npy", 3, "softmax").read(3, "softmax")


def test_find_predictions_takes_probabilities_before_label_maps(tmp_path):
    np.savez(tmp_path / "a.npz", probabilities=FIRST)
    nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8))
    nifti(tmp_path / "b_probs.nii.gz", PROBS)
    for name in ("b_label.nii.gz", "b_confidence.nii.gz", ".hidden.nii.gz"):
        nifti(tmp_path / name, np.zeros((4, 5, 6), np.uint8))
    (tmp_path / "a.pkl").write_bytes(b"")
    assert find_predictions(tmp_path) == {"a": tmp_path / "a.npz", "b": tmp_path / "b_probs.nii.gz"}


def test_find_predictions_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_predictions(tmp_path / "none")
    with pytest.raises(ValueError, match="found no predictions"):
        find_predictions(tmp_path)
    np.save(tmp_path / "a.npy", FIRST)
    np.savez(tmp_path / "a.npz", FIRST)
    with pytest.raises(ValueError, match=r"case 'a' is in more than one file \(a\.npy and a\.npz\)"):
        find_predictions(tmp_path)
