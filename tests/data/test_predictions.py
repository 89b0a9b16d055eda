from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from densecal.data.arrays import ArrayFile
from densecal.data.card import DataCard, load_card
from densecal.data.card_labels import CardLabels
from densecal.data.layouts import Case
from densecal.data.medium import OpenedImage
from densecal.data.nnunet import describe_labels
from densecal.data.predictions import PredictionFolder, PredictionProblem
from densecal.data.validate import DataProblems
from densecal.inference.predictor import Prediction, write_description, write_prediction
from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation

SHAPE = (5, 7, 4)
AFFINE = np.array([[-0.7, 0, 0, 3], [0, 1.1, 0, -5], [0, 0, 2.5, 8], [0, 0, 0, 1]])
TURNED = np.array([[0, 0, 2.5, 3], [-0.7, 0, 0, -5], [0, -1.1, 0, 8], [0, 0, 0, 1]])  # voxel axes P, I, R


def make_probs(shape: tuple[int, ...] = SHAPE, classes: int = 3, seed: int = 0) -> np.ndarray:
    return torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed)).softmax(0).numpy()


def make_label(shape: tuple[int, ...] = SHAPE, classes: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)


def write(path: Path, values: np.ndarray, *, affine: np.ndarray = AFFINE, key: str = "probs") -> Path:
    """Write an array in the format of the file's ending, as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(values, affine), path)
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{key: values})
    elif path.suffix == ".safetensors":
        save_file({key: torch.from_numpy(np.ascontiguousarray(values))}, path)
    else:
        Image.fromarray(values).save(path)
    return path


def write_nnunet(folder: Path, case_id: str, probs: np.ndarray, *, affine: np.ndarray = AFFINE, v1: bool = False) -> None:
    """What nnU-Net leaves of a volume ``(C, X, Y, Z)``: probabilities (C, Z, Y, X) in half precision, the hard map and a pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.ascontiguousarray(probs.transpose(0, 3, 2, 1)).astype(np.float16)
    np.savez_compressed(folder / f"{case_id}.npz", **{"softmax" if v1 else "probabilities": values})
    write(folder / f"{case_id}.nii.gz", probs.argmax(0).astype(np.uint8), affine=affine)
    (folder / f"{case_id}.pkl").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")  # would run a command if it were unpickled
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "labels"


def only(folder: PredictionFolder) -> Any:
    assert folder.problems() == []
    (case,) = folder
    return case


# Formats

