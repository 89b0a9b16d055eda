"""From files to files: a prediction lies on the grid of its image, whatever the grid is, and is a distribution there."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from commands import run_command
from torch import Tensor, nn
from volumes import AFFINE, blob, save

from densecal.data.card import DataCard, load_card, override_card
from densecal.data.medium import OpenedImage
from densecal.inference import Prediction, Predictor, SlidingWindow, resolve_device, write_prediction
from densecal.models import unet

CARD = {
    "name": "blobs",
    "classes": ["background", "left", "right"],
    "patch_size": [8, 16, 8],
    "batch_size": 2,
    "num_workers": 0,
    "augment": False,
    "val_fraction": 0.3,
    "test_fraction": 0.3,
}
NIFTI_OUTPUTS = ("label", "probs", "confidence")
OBLIQUE = np.array([[0.9, -0.3, 0.2, -12.0], [0.25, 1.1, -0.1, 7.5], [-0.2, 0.15, 1.8, 30.0], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of a run of one epoch."""
    root = tmp_path_factory.mktemp("blobs")
    for n in range(6):
        image, label = blob((9, 14, 10), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump(CARD))
    settings = [f"data={root / 'blobs.yaml'}", f"data.root={root}", f"output_dir={root / 'runs'}", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    log = root / "log.txt"
    assert run_command("train", [*settings, "model.channels=[4,8]", "inference.overlap=0.25"], log) == 0, log.read_text()
    (record,) = (root / "runs").glob("*/*/run.json")
    return record.parent


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor.from_run(run)


@pytest.fixture
def image() -> np.ndarray:
    return blob((9, 13, 11), seed=100)[0]


def read(folder: Path, case: str) -> dict[str, np.ndarray]:
    return {output: np.asarray(nib.load(folder / f"{case}_{output}.nii.gz").dataobj) for output in NIFTI_OUTPUTS}


def test_from_run_loads_what_was_trained(run, predictor):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith("model.")}
    assert set(weights) == set(predictor.model.state_dict())
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not predictor.model.training
    assert predictor.window.patch_size == (8, 16, 8)
    assert predictor.window.overlap == 0.25
    assert predictor.card.classes == CARD["classes"]


def test_from_run_predicts_as_the_run_did(run, predictor):
    """The labels that training wrote for its test cases."""
    for case in json.loads((run / "splits.json").read_text())["test"]:
        written = np.asarray(nib.load(run / "predictions" / f"{case}_label.nii.gz").dataobj)
        again = predictor(run.parents[2] / "images" / f"{case}.nii.gz").label_map
        np.testing.assert_array_equal(again.numpy(), written)


def test_from_run_takes_a_checkpoint_file(run, image, tmp_path):
    path = save(tmp_path / "scan.nii.gz", image)
    last = Predictor.from_run(run, "last")(path)
    assert torch.equal(Predictor.from_run(run / "checkpoints" / "last.ckpt")(path).probs, last.probs)
    assert torch.equal(Predictor.from_run(str(run), "last")(str(path)).probs, last.probs)


def test_from_run_does_not_need_the_data(run, tmp_path, image):
    """The checkpoint alone is enough, wherever it lies."""
    copy = tmp_path / "model.ckpt"
    copy.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    assert Predictor.from_run(copy)(save(tmp_path / "scan.nii.gz", image)).probs.shape == (3, *image.shape)


def pretrained_unet(in_channels: int, num_classes: int, spatial_dims: int = 3, weights: str | None = "imagenet", **options) -> nn.Module:
    if weights is not None:
        raise OSError("Cannot download: no internet here.")
    return unet(in_channels, num_classes, spatial_dims=spatial_dims, **options)


def test_from_run_downloads_no_weights(run, tmp_path):
    """The checkpoint has its own, whatever the network began with."""
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["densecal"]["config"]["model"] |= {"_target_": f"{__name__}.pretrained_unet", "weights": "imagenet"}
    torch.save(content, tmp_path / "model.ckpt")
    assert Predictor.from_run(tmp_path / "model.ckpt", trust_config=True).config.model.weights == "imagenet"


