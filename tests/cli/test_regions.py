"""The commands on regions, one and several, of images and of volumes: train, be killed and go on, evaluate, predict, read back."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from blob_run import CARD
from commands import run_command
from panels import make_panel
from pictures import make_scenes
from PIL import Image
from volumes import blob, save

from densecal.data import PredictionFolder
from densecal.data.card import load_card, override_card
from densecal.data.card_labels import CardLabels
from densecal.data.medium import medium_of
from densecal.inference import Prediction, Predictor, RunCases, cases_of_split, write_prediction


class Set(NamedTuple):
    """A data set, and how it is trained on."""

    root: Path
    card: Path
    settings: list[str]


def train(data: Set, output: Path, *more: str, die_in: str | None = None, printed: bool = False) -> int:
    settings = [
        f"data={data.card}",
        f"data.root={data.root}",
        f"output_dir={output}",
        "trainer.accelerator=cpu",
        "model.channels=[4,8]",
        *data.settings,
    ]
    return run_command("train", [*settings, *more], output.with_suffix(".log"), die_in, epoch=1, printed=printed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Set:
    """One region of images, softly labelled by its neighbours."""
    root = tmp_path_factory.mktemp("scenes")
    return Set(root, make_scenes(root), ["data.regions={car: [car]}", "loss=svls", "data.num_workers=2"])


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Set:
    """Two regions of volumes, one within the other."""
    root = tmp_path_factory.mktemp("blobs")
    for n in range(6):
        image, label = blob((8, 9, 8), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump(CARD))
    return Set(root, root / "blobs.yaml", ["data.regions={left lobe: [left], whole: [1, right]}", "data.spacing=[1,1,1.5]"])


def trained(data: Set) -> Path:
    output = data.root / "runs"
    assert train(data, output, "trainer.max_epochs=2", "predictions=[label,probs]", printed=True) == 0, output.with_suffix(".log").read_text()
    (record,) = output.glob("*/*/run.json")
    return record.parent


@pytest.fixture(scope="module")
def run_of_scenes(scenes) -> Path:
    return trained(scenes)


@pytest.fixture(scope="module")
def run_of_blobs(blobs) -> Path:
    return trained(blobs)


def summary(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(("kind", "names"), [("scenes", ["car"]), ("blobs", ["left lobe", "whole"])])
def test_a_run_on_regions_is_whole(kind, names, request):
    data, run = request.getfixturevalue(kind), request.getfixturevalue(f"run_of_{kind}")
    content = summary(run)
    assert [entry["name"] for entry in content["classes"]] == names
    assert all(entry["foreground"] for entry in content["classes"])
    assert content["run"]["regions"] == ({"car": "car"} if kind == "scenes" else {"left lobe": "left", "whole": "left + right"})
    assert {"dice", *(f"dice/{name}" for name in names)} <= content["mean"].keys()
    shares = content["baseline"]["class_shares"]
    assert len(shares) == len(names)
    assert all(0 < share < 0.2 for share in shares)
    assert content["pooled"]["foreground"]["num_voxels"] > 0
    output = data.root / "runs.log"
    assert f"regions {', '.join(names)}" in output.read_text()
    assert "You have overridden" not in output.read_text()
    assert "val/dice " in output.read_text()
    page = (run / "report.html").read_text()
    assert page.count("<img") >= 5, "examples"


def test_ignored_pixels_are_in_no_region(run_of_scenes):
    pixels = sum((40 + n - 2) * (52 - n - 2) for n in (6, 7, 8))
    assert summary(run_of_scenes)["pooled"]["all"]["num_voxels"] == pixels


@pytest.mark.slow
def test_a_killed_run_on_a_region_goes_on_to_the_same_numbers(scenes, run_of_scenes, tmp_path):
    output = tmp_path / "runs"
    assert train(scenes, output, "trainer.max_epochs=2", die_in="validation") == -signal.SIGKILL
    assert train(scenes, output, "resume=latest", "trainer.max_epochs=2") == 0, output.with_suffix(".log").read_text()
    (resumed,) = (path.parent for path in output.glob("*/*/run.json"))
    assert summary(resumed)["cases"] == summary(run_of_scenes)["cases"]


@pytest.mark.parametrize("kind", ["scenes", "blobs"])
def test_saved_probabilities_are_read_as_the_run_has_them(kind, request):
    """From labels in a folder, where the file beside the probabilities says what the regions are made of, and from a card that is told the same as in training."""
    data, run = request.getfixturevalue(kind), request.getfixturevalue(f"run_of_{kind}")
    predictor = Predictor.from_run(run)
    _, cases = cases_of_split(predictor.card, "test")
    of_run = RunCases(predictor, cases, predictor.card)
    for labels in (data.root / "labels", CardLabels(predictor.card, cases, data.root)):
        saved = PredictionFolder(run / "predictions", labels)
        assert (saved.class_names, saved.activation) == (predictor.card.schema.names, "sigmoid")
        assert saved.case_ids == of_run.case_ids
        for case_id in saved.case_ids:
            torch.testing.assert_close(saved[case_id].probs, of_run[case_id].probs, atol=1e-6, rtol=0)
            assert torch.equal(saved[case_id].label, of_run[case_id].label)


def test_saved_probabilities_of_regions_are_evaluated_without_a_setting(blobs, run_of_blobs, tmp_path):
    log, output = tmp_path / "log.txt", tmp_path / "out"
    folders = [f"predictions={run_of_blobs / 'predictions'}", f"labels={blobs.root / 'labels'}", "strict=false"]  # there are labels of other splits
    assert run_command("evaluate", [*folders, f"output={output}", "device=cpu", "replicates=0"], log) == 0, log.read_text()
    before, found = summary(run_of_blobs), summary(output)
    assert found["pooled"]["all"] == pytest.approx(before["pooled"]["all"], abs=1e-6)
    assert found["mean"] == pytest.approx(before["mean"], abs=1e-6)


def test_predicted_images_of_a_region(scenes, run_of_scenes, tmp_path):
    prediction = Predictor.from_run(run_of_scenes)(scenes.root / "images" / "s6.png")
    assert prediction.label_map.shape == prediction.confidence.shape == (1, 46, 46)
    written = write_prediction(prediction, tmp_path, "s6", ["label", "probs", "confidence", "confidence_png", "overlay"])
    assert [path.name for path in written] == ["s6_label.png", "s6_probs.npz", "s6_confidence.tif", "s6_confidence.png", "s6_overlay.png"]
    (probs,) = np.load(tmp_path / "s6_probs.npz")["probs"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s6_label.png")), probs > 0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s6_confidence.tif")), np.maximum(probs, 1 - probs))
    assert {path.name for path in (run_of_scenes / "predictions").iterdir()} == {
        "dataset.json",
        *(f"s{n}_{end}" for n in (6, 7, 8) for end in ("label.png", "probs.npz")),
    }


def test_predicted_volumes_of_regions(run_of_blobs):
    folder = run_of_blobs / "predictions"
    (name, *_) = sorted(path.name.removesuffix("_probs.nii.gz") for path in folder.glob("*_probs.nii.gz"))
    probs, label = (nib.load(folder / f"{name}_{kind}.nii.gz") for kind in ("probs", "label"))
    assert label.shape == probs.shape == (8, 9, 8, 2)
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(label.dataobj), np.asarray(probs.dataobj) > 0.5)


def test_several_regions_of_an_image_are_a_file_each(scenes, tmp_path):
    card = override_card(load_card(scenes.card), {"regions": {"car": ["car"], "on earth": ["car", "road"]}})
    probs = torch.rand(2, 46, 46, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(probs, medium_of(card).open([scenes.root / "images" / "s6.png"], card), card)
    written = write_prediction(prediction, tmp_path, "s6", ["label", "confidence", "confidence_png", "overlay"])
    names = ["label_car.png", "label_on_earth.png", "confidence_car.tif", "confidence_on_earth.tif", "confidence_car.png", "confidence_on_earth.png"]
    assert [path.name for path in written] == [f"s6_{name}" for name in (*names, "overlay.png")]
    for r, name in enumerate(("car", "on_earth")):
        label = Image.open(tmp_path / f"s6_label_{name}.png")
        np.testing.assert_array_equal(np.asarray(label), prediction.label_map[r].numpy())
        assert tuple(label.getpalette()[3:6]) == card.schema.palette[r]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"s6_confidence_{name}.tif")), prediction.confidence[r].numpy())


def test_a_student_of_regions_has_its_labels_perturbed(blobs, run_of_blobs, tmp_path):
    """From written soft labels, whose folder says what the regions are; another set of regions is refused."""
    log, folder = tmp_path / "log.txt", tmp_path / "soft"
    assert run_command("soft_labels", [f"run={run_of_blobs}", f"output={folder}", "device=cpu"], log) == 0, log.read_text()
    manifest = json.loads((folder / "soft_labels.json").read_text())
    assert manifest["classes"] == ["left lobe", "whole"]
    assert (manifest["activation"], manifest["regions"]) == ("sigmoid", {"left lobe": ["left"], "whole": ["left", "right"]})
    output = tmp_path / "runs"
    taught = ["loss=distillation", "distillation=cached", f"distillation.teachers=[{folder}]"]
    assert train(blobs, output, *taught, "perturbation=aslp", "perturbation.warmup=0", "trainer.max_epochs=2") == 0, output.with_suffix(
        ".log"
    ).read_text()
    (student,) = (path.parent for path in output.glob("*/*/run.json"))
    assert summary(student)["run"]["regions"] == {"left lobe": "left", "whole": "left + right"}
    with (student / "training_cases.csv").open() as file:
        assert all(float(row["perturbation"]) > 0 for row in csv.DictReader(file))
    others = Set(blobs.root, blobs.card, ["data.regions={left lobe: [right], whole: [1, right]}", *blobs.settings[1:]])
    assert train(others, tmp_path / "other", *taught) == 1
    assert (
        "the soft labels are of the regions {'left lobe': ['left'], 'whole': ['left', 'right']}, but blobs has"
        in (tmp_path / "other.log").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "loss"), [("mean", ["loss=dml"]), ("all", ["loss=compound", "term=ce", "target=random_rater"])])
def test_regions_of_several_raters(fusion, loss, tmp_path):
    card = make_panel(tmp_path, "images", cases=6, rater_fusion=fusion)
    content = {key: value for key, value in asdict(card).items() if key not in ("augmentation", "pipeline")}
    (tmp_path / "panel.yaml").write_text(yaml.safe_dump(content))
    panel = Set(tmp_path, tmp_path / "panel.yaml", ["data.regions={car: [car]}", *loss])
    run = trained(panel)
    content = summary(run)
    assert {"qubiq_dice", "soft_dice", "soft_iou"} <= content["mean"].keys()
    assert content["run"]["reference"].startswith("mean of the raters")
    assert "Agreement" in (run / "report.html").read_text()
    saved = [f"predictions={run / 'predictions'}", f"data={panel.card}", f"data.root={panel.root}", panel.settings[0], "split=test"]
    log, output = tmp_path / "log.txt", tmp_path / "out"
    assert run_command("evaluate", [*saved, f"output={output}", "device=cpu", "replicates=0"], log) == 0, log.read_text()
    assert summary(output)["mean"] == pytest.approx(content["mean"], abs=1e-6)