# How an array (C, X, Y, Z) is stored, and within what it comes back.
VOLUMES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], float]] = {
    "npy-first": ("a.npy", lambda p: p, 0),
    "npy-last": ("a.npy", lambda p: np.moveaxis(p, 0, -1), 0),
    "npy-reversed": ("a.npy", lambda p: p.transpose(0, 3, 2, 1), 0),
    "npy-batch-of-one": ("a.npy", lambda p: p[None], 0),
    "npy-fortran": ("a.npy", np.asfortranarray, 0),
    "npy-big-endian": ("a.npy", lambda p: p.astype(">f4"), 0),
    "npy-fp64": ("a.npy", lambda p: p.astype(np.float64), 0),
    "npy-fp16": ("a.npy", lambda p: p.astype(np.float16), 3e-4),
    "npz-any-key": ("a.npz", lambda p: p, 0),
    "safetensors": ("a.safetensors", lambda p: p, 0),
    "nifti": ("a.nii", lambda p: np.moveaxis(p, 0, -1), 0),
    "nifti-gz": ("a.nii.gz", lambda p: np.moveaxis(p, 0, -1), 0),
    "nifti-itk-vector": ("a.nii.gz", lambda p: np.moveaxis(p, 0, -1)[:, :, :, None], 0),
    "affix": ("a_probs.nii.gz", lambda p: np.moveaxis(p, 0, -1), 0),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_every_format_gives_the_same_volume(folders: tuple[Path, Path], name: str) -> None:
    file, store, tolerance = VOLUMES[name]
    probs, label = make_probs(), make_label()
    write(folders[0] / file, store(probs))
    write(folders[1] / "a.nii.gz", label)
    folder = PredictionFolder(*folders)
    case = only(folder)
    assert (folder.num_classes, folder.case_ids, case.case_id) == (3, ("a",), "a")
    assert case.probs.dtype == torch.float32
    torch.testing.assert_close(case.probs, torch.from_numpy(probs), rtol=0, atol=tolerance)
    assert torch.equal(case.label, torch.from_numpy(label).long())
    assert case.spacing == pytest.approx((0.7, 1.1, 2.5))
    assert case.axis_names == ("sagittal", "coronal", "axial")


def test_bfloat16_safetensors(folders: tuple[Path, Path]) -> None:
    probs = torch.from_numpy(make_probs()).bfloat16()
    save_file({"anything": probs}, folders[0] / "a.safetensors")
    write(folders[1] / "a.nii.gz", make_label())
    assert torch.equal(only(PredictionFolder(*folders)).probs, probs.float())


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_nnunet_volume_is_turned_and_wins_over_its_hard_map(folders: tuple[Path, Path], v1: bool) -> None:
    probs = make_probs()
    write_nnunet(folders[0], "a", probs, v1=v1)
    write(folders[1] / "a.nii.gz", make_label())
    torch.testing.assert_close(only(PredictionFolder(*folders)).probs, torch.from_numpy(probs), rtol=0, atol=3e-4)


def test_nnunet_cube_is_turned_by_rule(folders: tuple[Path, Path]) -> None:
    probs = make_probs((4, 4, 4))
    write_nnunet(folders[0], "a", probs)
    write(folders[1] / "a.nii.gz", make_label((4, 4, 4)))
    torch.testing.assert_close(only(PredictionFolder(*folders)).probs, torch.from_numpy(probs), rtol=0, atol=3e-4)


def test_nnunet_reader_that_reorients_is_undone(folders: tuple[Path, Path]) -> None:
    probs = make_probs()
    stored = nib.Nifti1Image(np.moveaxis(probs, 0, -1), TURNED)
    ras = np.moveaxis(nib.as_closest_canonical(stored).get_fdata(dtype=np.float32), -1, 0)
    assert ras.shape == (3, 4, 5, 7)
    write_nnunet(folders[0], "a", ras)
    write(folders[0] / "a.nii.gz", probs.argmax(0).astype(np.uint8), affine=TURNED)
    (folders[0] / "plans.json").write_text(json.dumps({"image_reader_writer": "NibabelIOWithReorient"}))
    write(folders[1] / "a.nii.gz", make_label(), affine=TURNED)
    case = only(PredictionFolder(*folders))
    torch.testing.assert_close(case.probs, torch.from_numpy(probs), rtol=0, atol=3e-4)
    assert case.axis_names == ("coronal", "axial", "sagittal")


def test_nnunet_surroundings_of_its_crop_are_background(folders: tuple[Path, Path]) -> None:
    probs = make_probs()
    probs[:, :2] = 0
    write_nnunet(folders[0], "a", probs)
    write(folders[1] / "a.nii.gz", make_label())
    case = only(PredictionFolder(*folders))
    assert (case.probs[0, :2] == 1).all()
    assert (case.probs[1:, :2] == 0).all()
    torch.testing.assert_close(case.probs[:, 2:], torch.from_numpy(probs[:, 2:]), rtol=0, atol=3e-4)


def test_nnunet_v1_crop_says_what_is_missing(folders: tuple[Path, Path]) -> None:
    write_nnunet(folders[0], "a", make_probs((5, 6, 4)), v1=True)
    write(folders[1] / "a.nii.gz", make_label())
    (problem,) = PredictionFolder(*folders).problems()
    assert problem.kind == "shape"
    assert "saves the box it cropped to" in str(problem)


def test_nnunet_natural_image(folders: tuple[Path, Path]) -> None:
    probs, label = make_probs((6, 9)), make_label((6, 9))
    np.savez_compressed(folders[0] / "a.npz", probabilities=probs[:, None])
    write(folders[0] / "a.png", probs.argmax(0).astype(np.uint8))
    write(folders[1] / "a.png", label)
    case = only(PredictionFolder(*folders))
    assert torch.equal(case.probs, torch.from_numpy(probs))
    assert torch.equal(case.label, torch.from_numpy(label).long())
    assert (case.spacing, case.axis_names) == (None, ())


@pytest.mark.parametrize("square", [False, True], ids=["oblong", "square"])
def test_nnunet_two_dimensional_nifti(folders: tuple[Path, Path], square: bool) -> None:
    shape = (6, 6) if square else (6, 9)
    probs = make_probs(shape)
    np.savez_compressed(folders[0] / "a.npz", probabilities=probs.transpose(0, 2, 1)[:, None])
    write(folders[1] / "a.nii.gz", make_label(shape))
    case = only(PredictionFolder(*folders))
    assert torch.equal(case.probs, torch.from_numpy(probs))
    assert case.spacing == pytest.approx((0.7, 1.1))


def test_nnunet_beside_array_labels_takes_the_order_that_fits(folders: tuple[Path, Path]) -> None:
    probs = make_probs()
    for name, values in (("as_it_is", probs), ("reversed", probs.transpose(0, 3, 2, 1))):
        write(folders[0] / f"{name}.npz", values, key="probabilities")
        write(folders[1] / f"{name}.npy", make_label())
    for case in PredictionFolder(*folders):
        assert torch.equal(case.probs, torch.from_numpy(probs))


def test_nnunet_cube_beside_an_array_label_asks(folders: tuple[Path, Path]) -> None:
    probs = make_probs((4, 4, 4))
    write(folders[0] / "a.npz", probs, key="probabilities")
    write(folders[1] / "a.npy", make_label((4, 4, 4)))
    with pytest.raises(ValueError, match=r"fits the label's \(4, 4, 4\) in more than one order.*axes=channels_first, axes=nnunet"):
        PredictionFolder(*folders)[0]
    assert torch.equal(only(PredictionFolder(*folders, axes="channels_first")).probs, torch.from_numpy(probs))
    assert torch.equal(only(PredictionFolder(*folders, axes="nnunet")).probs, torch.from_numpy(probs.transpose(0, 3, 2, 1)))


@pytest.mark.parametrize("axes", ["channels_first", "channels_last", "nnunet"])
def test_axes_decide_where_several_fit(folders: tuple[Path, Path], axes: str) -> None:
    values = make_probs((3, 3, 3))
    values = {"channels_last": np.moveaxis(values, 0, -1)}.get(axes, values)
    write(folders[0] / "a.npy", values)
    write(folders[1] / "a.nii.gz", make_label((3, 3, 3)))
    (problem,) = PredictionFolder(*folders).problems()
    assert "axes=channels_first, axes=channels_last, axes=nnunet" in str(problem)
    expected = {"channels_first": values, "channels_last": np.moveaxis(values, -1, 0), "nnunet": values.transpose(0, 3, 2, 1)}[axes]
    assert torch.equal(only(PredictionFolder(*folders, axes=axes)).probs, torch.from_numpy(np.ascontiguousarray(expected)))


def test_nnunet_order_given_for_images_keeps_rows_first(folders: tuple[Path, Path]) -> None:
    probs = make_probs((6, 9))
    write(folders[0] / "a.npy", probs[:, None])
    write(folders[1] / "a.png", make_label((6, 9)))
    assert torch.equal(only(PredictionFolder(*folders, axes="nnunet")).probs, torch.from_numpy(probs))


def test_scaled_nifti(folders: tuple[Path, Path]) -> None:
    probs, label = make_probs(classes=2), make_label(classes=2)
    for name, values, folder in (("a", probs[1], folders[0]), ("a", label.astype(np.float64), folders[1])):
        image = nib.Nifti1Image(values, AFFINE)
        image.set_data_dtype(np.int16)  # nibabel picks a slope
        nib.save(image, folder / f"{name}.nii.gz")
    assert nib.load(folders[0] / "a.nii.gz").dataobj.slope not in (1, np.nan)
    case = only(PredictionFolder(*folders))
    torch.testing.assert_close(case.probs[1], torch.from_numpy(probs[1]), rtol=0, atol=1e-4)
    assert torch.equal(case.label, torch.from_numpy(label).long())


def test_spacing_is_in_millimetres(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.npy", make_probs())
    image = nib.Nifti1Image(make_label(), AFFINE)
    image.header.set_xyzt_units("micron")
    nib.save(image, folders[1] / "a.nii.gz")
    assert only(PredictionFolder(*folders)).spacing == pytest.approx((0.7e-3, 1.1e-3, 2.5e-3))


# The probability of the foreground alone


@pytest.mark.parametrize(
    ("file", "dtype", "scale"),
    [("a.png", np.uint8, 255), ("a.png", np.uint16, 65535), ("a.tif", np.uint8, 255), ("a.tiff", np.uint16, 65535), ("a.tif", np.float32, 1)],
)
def test_image_of_the_foreground(folders: tuple[Path, Path], file: str, dtype: Any, scale: int) -> None:
    foreground = make_probs((6, 9), classes=2)[1]
    write(folders[0] / file, (np.rint(foreground * scale) if scale > 1 else foreground).astype(dtype))
    write(folders[1] / "a.png", make_label((6, 9), classes=2))
    folder = PredictionFolder(*folders)
    case = only(folder)
    expected = torch.from_numpy(np.stack([1 - foreground, foreground]))
    assert folder.num_classes == 2
    torch.testing.assert_close(case.probs, expected, rtol=0, atol=(0.5 / scale if scale > 1 else 0) + 1e-7)


@pytest.mark.parametrize("with_channel", [False, True])
def test_volume_of_the_foreground(folders: tuple[Path, Path], with_channel: bool) -> None:
    foreground = make_probs(classes=2)[1]
    write(folders[0] / "n.nii.gz", foreground[..., None] if with_channel else foreground)
    write(folders[0] / "p.npy", foreground[None] if with_channel else foreground)
    write(folders[0] / "z.npz", foreground.T[None] if with_channel else foreground.T)
    for name in "npz":
        write(folders[1] / f"{name}.nii.gz", make_label(classes=2))
    folder = PredictionFolder(*folders)
    assert folder.problems() == []
    for case in folder:
        torch.testing.assert_close(case.probs, torch.from_numpy(np.stack([1 - foreground, foreground])), rtol=0, atol=1e-7)


def test_16_bit_png_as_older_pillow_reads_it(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    foreground = make_probs((6, 9), classes=2)[1]
    write(folders[0] / "a.png", np.rint(65535 * foreground).astype(np.uint16))
    write(folders[1] / "a.npy", make_label((6, 9), classes=2))
    new = Image.open

    def old(path: Path) -> Image.Image:
        image = new(path).convert("I")
        image.format = "PNG"
        return image

    monkeypatch.setattr(Image, "open", old)
    torch.testing.assert_close(only(PredictionFolder(*folders)).probs[1], torch.from_numpy(foreground), rtol=0, atol=1e-5)


def test_pages_of_8_bits_are_scaled_to_sum_to_1(folders: tuple[Path, Path]) -> None:
    probs = make_probs((6, 9), classes=20)
    pages = [Image.fromarray(np.rint(255 * page).astype(np.uint8)) for page in probs]
    assert np.abs(sum(np.asarray(page).astype(float) for page in pages) / 255 - 1).max() > 5e-3, "else the tolerance is not tried"
    pages[0].save(folders[0] / "a.tif", save_all=True, append_images=pages[1:])
    write(folders[1] / "a.png", make_label((6, 9)))
    case = only(PredictionFolder(*folders))
    torch.testing.assert_close(case.probs.sum(0), torch.ones(6, 9))
    torch.testing.assert_close(case.probs, torch.from_numpy(probs), rtol=0.05, atol=0.5 / 255 + 1e-6)


def test_tiff_of_several_pages(folders: tuple[Path, Path]) -> None:
    probs = make_probs((6, 9))
    pages = [Image.fromarray(page) for page in probs]
    pages[0].save(folders[0] / "a.tif", save_all=True, append_images=pages[1:])
    stack = [Image.fromarray(page) for page in make_label((4, 6, 9), classes=2)]
    stack[0].save(folders[1] / "v.tif", save_all=True, append_images=stack[1:])
    write(folders[1] / "a.png", make_label((6, 9)))
    write(folders[0] / "v.npy", make_probs((4, 6, 9)))
    cases = PredictionFolder(*folders)
    assert torch.equal(cases["a"].probs, torch.from_numpy(probs))
    assert torch.equal(cases["v"].label, torch.from_numpy(make_label((4, 6, 9), classes=2)).long())


# Labels


@pytest.mark.parametrize("file", ["a.nii.gz", "a.nii", "a.npy", "a.npz", "a.safetensors"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_label_volumes(folders: tuple[Path, Path], file: str, dtype: Any) -> None:
    label = make_label()
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / file, label.astype(dtype))
    assert torch.equal(only(PredictionFolder(*folders)).label, torch.from_numpy(label).long())


@pytest.mark.parametrize("form", ["grey", "16bit", "palette", "tif", "tif16"])
def test_label_images(folders: tuple[Path, Path], form: str) -> None:
    classes = 300 if "16" in form else 3
    label = make_label((6, 9)).astype(np.int64)
    label[0, 0] = classes - 1
    write(folders[0] / "a.npy", make_probs((6, 9), classes=classes))
    path = folders[1] / ("a.tif" if "tif" in form else "a.png")
    image = Image.fromarray(label.astype(np.uint16 if "16" in form else np.uint8))
    if form == "palette":
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        assert image.mode == "P"
    image.save(path)
    assert torch.equal(only(PredictionFolder(*folders)).label, torch.from_numpy(label))


def test_label_with_a_channel_axis(folders: tuple[Path, Path]) -> None:
    label = make_label()
    write(folders[0] / "n.npy", make_probs())
    write(folders[1] / "n.nii.gz", label[..., None])
    write(folders[0] / "p.npy", make_probs())
    write(folders[1] / "p.npy", label[None])
    for case in PredictionFolder(*folders):
        assert torch.equal(case.label, torch.from_numpy(label).long())


@pytest.mark.parametrize("file", ["a.nii.gz", "a.npy", "a.safetensors"])
def test_soft_reference(folders: tuple[Path, Path], file: str) -> None:
    shares = make_probs(seed=5)
    shares[:, 0] = 0  # no label there
    write(folders[0] / "a.nii.gz", np.moveaxis(make_probs(), 0, -1))
    write(folders[1] / file, np.moveaxis(shares, 0, -1) if "nii" in file else shares)
    case = only(PredictionFolder(*folders))
    assert case.label.dtype == torch.float32
    assert torch.equal(case.label, torch.from_numpy(shares))


def test_soft_reference_with_marked_voxels(folders: tuple[Path, Path]) -> None:
    shares = make_probs(seed=5)
    shares[:, 0] = 255
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / "a.npy", shares)
    assert (only(PredictionFolder(*folders, ignore_index=255)).label[:, 0] == 255).all()
    with pytest.raises(ValueError, match=r"a\.npy: case 'a' expected shares in \[0, 1\] or ignore_index=-100, but got .* to 255"):
        PredictionFolder(*folders)[0]


def test_soft_reference_of_other_classes(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / "a.nii.gz", np.moveaxis(make_probs(classes=4), 0, -1))
    (problem,) = PredictionFolder(*folders).problems()
    assert "has the shape (3, 5, 7, 4), which does not fit the shape (5, 7, 4, 4) of its label a.nii.gz" in str(problem)


def test_ignored_labels_and_label_values(folders: tuple[Path, Path]) -> None:
    mask = np.where(make_label((6, 9), classes=2) == 1, 255, 0).astype(np.uint8)
    mask[0, :3] = 7
    write(folders[0] / "a.npy", make_probs((6, 9), classes=2))
    write(folders[1] / "a.png", mask)
    case = only(PredictionFolder(*folders, label_values=[0, 255], ignore_index=7))
    assert (case.label[0, :3] == 7).all()
    assert torch.equal(case.label[1:], torch.from_numpy(mask[1:] == 255).long())
    with pytest.raises(ValueError, match=r"labels other than the classes 0, 255 and ignore_index=-100: 7 \(3 voxels\)"):
        PredictionFolder(*folders, label_values=[0, 255])[0]


def test_label_values_may_come_in_any_order(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.npy", make_probs((1, 5), classes=4))
    write(folders[1] / "a.npy", np.array([[4, 0, 1, 2, 0]]))
    assert only(PredictionFolder(*folders, label_values=[0, 4, 2, 1])).label.tolist() == [[1, 0, 3, 2, 0]]


# dataset.json, regions, sigmoid


def test_class_names_from_dataset_json(folders: tuple[Path, Path]) -> None:
    write_nnunet(folders[0], "a", make_probs())
    label = make_label()
    label[0] = 3
    write(folders[1] / "a.nii.gz", label)
    (folders[0] / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "posterior": 2, "anterior": 1, "ignore": 3}}))
    folder = PredictionFolder(*folders)
    assert (folder.class_names, folder.num_classes, folder.ignore_index, folder.activation) == (
        ("background", "anterior", "posterior"),
        3,
        3,
        "softmax",
    )
    assert (only(folder).label[0] == 3).all()


@pytest.mark.parametrize("where", ["labels", "raw", "trainer"])
def test_dataset_json_in_its_usual_places(tmp_path: Path, where: str) -> None:
    predictions, labels = tmp_path / "trainer" / "fold_0" / "validation", tmp_path / "raw" / "labelsTr"
    write_nnunet(predictions, "a", make_probs())
    write(labels / "a.nii.gz", make_label())
    place = {"labels": labels, "raw": labels.parent, "trainer": tmp_path / "trainer"}[where]
    (place / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "cyst", "2": "vein"}}))
    assert PredictionFolder(predictions, labels).class_names == ("background", "cyst", "vein")