def test_prediction_is_a_distribution_with_its_label_and_confidence():
    probs = torch.tensor([[0.2, 0.5, 0.1], [0.7, 0.3, 0.1], [0.1, 0.2, 0.8]]).reshape(3, 3, 1, 1)
    prediction = Prediction(probs, OpenedImage(torch.zeros(1, 3, 1, 1), lambda probs: probs), load_card("hippocampus"))
    assert prediction.label_map.flatten().tolist() == [1, 0, 2]
    assert prediction.confidence.flatten().tolist() == pytest.approx([0.7, 0.5, 0.8])


def test_written_files_hold_what_their_names_say(predictor, image, tmp_path):
    prediction = predictor(save(tmp_path / "scan.nii.gz", image))
    paths = write_prediction(prediction, tmp_path / "new" / "folder", "scan")
    assert paths == [tmp_path / "new" / "folder" / f"scan_{output}.nii.gz" for output in ("label", "probs", "confidence")]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(p.name for p in paths)
    files = read(tmp_path / "new" / "folder", "scan")
    assert files["probs"].dtype == files["confidence"].dtype == np.float32
    assert files["label"].dtype == np.uint8
    assert files["probs"].shape == (*image.shape, 3)
    np.testing.assert_allclose(files["probs"].sum(-1), 1, atol=1e-6)
    assert files["probs"].min() >= 0
    np.testing.assert_array_equal(files["label"], files["probs"].argmax(-1))
    np.testing.assert_array_equal(files["confidence"], files["probs"].max(-1))
    assert np.ptp(files["confidence"]) > 0.01


