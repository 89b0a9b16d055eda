"""The same commands on images: train, be killed and go on, evaluate, predict."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from pictures import PALETTE, make_scenes, save_image, scene
from PIL import Image

OUTPUTS = "outputs=[label,probs,confidence,confidence_png,overlay]"


def train(root: Path, output: Path, *more: str, die_in: str | None = None, printed: bool = False) -> int:
    settings = [f"data={root / 'scenes.yaml'}", f"data.root={root}", f"output_dir={output}", "trainer.accelerator=cpu", "model.channels=[4,8]"]
    return run_command("train", [*settings, *more], output.with_suffix(".log"), die_in, epoch=1, printed=printed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    make_scenes(root)
    return root


@pytest.fixture(scope="module")
def run(scenes) -> Path:
    """The directory of a run of three epochs."""
    assert train(scenes, scenes / "runs", "trainer.max_epochs=3", "data.num_workers=2", printed=True) == 0, (scenes / "runs.log").read_text()
    (record,) = (scenes / "runs").glob("*/*/run.json")
    return record.parent


def test_a_run_on_images_is_whole(run):
    summary = json.loads((run / "summary.json").read_text())
    assert [case["case_id"] for case in summary["cases"]] == ["s6", "s7", "s8"]
    assert summary["settings"]["element"] == "pixels"
    assert {"iou_dataset", "iou_image", "iou_class", "accuracy_pooled"} <= summary["fine_grained"].keys()
    assert {path.name for path in (run / "predictions").iterdir()} == {f"s{n}_{end}" for n in (6, 7, 8) for end in ("label.png", "confidence.tif")}
    page = (run / "report.html").read_text()
    assert "voxel" not in page
    assert page.count("<img") >= 15, "three examples of five pictures"


def test_void_is_neither_learnt_nor_counted(run):
    pixels = sum((40 + n - 2) * (52 - n - 2) for n in (6, 7, 8))
    assert json.loads((run / "summary.json").read_text())["pooled"]["all"]["num_voxels"] == pixels


def test_a_killed_run_goes_on_to_the_same_numbers(scenes, run, tmp_path):
    output = tmp_path / "runs"
    assert train(scenes, output, "trainer.max_epochs=3", die_in="training") == -signal.SIGKILL
    assert train(scenes, output, "trainer.max_epochs=3", "resume=latest") == 0, output.with_suffix(".log").read_text()
    (resumed,) = (path.parent for path in output.glob("*/*/run.json"))
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, resumed))
    assert first["cases"] == second["cases"]
    assert first["pooled"] == second["pooled"]


def test_evaluate_a_run_and_its_saved_probabilities_agree(scenes, run, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("evaluate", [f"run={run}", f"output={tmp_path / 'a'}", "device=cpu"], log) == 0, log.read_text()
    test = tmp_path / "images"
    for n in (6, 7, 8):
        name = f"s{n}.{'jpg' if n % 2 else 'png'}"
        test.mkdir(exist_ok=True)
        (test / name).write_bytes((scenes / "images" / name).read_bytes())
    assert run_command("predict", [f"run={run}", f"input={test}", f"output={tmp_path / 'p'}", "outputs=[probs]", "device=cpu"], log) == 0, (
        log.read_text()
    )
    by_folder = [f"labels={scenes / 'labels'}", "ignore_index=255", "background=null", "strict=false"]
    by_card = [f"data={scenes / 'scenes.yaml'}", f"data.root={scenes}"]
    for name, settings in (("b", by_folder), ("c", by_card)):
        settings = [f"predictions={tmp_path / 'p'}", *settings, f"output={tmp_path / name}", "device=cpu"]
        assert run_command("evaluate", settings, log) == 0, log.read_text()
    first, *others = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "abc")
    for other in others:
        assert other["pooled"]["all"] == pytest.approx(first["pooled"]["all"], abs=1e-6)
    assert others[1]["classes"] == first["classes"], "the card names and colours them"


def test_predict_writes_pictures(run, tmp_path):
    image, _ = scene((45, 60), seed=20)
    save_image(tmp_path / "in" / "photo.png", image)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned a quarter to the right
    save_image(tmp_path / "in" / "turned.JPG", image, exif=turned)
    log = tmp_path / "log.txt"
    settings = [f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", OUTPUTS, "device=cpu"]
    assert run_command("predict", settings, log) == 0, log.read_text()
    for name, shape in (("photo", (45, 60)), ("turned", (60, 45))):
        files = {end: tmp_path / "out" / f"{name}_{end}" for end in ("label.png", "probs.npz", "confidence.tif", "confidence.png", "overlay.png")}
        assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(name)} == {path.name for path in files.values()}
        probs = np.load(files["probs.npz"])["probs"]
        assert probs.shape == (3, *shape)
        label = Image.open(files["label.png"])
        np.testing.assert_array_equal(np.asarray(label), probs.argmax(0))
        assert label.getpalette()[:9] == [value for color in PALETTE for value in color]
        confidence = np.asarray(Image.open(files["confidence.tif"]))
        assert confidence.dtype == np.float32
        np.testing.assert_array_equal(confidence, probs.max(0))
        np.testing.assert_allclose(np.asarray(Image.open(files["confidence.png"])) / 255, probs.max(0), atol=0.5 / 255)
        assert np.asarray(Image.open(files["overlay.png"])).shape == (*shape, 3)


def test_a_damaged_image_costs_one_line_and_the_others_are_predicted(run, tmp_path):
    image, _ = scene((45, 60), seed=21)
    save_image(tmp_path / "in" / "whole.png", image)
    half = save_image(tmp_path / "in" / "half.jpg", image)
    half.write_bytes(half.read_bytes()[:700])
    log = tmp_path / "log.txt"
    assert run_command("predict", [f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "outputs=[label]", "device=cpu"], log) == 1
    lines = log.read_text().splitlines()
    assert any(re.match(r"error: .*half\.jpg: cannot be read \(.*\)\. Expected one of \.png", line) for line in lines), lines
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole_label.png"]


def test_what_volumes_alone_have_is_refused(scenes, tmp_path):
    assert train(scenes, tmp_path / "runs", "data.spacing=[1,1]") == 1
    assert "`spacing` is for volumes" in (tmp_path / "runs.log").read_text()