def test_validation_of_a_fold_should_hold_the_cases_of_its_summary(tmp_path: Path) -> None:
    """And no others, though ``labelsTr`` has the labels of all folds."""
    predictions, labels = tmp_path / "trainer" / "fold_0" / "validation", tmp_path / "raw" / "labelsTr"
    write_nnunet(predictions, "a", make_probs())
    for name in ("a", "b", "c"):
        write(labels / f"{name}.nii.gz", make_label())
    assert [problem.case_id for problem in PredictionFolder(predictions, labels).problems()] == ["b", "c"]
    cases = [{"prediction_file": f"/data/results/fold_0/validation/{name}.nii.gz", "metrics": {}} for name in ("a", "b")]
    (predictions / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    folder = PredictionFolder(predictions, labels)
    assert folder.case_ids == ("a",)
    assert [(problem.case_id, problem.kind) for problem in folder.problems()] == [("b", "missing")]
    (predictions / "summary.json").write_text(json.dumps({"metric_per_case": ["a"]}))
    with pytest.raises(ValueError, match=r'summary\.json: expected "metric_per_case" to name the "prediction_file" of each case'):
        PredictionFolder(predictions, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"dataset\.json: cannot be read \(JSONDecodeError"),
        ("[]", r'dataset\.json: expected "labels" to name the classes'),
        ('{"labels": {"background": 0, "a": 2}}', r'expected "labels" to number the classes 0 to 1'),
        ('{"labels": {"background": 0, "a": "x"}}', r'expected each of "labels" to be a whole number'),
        ('{"labels": {"background": 0, "a": 1}}', r"has 3 classes, but \['background', 'a'\] says 2"),
    ],
)
def test_dataset_json_that_makes_no_sense(folders: tuple[Path, Path], content: str, message: str) -> None:
    write_nnunet(folders[0], "a", make_probs())
    write(folders[1] / "a.nii.gz", make_label())
    (folders[0] / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        PredictionFolder(*folders)[0]


def test_regions_of_dataset_json(folders: tuple[Path, Path]) -> None:
    probs = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)).numpy()
    probs[:, 1] = 0  # nnU-Net's crop; nothing is there
    write_nnunet(folders[0], "a", probs)
    label = make_label(classes=4)
    label[0] = 4
    write(folders[1] / "a.nii.gz", label)
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    (folders[0] / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": [1, 2, 3]}))
    folder = PredictionFolder(*folders)
    assert (folder.class_names, folder.num_classes, folder.activation) == (("whole", "core", "enhancing"), 3, "sigmoid")
    case = only(folder)
    torch.testing.assert_close(case.probs, torch.from_numpy(probs), rtol=0, atol=3e-4)
    for channel, members in enumerate(([1, 2, 3], [2, 3], [3])):
        assert torch.equal(case.label[channel, 1:], torch.from_numpy(np.isin(label[1:], members)).int())
    assert (case.label[:, 0] == 4).all()
    with pytest.raises(ValueError, match=r"Expected activation='sigmoid' for the overlapping regions"):
        PredictionFolder(*folders, activation="softmax")


SCENES = DataCard("scenes", ["rest", "road", "car"], ignore_index=9, regions={"car": ["car"], "ground": [1, 2]}, patch_size=[4, 4])
BRAINS = DataCard("brains", ["rest", "core", "oedema"], regions={"whole": [1, 2]}, patch_size=[4, 4, 4])


def card_labels(card: DataCard, *files: Path) -> CardLabels:
    return CardLabels(card, [Case(file.name.split(".")[0], (file,), file, "a") for file in files], files[0].parent)


@pytest.mark.parametrize("card", [SCENES, BRAINS], ids=["images", "volumes"])
@pytest.mark.parametrize("by", ["card", "dataset.json"])
def test_regions_of_a_card(folders: tuple[Path, Path], card: DataCard, by: str) -> None:
    """What densecal-predict writes beside probabilities says what the card does."""
    shape = (6, 9) if card is SCENES else SHAPE
    regions = card.schema.regions
    probs = torch.rand(len(regions), *shape, generator=torch.Generator().manual_seed(3)).numpy()
    label = make_label(shape)
    label[0] = card.ignore_index if card is SCENES else 0
    write(folders[0] / ("a_probs.npz" if card is SCENES else "a_probs.nii.gz"), probs if card is SCENES else np.moveaxis(probs, 0, -1))
    file = write(folders[1] / ("a.png" if card is SCENES else "a.nii.gz"), label)
    for beside in ("a_label_car.png", "a_confidence_car.tif", "a_overlay.png"):
        write(folders[0] / beside, label)
    if by == "dataset.json":
        assert write_description(folders[0], card)
    folder = PredictionFolder(folders[0], folders[1] if by == "dataset.json" else card_labels(card, file))
    assert folder.problems() == []
    assert (folder.class_names, folder.activation, folder.ignore_index) == (card.schema.names, "sigmoid", card.ignore_index)
    case = only(folder)
    torch.testing.assert_close(case.probs, torch.from_numpy(probs))
    for channel, classes in enumerate(regions):
        expected = np.where(label == card.ignore_index, card.ignore_index, np.isin(label, classes))
        assert torch.equal(case.label[channel], torch.from_numpy(expected).int())


@pytest.mark.parametrize("card", [SCENES, BRAINS], ids=["images", "volumes"])
def test_soft_regions_of_a_card(folders: tuple[Path, Path], card: DataCard) -> None:
    card = replace(card, soft_labels=True)
    shape = (6, 9) if card.spatial_dims == 2 else SHAPE
    shares = make_probs(shape)
    regions = card.schema.regions
    probs = torch.rand(len(regions), *shape, generator=torch.Generator().manual_seed(3)).numpy()
    write(
        folders[0] / ("a_probs.npz" if card.spatial_dims == 2 else "a_probs.nii.gz"), probs if card.spatial_dims == 2 else np.moveaxis(probs, 0, -1)
    )
    file = write(folders[1] / ("a.npy" if card.spatial_dims == 2 else "a.nii.gz"), np.moveaxis(shares, 0, -1))
    case = only(PredictionFolder(folders[0], card_labels(card, file)))
    for channel, classes in enumerate(regions):
        torch.testing.assert_close(case.label[channel], torch.from_numpy(shares[list(classes)].sum(0)))


def test_dataset_json_of_classes_and_one_that_says_something_else(tmp_path: Path) -> None:
    card = replace(SCENES, regions={})
    assert write_description(tmp_path, card)
    assert write_description(tmp_path, card), "the same again"
    found = describe_labels(tmp_path, tmp_path)
    assert found is not None
    assert (found.names, found.regions, found.ignore_index) == (("rest", "road", "car"), None, 9)
    before = (tmp_path / "dataset.json").read_text()
    assert not write_description(tmp_path, BRAINS)
    assert (tmp_path / "dataset.json").read_text() == before


def test_regions_given_and_labels_outside_them(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.npy", torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)).numpy())
    write(folders[1] / "a.nii.gz", make_label(classes=4))
    with pytest.raises(ValueError, match=r"has one label map for 2 regions\. Say by `regions`"):
        PredictionFolder(*folders, activation="sigmoid")[0]
    with pytest.raises(ValueError, match=r"has labels other than the classes 0 to 2 .* 3 \(\d+ voxels\)"):
        PredictionFolder(*folders, regions={"whole": [1, 2], "core": [2]})[0]
    assert PredictionFolder(*folders, regions={"whole": [1, 2, 3], "core": [2]})[0].label[1].sum() == (make_label(classes=4) == 2).sum()


@pytest.mark.parametrize(("file", "dtype"), [("a.npy", np.uint8), ("a.npy", np.bool_), ("a.nii.gz", np.uint8)])
def test_one_map_per_region(folders: tuple[Path, Path], file: str, dtype: Any) -> None:
    probs = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)).numpy()
    regions = np.stack([make_label(classes=2), make_label(classes=2, seed=4)]).astype(dtype)
    write(folders[0] / "a.npz", probs)
    write(folders[1] / file, np.moveaxis(regions, 0, -1) if "nii" in file else regions)
    case = only(PredictionFolder(*folders, activation="sigmoid"))
    assert torch.equal(case.probs, torch.from_numpy(probs))
    assert torch.equal(case.label, torch.from_numpy(regions).int())