def test_only_the_chosen_outputs_are_written(predictor, image, tmp_path):
    prediction = predictor(save(tmp_path / "scan.nii.gz", image))
    assert [p.name for p in write_prediction(prediction, tmp_path / "out", "scan", ["confidence"])] == ["scan_confidence.nii.gz"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scan_confidence.nii.gz"]
    with pytest.raises(ValueError, match=r"outputs.*'probs'.*'prob'"):
        write_prediction(prediction, tmp_path / "other", "scan", ["prob"])
    assert not (tmp_path / "other").exists()


def test_file_that_cannot_be_finished_leaves_the_old_one(predictor, image, tmp_path, monkeypatch):
    prediction = predictor(save(tmp_path / "scan.nii.gz", image))
    (path,) = write_prediction(prediction, tmp_path / "out", "scan", ["label"])
    before = path.read_bytes()

    def full_disk(image, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", full_disk)
    with pytest.raises(OSError, match=r"scan_label\.nii\.gz: cannot be written \(No space left on device\)\.$"):
        write_prediction(prediction, tmp_path / "out", "scan", ["label"])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def written_image(
    path: Path, values: np.ndarray, affine: np.ndarray, *, codes: tuple[int, int] = (1, 2), units: tuple[str, str] = ("mm", "sec")
) -> Path:
    volume = nib.Nifti1Image(values, affine)
    volume.set_qform(affine, codes[0])
    volume.set_sform(affine, codes[1])
    volume.header.set_xyzt_units(*units)
    nib.save(volume, path)
    return path


AFFINES = {
    "anisotropic": np.diag([1.0, 1.0, 2.0, 1.0]),
    "left-handed": np.array([[-1.5, 0, 0, 20.0], [0, 1.0, 0, -3.0], [0, 0, 2.5, 4.0], [0, 0, 0, 1]]),
    "axes-swapped": np.array([[0, 0, 1.2, -8.0], [-0.9, 0, 0, 2.0], [0, 2.0, 0, 1.0], [0, 0, 0, 1]]),
    "oblique": OBLIQUE,
}


@pytest.mark.parametrize(
    "preprocessing", [{}, {"orientation": "LPS"}, {"spacing": [1.5, 1.2, 1.4], "orientation": "RAS"}], ids=["kept", "turned", "resampled"]
)
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_prediction_lies_on_the_grid_of_the_image(affine, preprocessing, predictor, image, tmp_path):
    turning = Predictor(predictor.model, override_card(predictor.card, preprocessing), predictor.window)
    save(tmp_path / "scan.nii.gz", image, affine)
    write_prediction(turning(tmp_path / "scan.nii.gz"), tmp_path, "scan")
    for output in NIFTI_OUTPUTS:
        written = nib.load(tmp_path / f"scan_{output}.nii.gz")
        assert written.shape[:3] == image.shape
        np.testing.assert_allclose(written.affine, nib.load(tmp_path / "scan.nii.gz").affine, atol=1e-5)
    files = read(tmp_path, "scan")
    np.testing.assert_allclose(files["probs"].sum(-1), 1, atol=1e-6)
    assert files["probs"].min() >= 0
    np.testing.assert_array_equal(files["label"], files["probs"].argmax(-1))


def test_turned_image_gives_the_turned_prediction(predictor, image, tmp_path):
    """The same head, stored along other axes: with ``orientation`` the network sees one and the same array."""
    turning = Predictor(predictor.model, override_card(predictor.card, {"orientation": "RAS"}), predictor.window)
    straight = turning(save(tmp_path / "ras.nii.gz", image, np.diag([1.0, 1.0, 2.0, 1.0])))
    other = nib.Nifti1Image(image, np.diag([1.0, 1.0, 2.0, 1.0])).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIR"))
    )
    nib.save(other, tmp_path / "pir.nii.gz")
    assert nib.aff2axcodes(nib.load(tmp_path / "pir.nii.gz").affine) == ("P", "I", "R")
    turned = turning(tmp_path / "pir.nii.gz")
    expected = straight.probs.numpy().transpose(0, 2, 3, 1)[:, ::-1, ::-1, :]  # axes A, S, R; the first two run the other way
    np.testing.assert_array_equal(turned.probs.numpy(), expected)


def test_oblique_image_is_turned_to_the_nearest_axes(predictor, image, tmp_path):
    """Only ``spacing`` interpolates: without it the network sees the voxels themselves."""
    turning = Predictor(predictor.model, override_card(predictor.card, {"orientation": "RAS"}), predictor.window)
    straight = predictor(save(tmp_path / "straight.nii.gz", image, AFFINE))
    oblique = turning(save(tmp_path / "oblique.nii.gz", image, OBLIQUE))
    np.testing.assert_array_equal(oblique.probs.numpy(), straight.probs.numpy())


class Brightness(nn.Module):
    """Class 1 where the image is bright."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), image], dim=1)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_resampled_prediction_comes_back_to_its_place(affine, tmp_path):
    """For a network that looks at single voxels of a smooth image: to another grid and back is nearly nothing, to a shifted or mirrored place is not."""
    shape, centre = (24, 20, 16), (7.0, 12.0, 6.0)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    smooth = (6 * np.exp(-(((grid - centre) / (9, 8, 7)) ** 2).sum(-1)) - 3).astype(np.float32)
    card = DataCard("bump", ["background", "bump"], patch_size=[16, 16, 16], normalisation="none", spacing=[1.3, 1.3, 1.3], orientation="LPS")
    prediction = Predictor(Brightness(), card, SlidingWindow((16, 16, 16)))(save(tmp_path / "bump.nii.gz", smooth, affine))
    expected = 1 / (1 + np.exp(-smooth))
    assert prediction.source.image.shape[1:] != shape
    assert np.abs(prediction.probs[1].numpy() - expected).max() < 0.08
    for mirrored in (expected[::-1], expected[:, ::-1], expected[:, :, ::-1], np.roll(expected, 2, axis=0)):
        assert np.abs(mirrored - expected).max() > 0.16  # what the line above would not let pass
    torch.testing.assert_close(prediction.probs.sum(0), torch.ones(shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("codes", [(1, 2), (1, 0), (0, 4), (0, 0)], ids=["both", "qform-only", "sform-only", "neither"])
def test_header_keeps_its_place_in_space_and_its_units(codes, predictor, image, tmp_path):
    affine = np.array([[0.0, -1.5, 0, 20.0], [1.0, 0, 0, -3.0], [0, 0, 2.5, 4.0], [0, 0, 0, 1]])
    path = written_image(tmp_path / "scan.nii.gz", image, affine, codes=codes, units=("micron", "msec"))
    source = nib.load(path)
    write_prediction(predictor(path), tmp_path, "scan")
    for output in NIFTI_OUTPUTS:
        written = nib.load(tmp_path / f"scan_{output}.nii.gz")
        assert written.header.get_xyzt_units() == ("micron", "msec")
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
        np.testing.assert_allclose(written.affine, source.affine, atol=1e-6)
        np.testing.assert_allclose(written.header.get_zooms()[:3], source.header.get_zooms()[:3], atol=1e-6)


def test_different_qform_and_sform_are_both_kept(predictor, image, tmp_path):
    volume = nib.Nifti1Image(image, OBLIQUE)
    volume.set_sform(OBLIQUE, 4)
    volume.set_qform(AFFINE, 1)
    nib.save(volume, tmp_path / "scan.nii.gz")
    write_prediction(predictor(tmp_path / "scan.nii.gz"), tmp_path, "scan", ["label"])
    written = nib.load(tmp_path / "scan_label.nii.gz")
    np.testing.assert_allclose(written.get_sform(), OBLIQUE, atol=1e-6)
    np.testing.assert_allclose(written.get_qform(), AFFINE, atol=1e-6)


def test_intensity_scaling_of_the_image_does_not_touch_the_prediction(predictor, image, tmp_path):
    """Scanners store integers with a slope and an intercept."""
    volume = nib.Nifti1Image(image, AFFINE)
    volume.header.set_data_dtype(np.int16)
    volume.header.set_slope_inter(0.25, 7.0)
    volume.header["cal_max"] = 500
    nib.save(volume, tmp_path / "scan.nii")
    assert nib.load(tmp_path / "scan.nii").dataobj.slope == 0.25
    prediction = predictor(tmp_path / "scan.nii")
    close = predictor(save(tmp_path / "floats.nii", np.asarray(nib.load(tmp_path / "scan.nii").get_fdata(), np.float32)))
    torch.testing.assert_close(prediction.probs, close.probs, atol=1e-6, rtol=0)
    write_prediction(prediction, tmp_path, "scan")
    written = nib.load(tmp_path / "scan_label.nii.gz")
    np.testing.assert_array_equal(written.get_fdata(), prediction.label_map.numpy())
    assert written.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "scan_probs.nii.gz").dataobj), prediction.probs.movedim(0, -1).numpy())


def test_format_of_the_file_does_not_matter(predictor, image, tmp_path):
    packed = predictor(save(tmp_path / "scan.nii.gz", image)).probs
    assert torch.equal(predictor(save(tmp_path / "scan.nii", image)).probs, packed)
    nib.save(nib.Nifti2Image(image, AFFINE), tmp_path / "two.nii.gz")
    assert torch.equal(predictor(tmp_path / "two.nii.gz").probs, packed)
    big_endian = nib.Nifti1Image(image, AFFINE, nib.Nifti1Image(image, AFFINE).header.as_byteswapped(">"))
    nib.save(big_endian, tmp_path / "big.nii.gz")
    assert torch.equal(predictor(tmp_path / "big.nii.gz").probs, packed)


def test_volume_smaller_than_a_window(predictor, tmp_path):
    image, _ = blob((3, 5, 4), seed=0)
    prediction = predictor(save(tmp_path / "scan.nii.gz", image))
    assert prediction.probs.shape == (3, 3, 5, 4)
    torch.testing.assert_close(prediction.probs.sum(0), torch.ones(3, 5, 4), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def two_channels() -> Predictor:
    torch.manual_seed(0)
    card = DataCard("pair", ["background", "structure"], image_channels=2, patch_size=[8, 8, 8])
    return Predictor(unet(2, 2, channels=(4, 8)), card, SlidingWindow((8, 8, 8)))


def test_channels_are_the_fourth_axis_or_files_of_their_own(two_channels, tmp_path):
    first, second = blob((9, 8, 10), seed=0)[0], 3 * blob((9, 8, 10), seed=1)[0]
    paths = [save(tmp_path / "t1.nii.gz", first, OBLIQUE), save(tmp_path / "t2.nii.gz", second, OBLIQUE)]
    separate = two_channels(paths)
    together = two_channels(save(tmp_path / "both.nii.gz", np.stack([first, second], axis=-1), OBLIQUE))
    torch.testing.assert_close(together.probs, separate.probs, atol=1e-6, rtol=0)
    assert (two_channels(paths[::-1]).probs - separate.probs).abs().max() > 1e-3  # their order matters
    for prediction, case in ((separate, "separate"), (together, "together")):
        write_prediction(prediction, tmp_path, case)
        for output in NIFTI_OUTPUTS:
            written = nib.load(tmp_path / f"{case}_{output}.nii.gz")
            assert written.shape == ((9, 8, 10, 2) if output == "probs" else (9, 8, 10))
            np.testing.assert_allclose(written.affine, OBLIQUE, atol=1e-6)


def damaged(path: Path, kind: str) -> Path:
    image, _ = blob((9, 14, 10), seed=0)
    if kind in ("truncated", "damaged"):
        content = save(path, image).read_bytes()
        if kind == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes(255 - b for b in content[middle : middle + 64]) + content[middle + 64 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "channels":
        save(path, np.stack([image] * 2, axis=-1))
    elif kind == "slice":
        save(path, image[:, :, 0])
    elif kind == "nan":
        image[2:4, 0, 0] = np.nan, np.inf
        save(path, image)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "cannot be read"),
        ("damaged", "cannot be read"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("folder", "cannot be read"),
        ("missing", "cannot be read"),
        ("channels", r"expected 1 channel.*got \(2, 9, 14, 10\)"),
        ("slice", r"expected 1 channel\(s\) and 3 spatial dims.*\(1, 9, 14\)"),
        ("nan", r"holds \d+ NaN or infinite"),
    ],
)
def test_bad_image_is_one_line_that_names_the_file(kind, reason, predictor, tmp_path):
    path = damaged(tmp_path / f"{kind}.nii.gz", kind)
    with pytest.raises(ValueError, match=reason) as error:
        predictor(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_volumes_that_do_not_fit_together_are_refused(two_channels, tmp_path):
    image, _ = blob((9, 8, 10), seed=0)
    paths = [save(tmp_path / "t1.nii.gz", image), save(tmp_path / "t2.nii.gz", image[:-1])]
    with pytest.raises(ValueError, match=r"t1\.nii\.gz and .*t2\.nii\.gz: ") as error:
        two_channels(paths)
    assert len(str(error.value).splitlines()) == 1


def test_more_files_than_channels_are_refused(predictor, image, tmp_path):
    paths = [save(tmp_path / name, image) for name in ("t1.nii.gz", "t2.nii.gz")]
    with pytest.raises(ValueError, match=r"t1\.nii\.gz and .*t2\.nii\.gz: expected 1 channel"):
        predictor(paths)


def test_device_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device: cannot use 'gpu'.*device=auto"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"device: cannot use 'cuda:99'"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("spatial", [(4, 5), (4, 5, 3)], ids=["image", "volume"])
def test_soft_label_is_good_to_half_a_step_of_sixteen_bits(spatial, tmp_path):
    """Stated where it is offered; read back as any reader of shares does."""
    from densecal.data.images.files import read_shares

    card = DataCard(name="x", classes=["a", "b", "c"], patch_size=list(spatial), image_channels=1)
    generator = torch.Generator().manual_seed(0)
    probs = (6 * torch.randn(3, *spatial, generator=generator)).softmax(0)
    header = nib.Nifti1Image(np.zeros(spatial, np.float32), AFFINE).header
    source = OpenedImage(torch.zeros(1, *spatial), lambda values: values, header=header)
    (path,) = write_prediction(Prediction(probs, source, card), tmp_path, "x", ["soft_label"])
    if len(spatial) == 2:
        stored = read_shares(path)
        assert np.load(path)["probs"].dtype == np.uint16
    else:
        stored = np.moveaxis(nib.load(path).get_fdata(dtype=np.float32), -1, 0)
        assert nib.load(path).get_data_dtype() == np.uint16
    error = np.abs(stored - probs.numpy()).max()
    assert 0 < error <= 1 / 131070 + 2e-7


@pytest.mark.parametrize(("more", "fits"), [(0, False), (2, True)], ids=["too-large", "fits"])
def test_probabilities_that_fill_the_device_stay_in_main_memory(more, fits, predictor, monkeypatch):
    """Four copies of 11 x 11 x 11 voxels of 3 classes of 4 bytes, in half of what is free: the other half is the network's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 4 * 11**3 * 3 * 4 + more, 0))
    monkeypatch.setattr(predictor, "device", torch.device("cuda"))
    assert predictor.place(torch.zeros(1, 11, 11, 11)).type == ("cuda" if fits else "cpu")