def test_single_sigmoid_channel(folders: tuple[Path, Path]) -> None:
    foreground, label = make_probs((6, 9), classes=2)[1], make_label((6, 9), classes=2)
    write(folders[0] / "a.tif", foreground)
    write(folders[1] / "a.png", label * 255)
    case = only(PredictionFolder(*folders, activation="sigmoid", label_values=[0, 255]))
    assert torch.equal(case.probs, torch.from_numpy(foreground)[None])
    assert torch.equal(case.label, torch.from_numpy(label).int()[None])


# Logits


def test_logits_become_probabilities_in_single_precision(folders: tuple[Path, Path]) -> None:
    logits = 4 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    write(folders[0] / "a.npy", logits.half().numpy())
    write(folders[1] / "a.nii.gz", make_label())
    assert torch.equal(only(PredictionFolder(*folders, from_logits=True)).probs, logits.half().float().softmax(0))
    with pytest.raises(ValueError, match=r"holds values from -.* to .*, not probabilities in \[0, 1\]\. Set from_logits=true"):
        PredictionFolder(*folders)[0]


def test_logits_of_the_foreground_and_of_regions(folders: tuple[Path, Path]) -> None:
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    write(folders[0] / "a.npy", logits[0].numpy())
    write(folders[1] / "a.npy", make_label((6, 9), classes=2))
    p = logits[0].sigmoid()
    torch.testing.assert_close(only(PredictionFolder(*folders, from_logits=True)).probs, torch.stack([1 - p, p]))
    write(folders[0] / "a.npy", logits.numpy())
    folder = PredictionFolder(*folders, from_logits=True, activation="sigmoid", regions={"x": [1], "y": [0, 1]})
    torch.testing.assert_close(only(folder).probs, logits.sigmoid())


@pytest.mark.parametrize("form", ["classes", "foreground", "regions", "png"])
def test_probabilities_are_not_taken_for_logits(folders: tuple[Path, Path], form: str) -> None:
    probs = make_probs((6, 9), classes=2)
    foreground = np.rint(255 * probs[1]).astype(np.uint8)
    path = folders[0] / ("a.png" if form == "png" else "a.npy")
    write(path, {"classes": probs, "foreground": probs[1], "regions": probs * 0.9, "png": foreground}[form])
    write(folders[1] / "a.png", make_label((6, 9), classes=2))
    options: dict[str, Any] = {"regions": {"x": [1], "y": [0, 1]}} if form == "regions" else {}
    with pytest.raises(ValueError, match=r"holds values in \[0, 1\].*: probabilities, not logits\. Set from_logits=false"):
        PredictionFolder(*folders, from_logits=True, **options)[0]


# Values that are wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: np.where(np.arange(4) == 2, np.nan, p), r"a\.npy: case 'a' holds 105 NaN or infinite value\(s\)"),
        (lambda p: np.where(np.arange(4) == 2, np.inf, p), r"holds 105 NaN or infinite value\(s\)"),
        (lambda p: p - 0.5, r"a\.npy: case 'a' holds values from -0\.\d+ to .*not probabilities in \[0, 1\]"),
        (lambda p: (p * 255).astype(np.uint8), r"holds values from 0 to 2\d\d, not probabilities in \[0, 1\].*or scale them"),
        (lambda p: np.where(np.arange(4) == 2, p * 0.9, p), r"do not sum to 1 over the classes: 35 of 140 voxels, the worst sum is 0\.9\b"),
        (lambda p: p * (np.arange(4) != 2), r"35 of 140 voxels, the worst sum is 0\."),
    ],
)
def test_wrong_probabilities(folders: tuple[Path, Path], change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    values = change(make_probs())
    write(folders[0] / "a.npy", values if values.dtype == np.uint8 else values.astype(np.float32))
    write(folders[1] / "a.nii.gz", make_label())
    folder = PredictionFolder(*folders)
    assert folder.problems() == [], "values are not looked at here"
    with pytest.raises(DataProblems, match=message) as error:
        folder[0]
    assert "\n" not in str(error.value)
    assert [problem.kind for problem in error.value.problems if isinstance(problem, PredictionProblem)] == ["values"]


def test_rounding_is_no_error_and_stays_in_range(folders: tuple[Path, Path]) -> None:
    values = make_probs()
    values[:, 0, 0, 0] = (-1e-5, 1 + 1e-5, 0)
    write(folders[0] / "a.npy", values)
    write(folders[1] / "a.nii.gz", make_label())
    probs = only(PredictionFolder(*folders)).probs
    assert probs[:, 0, 0, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            np.full(SHAPE, 255, np.uint8),
            r"labels/a\.nii\.gz: case 'a' has labels other than the classes 0 to 2 .*: 255 \(140 voxels\)\. Set `ignore_index`",
        ),
        (np.full(SHAPE, -1, np.int16), r"-1 \(140 voxels\)"),
        (np.full(SHAPE, 0.5, np.float32), r"holds 140 label\(s\) that are not whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), r"holds 140 label\(s\) that are not whole numbers"),
        (np.full((*SHAPE, 3), 0.5, np.float32), r"expected shares that sum to 1 .* but 140 voxel\(s\) do not"),
        (np.full((*SHAPE, 3), np.nan, np.float32), r"holds 420 NaN or infinite value\(s\)"),
    ],
)
def test_wrong_labels(folders: tuple[Path, Path], label: np.ndarray, message: str) -> None:
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / "a.nii.gz", label)
    with pytest.raises(ValueError, match=message):
        PredictionFolder(*folders)[0]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("a.nii.gz", make_label()),
        ("a.nii.gz", make_label().astype(np.float32)),
        ("a.npy", make_label()),
        ("a.npy", make_label(classes=2).astype(np.float32)),
    ],
)
def test_hard_label_map_alone_is_an_error(folders: tuple[Path, Path], file: str, values: np.ndarray) -> None:
    write(folders[0] / file, values)
    write(folders[1] / "a.nii.gz", make_label(classes=2))
    with pytest.raises(ValueError, match=r"case 'a' .*a hard label map, which tells no probabilities.*--save_probabilities.*`--npz`"):
        PredictionFolder(*folders)[0]


def test_hard_label_map_of_many_classes_is_seen_in_its_header(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.nii.gz", make_label())
    write(folders[1] / "a.nii.gz", make_label())
    (problem,) = PredictionFolder(*folders, num_classes=3).problems()
    assert problem.kind == "hard"


@pytest.mark.parametrize("form", ["mask", "index", "palette", "1bit"])
def test_hard_image_is_an_error(folders: tuple[Path, Path], form: str) -> None:
    label = make_label((6, 9), classes=2)
    image = Image.fromarray(label * (255 if form == "mask" else 1))
    if form == "palette":
        image.putpalette([9, 9, 9, 200, 0, 0])
    image = image.point(lambda v: 255 * v).convert("1") if form == "1bit" else image
    image.save(folders[0] / "a.png")
    write(folders[1] / "a.png", label)
    with pytest.raises(ValueError, match="hard label map"):
        PredictionFolder(*folders)[0]


def test_1_bit_pages_are_hard(folders: tuple[Path, Path]) -> None:
    pages = [Image.fromarray(make_label((6, 9)) == c) for c in range(3)]
    pages[0].save(folders[0] / "a.tif", save_all=True, append_images=pages[1:])
    write(folders[1] / "a.png", make_label((6, 9)))
    (problem,) = PredictionFolder(*folders).problems()
    assert problem.kind == "hard"


def test_image_of_next_to_no_foreground_is_no_label_map(folders: tuple[Path, Path]) -> None:
    faint = np.zeros((6, 9), np.uint8)
    faint[2:4] = 1  # of 255
    write(folders[0] / "faint.png", faint)
    write(folders[0] / "none.png", 0 * faint)
    for name in ("faint", "none"):
        write(folders[1] / f"{name}.png", 0 * faint)
    cases = PredictionFolder(*folders)
    assert cases["none"].probs[1].max() == 0
    assert cases["faint"].probs[1].max() == pytest.approx(1 / 255)


# Files that are missing, too many, misshapen or damaged


def test_problems_name_case_file_and_repair(folders: tuple[Path, Path]) -> None:
    for name in ("good", "small", "three", "object", "pages", "moved"):
        write(folders[1] / f"{name}.nii.gz", make_label())
    write(folders[1] / "lost.nii.gz", make_label())
    write(folders[0] / "good.npy", make_probs())
    write(folders[0] / "small.npy", make_probs((5, 7, 3)))
    write(folders[0] / "three.npy", make_probs(classes=4))
    write(folders[0] / "new.npy", make_probs())
    write(folders[0] / "moved.nii.gz", np.moveaxis(make_probs(), 0, -1), affine=np.diag([0.7, 1.1, 2.5, 1]))
    np.save(folders[0] / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(folders[0] / "pages.npz", first=make_probs(), second=make_probs())
    found = {problem.case_id: problem for problem in PredictionFolder(*folders).problems()}
    expected = {
        "lost": ("missing", r"has no prediction in .*predictions\. Predict it, or take the label away\."),
        "new": ("extra", r"has no label in .*labels and is left out\. Add its label\."),
        "small": ("shape", r"has the shape (3, 5, 7, 3), which does not fit the shape (5, 7, 4) of its label small.nii.gz"),
        "three": ("shape", r"has 4 classes, but `num_classes` or 'good' says 3"),
        "object": ("unreadable", "cannot be read"),
        "pages": ("unreadable", "expected one array in the file, but it holds 2 arrays, first, second"),
        "moved": ("place", "lies elsewhere in space than its label moved.nii.gz"),
    }
    assert set(found) == set(expected)
    for name, (kind, text) in expected.items():
        problem = found[name]
        assert problem.kind == kind
        assert "\n" not in str(problem)
        assert str(problem).startswith(f"{problem.file}: case {name!r} ")
        pieces = [piece.replace("\\", "") for piece in text.split(".*")]
        assert all(piece in str(problem) for piece in pieces), str(problem)


def test_classes_are_known_from_the_first_case_that_can_be_read(folders: tuple[Path, Path]) -> None:
    for name in "ab":
        write(folders[1] / f"{name}.nii.gz", make_label())
    (folders[0] / "a.npy").write_bytes(b"")
    write(folders[0] / "b.npy", make_probs())
    folder = PredictionFolder(*folders)
    assert folder.num_classes == 3
    assert [(p.case_id, p.kind) for p in folder.problems()] == [("a", "unreadable")]


def test_no_readable_prediction(folders: tuple[Path, Path]) -> None:
    write(folders[1] / "a.nii.gz", make_label())
    (folders[0] / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.npy: case 'a' cannot be read"):
        _ = PredictionFolder(*folders).num_classes
    write(folders[0] / "a.npz", make_probs())
    (folders[0] / "a.npz").rename(folders[0] / "a.safetensors")
    folder = PredictionFolder(*folders)
    assert [problem.kind for problem in folder.problems()] == ["ambiguous"]
    with pytest.raises(ValueError, match=r"holds no prediction to tell the number of classes from\. Give `num_classes`"):
        _ = folder.num_classes


@pytest.mark.parametrize("file", ["a.npz", "a.npy", "a.nii.gz", "a.nii", "a.safetensors", "a.tif"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_prediction(folders: tuple[Path, Path], file: str, keep: float) -> None:
    image = file.endswith(".tif")
    values = make_probs((64, 65), 2)[1] if image else np.moveaxis(make_probs((16, 17, 9)), 0, -1)
    path = write(folders[0] / file, values)
    write(folders[1] / ("a.png" if image else "a.nii.gz"), make_label((64, 65), 2) if image else make_label((16, 17, 9)))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    folder = PredictionFolder(*folders, num_classes=2 if image else 3)
    with pytest.raises(ValueError, match=r"a\.\w+.*: case 'a' cannot be read.*Save or copy it again") as error:
        folder[0]
    assert "\n" not in str(error.value)
    if not file.endswith((".nii.gz", ".tif")) or keep == 0:  # those show it when read to the end
        assert [problem.kind for problem in folder.problems()] == ["unreadable"]


def test_damage_inside_an_npz(folders: tuple[Path, Path]) -> None:
    write_nnunet(folders[0], "a", make_probs((16, 17, 9)))
    write(folders[1] / "a.nii.gz", make_label((16, 17, 9)))
    path = folders[0] / "a.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: case 'a' cannot be read to its end \((BadZipFile|error)"):
        PredictionFolder(*folders)[0]


def test_nothing_is_unpickled(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_nnunet(folders[0], "a", make_probs())
    write(folders[1] / "a.nii.gz", make_label())
    only(PredictionFolder(*folders))
    np.savez(folders[0] / "a.npz", probabilities=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="Python objects, which are never unpickled"):
        PredictionFolder(*folders)[0]
    assert not (tmp_path / "pickled").exists()


def test_names_inside_an_archive_are_not_paths(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "x.npy", make_probs())
    with zipfile.ZipFile(folders[0] / "a.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "../../x.npy")
    (tmp_path / "x.npy").unlink()
    write(folders[1] / "a.nii.gz", make_label())
    assert torch.equal(only(PredictionFolder(*folders)).probs, torch.from_numpy(make_probs()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "predictions"]


# Matching


def test_other_files_are_left_alone(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / "a.nii.gz", make_label())
    for name in (".hidden.npy", ".partial-b.nii.gz", "summary.json", "a.pkl", "log.txt", "scores.csv", "run.log", "model.pth"):
        (folders[0] / name).write_bytes(b"?")
    (folders[0] / "c.npy").mkdir()
    only(PredictionFolder(*folders))


def test_what_densecal_predict_writes(folders: tuple[Path, Path]) -> None:
    probs = torch.from_numpy(make_probs())
    source = OpenedImage(torch.zeros(1, *SHAPE), lambda probs: probs, header=nib.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE).header)
    write_prediction(Prediction(probs, source, load_card("hippocampus")), folders[0], "a")
    write_prediction(Prediction(probs, source, load_card("hippocampus")), folders[0], "b")
    write(folders[1] / "a.nii.gz", make_label())
    folder = PredictionFolder(*folders)
    assert [(problem.case_id, problem.kind) for problem in folder.problems()] == [("b", "extra")]
    assert torch.equal(folder["a"].probs, probs)


def test_suffixes_are_taken_only_when_asked_for(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a_leftImg8bit.npy", make_probs((6, 9)))
    write(folders[0] / "a_other.npy", make_probs((6, 9)))
    write(folders[1] / "a_labelIds.png", make_label((6, 9)))
    write(folders[1] / "a_color.png", np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"No case has both.*a_leftImg8bit\.npy for example.*a_color\.png\. Give .* `prediction_suffix` and `label_suffix`"
    ):
        PredictionFolder(*folders)
    folder = PredictionFolder(*folders, prediction_suffix="_leftImg8bit", label_suffix="_labelIds")
    assert folder.case_ids == ("a",)
    only(folder)


@pytest.mark.parametrize("options", [{"label_suffix": "_gt"}, {"prediction_suffix": "_probs"}])
def test_predictions_and_labels_in_one_folder(tmp_path: Path, options: dict[str, str]) -> None:
    write(tmp_path / "a_probs.npy", make_probs())
    write(tmp_path / ("a_gt.nii.gz" if "label_suffix" in options else "a.nii.gz"), make_label())
    only(PredictionFolder(tmp_path, tmp_path, **options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds predictions and labels\. Tell them apart"):
        PredictionFolder(tmp_path, tmp_path)


def test_two_files_for_one_case(folders: tuple[Path, Path]) -> None:
    for name in "ab":
        write(folders[0] / f"{name}.npy", make_probs())
        write(folders[1] / f"{name}.nii.gz", make_label())
    write(folders[0] / "a.npz", make_probs())
    write(folders[1] / "b.npy", make_label())
    write(folders[0] / "c.npy", make_probs())
    write(folders[1] / "c.nii.gz", make_label())
    folder = PredictionFolder(*folders)
    assert folder.case_ids == ("c",)
    first, second = folder.problems()
    assert "case 'a' is in more than one file (a.npy and a.npz). Keep one, or choose by `prediction_suffix`." in str(first)
    assert "case 'b' is in more than one file (b.nii.gz and b.npy). Keep one, or choose by `label_suffix`." in str(second)
    with pytest.raises(KeyError, match="'a' is not a case with one prediction and one label"):
        folder["a"]


def test_damaged_probabilities_do_not_give_way_to_the_hard_map(folders: tuple[Path, Path]) -> None:
    write_nnunet(folders[0], "a", make_probs())
    (folders[0] / "a.npz").write_bytes(b"PK")
    write(folders[1] / "a.nii.gz", make_label())
    with pytest.raises(ValueError, match=r"a\.npz: case 'a' cannot be read"):
        PredictionFolder(*folders)[0]


def test_damaged_nifti_does_not_give_way_to_a_hard_one(folders: tuple[Path, Path]) -> None:
    (folders[0] / "a.nii.gz").write_bytes(b"?")
    write(folders[0] / "a.nii", make_label())
    write(folders[1] / "a.nii.gz", make_label())
    with pytest.raises(ValueError, match=r"predictions/a\.nii\.gz: case 'a' cannot be read"):
        PredictionFolder(*folders)[0]


def test_missing_and_empty_folders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="predictions: no folder"):
        PredictionFolder(tmp_path / "nowhere", folders[1])
    with pytest.raises(FileNotFoundError, match="labels: no folder"):
        PredictionFolder(folders[0], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"predictions: found no predictions\. Expected \.npz"):
        PredictionFolder(*folders)
    write(folders[0] / "a.npy", make_probs())
    with pytest.raises(ValueError, match=r"labels: found no labels"):
        PredictionFolder(*folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "last"}, r"Expected `axes` to be one of \('auto', 'nnunet', 'channels_first', 'channels_last'\), but got 'last'"),
        ({"activation": "relu"}, "Expected `activation` to be one of"),
        ({"num_classes": 1}, "at least 2 classes under softmax"),
        ({"num_classes": 3, "label_values": [0, 1]}, "Expected one number of classes, but got 3 from num_classes, 2 from label_values"),
        ({"regions": {"a": [1]}, "label_values": [0, 255]}, "`label_values` cannot act together with `regions`"),
        ({"activation": "sigmoid", "ignore_index": 0}, "Expected `ignore_index` other than the 0 and 1 of a region"),
        ({"activation": "sigmoid", "label_values": [0, 1, 2]}, "Expected two `label_values` under sigmoid"),
    ],
)
def test_options_that_contradict(folders: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    write(folders[0] / "a.npy", make_probs())
    write(folders[1] / "a.nii.gz", make_label())
    with pytest.raises(ValueError, match=message):
        PredictionFolder(*folders, **options)


# One case at a time


def test_indexing_reads_the_files_of_one_case(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for n, name in enumerate("abc"):
        write(folders[0] / f"{name}.npy", make_probs(seed=n))
        write(folders[1] / f"{name}.nii.gz", make_label(seed=n))
    read: list[str] = []
    whole = ArrayFile.read
    monkeypatch.setattr(ArrayFile, "read", lambda self: (read.append(self.path.name), whole(self))[1])
    folder = PredictionFolder(*folders)
    assert folder.problems() == []
    assert (len(folder), read) == (3, [])
    assert torch.equal(folder[1].probs, torch.from_numpy(make_probs(seed=1)))
    assert sorted(read) == ["b.nii.gz", "b.npy"]
    assert torch.equal(folder["c"].probs, folder[-1].probs)
    assert [case.case_id for case in folder] == ["a", "b", "c"]
    with pytest.raises(IndexError):
        folder[3]


def test_cases_feed_an_evaluation(folders: tuple[Path, Path]) -> None:
    for n, name in enumerate("ab"):
        write_nnunet(folders[0], name, make_probs(seed=n))
        write(folders[1] / f"{name}.nii.gz", make_label(seed=n))
    folder = PredictionFolder(*folders)
    evaluation = SegmentationEvaluation(LabelSchema(("background", "left", "right"), folder.ignore_index))
    for index, case in enumerate(folder):
        evaluation.update(case.probs[None], case.label[None], torch.tensor([index]))
    rows = evaluation.compute().cases
    for n, row in enumerate(rows):
        assert row["case_accuracy"] == pytest.approx(float((make_probs(seed=n).astype(np.float16).argmax(0) == make_label(seed=n)).mean()))


# Images to show


def test_images_beside(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    volume = np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)
    for name in ("a", "b", "c", "d"):
        write(folders[0] / f"{name}.npy", make_probs())
        write(folders[1] / f"{name}.nii.gz", make_label())
    write(images / "a_0000.nii.gz", volume[..., 0])
    write(images / "b.nii.gz", volume)
    write(images / "c.nii.gz", volume[1:])
    folder = PredictionFolder(*folders, images=images)
    for name in "ab":
        image = folder.image(name)
        assert image is not None
        assert image.dtype == np.float32
        assert np.array_equal(image, volume[..., 0])
    assert folder.image("d") is None
    assert PredictionFolder(*folders).image("a") is None
    with pytest.raises(ValueError, match=r"c\.nii\.gz: case 'c' has an image of shape \(4, 7, 4\), but a label of \(5, 7, 4\)"):
        folder.image("c")
    (images / "a_0000.nii.gz").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"a_0000\.nii\.gz: case 'a' cannot be read"):
        folder.image("a")
    with pytest.raises(FileNotFoundError, match="images: no folder"):
        PredictionFolder(*folders, images=tmp_path / "nowhere")


def test_photographs_beside(folders: tuple[Path, Path], tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    for name in ("a", "b", "c"):
        write(folders[0] / f"{name}.npy", make_probs((6, 9)))
        write(folders[1] / f"{name}.png", make_label((6, 9)))
    write(tmp_path / "images" / "a.png", colour)
    write(tmp_path / "images" / "b.jpg", colour)
    write(tmp_path / "images" / "c.png", 200 * colour[..., 0].astype(np.uint16))
    folder = PredictionFolder(*folders, images=tmp_path / "images")
    grey = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(folder.image("a"), grey, atol=1)
    assert folder.image("b").shape == (6, 9)  # type: ignore[union-attr]
    assert np.array_equal(folder.image("c"), 200.0 * colour[..., 0])
