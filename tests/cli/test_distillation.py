"""Students of trained runs on the command line: taught in every step or from written soft labels, killed and resumed, refused in one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from blob_run import make_blob_run
from commands import run_command
from conftest import ROOT
from teachers import write_teacher
from volumes import save

from densecal.data import DataProblems, SegmentationData, load_card, override_card
from densecal.inference import Predictor
from densecal.tasks import CachedTeachers


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def teacher(blobs) -> Path:
    """A run of one epoch on volumes in ``blobs``: 2 to train on, 2 to validate, 2 to test."""
    return make_blob_run(blobs)


@pytest.fixture(scope="module")
def soft_labels(teacher, tmp_path_factory) -> Path:
    """What it says about its training cases."""
    folder = tmp_path_factory.mktemp("soft") / "labels"
    run("soft_labels", folder.parent, f"run={teacher}", f"output={folder}")
    return folder


def run(command: str, folder: Path, *arguments: str, status: int = 0, **options: str) -> str:
    """Run a command to the exit status that is expected, and return what it printed."""
    log = folder / "log.txt"
    assert run_command(command, list(arguments), log, **options) == status, log.read_text()
    return log.read_text()


def student(blobs: Path, output: Path, *more: str) -> list[str]:
    card = [f"data={blobs / 'blobs.yaml'}", f"data.root={blobs}", f"output_dir={output}"]
    return [*card, "trainer.accelerator=cpu", "trainer.max_epochs=3", "model.channels=[2,4]", "loss=distillation", *more]


def the_run(output: Path) -> Path:
    (record,) = output.glob("*/*/run.json")
    return record.parent


def numbers(run: Path) -> tuple[list[dict[str, str]], str]:
    """Every epoch's and every case's, without times."""
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader((run / "metrics.csv").open())]
    return history, (run / "cases.csv").read_text()


@pytest.mark.parametrize("way", ["online", pytest.param("cached", marks=pytest.mark.slow)])
def test_killed_student_resumes_to_the_same_numbers(way, blobs, teacher, soft_labels, tmp_path):
    """With augmentation, so that patches of the soft labels are drawn anew in each epoch."""
    taught = [
        f"distillation={way}",
        f"distillation.teachers=[{teacher if way == 'online' else soft_labels}]",
        "data.augment=true",
        "data.samples_per_case=2",
    ]
    run("train", tmp_path, *student(blobs, tmp_path / "whole", *taught))
    run("train", tmp_path, *student(blobs, tmp_path / "cut", *taught), status=-signal.SIGKILL, die_in="training")
    text = run("train", tmp_path, f"resume={the_run(tmp_path / 'cut')}")
    assert "from the end of epoch 2" in text
    assert f"taught  by {teacher if way == 'online' else soft_labels}" in text
    whole, cut = the_run(tmp_path / "whole"), the_run(tmp_path / "cut")
    assert numbers(cut) == numbers(whole)
    assert len(numbers(whole)[0]) == 3
    assert f"{way.capitalize()}Teachers (teachers [&#39;" in (whole / "report.html").read_text()


def test_student_of_two_teachers_predicts_without_them(blobs, teacher, tmp_path):
    """Of two architectures, by the classical recipe with a temperature; the run itself goes on with no others."""
    other = write_teacher(tmp_path / "other.ckpt", model="segresnet", init_filters=8, blocks_down=[1, 1], blocks_up=[1], dropout=0.0)
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    taught = [
        "loss=compound",
        "target=teacher",
        "term=[kl,dml]",
        "loss.target.temperature=2",
        "loss.target.mix=1",
        "loss.terms.kl.term.temperature=2",
    ]
    taught += ["distillation=online", f"distillation.teachers=[{copy},{other}]", "distillation.checkpoint=last", "trainer.max_epochs=1"]
    assert f"taught  by {copy} and {other}" in run("train", tmp_path, *student(blobs, tmp_path / "runs", *taught))
    made = the_run(tmp_path / "runs")
    ((row,), _) = numbers(made)
    assert float(row["train/loss_kl"]) > 0
    shutil.rmtree(copy)
    assert Predictor.from_run(made)(blobs / "images" / "b0.nii.gz").probs.shape == (3, 8, 9, 8)
    refused = run("train", tmp_path, f"resume={made}", "trainer.max_epochs=2", status=1)
    assert refused.startswith(f"error: distillation: No checkpoint {copy / 'checkpoints' / 'last.ckpt'}.")
    refused = run("train", tmp_path, f"resume={made}", "trainer.max_epochs=2", "distillation=online", f"distillation.teachers=[{other}]", status=1)
    assert refused.startswith("error: Expected the teachers that the run began with")


def test_soft_labels_are_the_probabilities_of_every_training_case(blobs, teacher, soft_labels):
    """On the files' own grid, to half a step of 16 bits."""
    predictor = Predictor.from_run(teacher)
    cases = json.loads((teacher / "splits.json").read_text())["train"]
    assert {path.name for path in soft_labels.iterdir()} == {"soft_labels.json", *(f"{case}_soft_label.nii.gz" for case in cases)}
    for case in cases:
        image = nib.load(blobs / "images" / f"{case}.nii.gz")
        stored = nib.load(soft_labels / f"{case}_soft_label.nii.gz")
        assert stored.get_data_dtype() == np.uint16
        np.testing.assert_array_equal(stored.affine, image.affine)
        probs = predictor(blobs / "images" / f"{case}.nii.gz").probs.movedim(0, -1).numpy()
        assert np.ptp(probs) > 0.1
        np.testing.assert_allclose(stored.get_fdata(), probs, rtol=0, atol=1 / 131070 + 1e-7)


def test_stopped_writing_goes_on(teacher, soft_labels, tmp_path):
    folder = Path(shutil.copytree(soft_labels, tmp_path / "soft"))
    kept, lost = sorted(folder.glob("*.nii.gz"))
    whole, begun = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (folder / f".{lost.name}.1.unfinished").write_bytes(whole[:50])
    assert "2 cases, train, 1 of them there already" in run("soft_labels", tmp_path, f"run={teacher}", f"output={folder}")
    np.testing.assert_array_equal(nib.load(lost).get_fdata(), nib.load(soft_labels / lost.name).get_fdata())
    assert kept.stat().st_mtime_ns == begun
    assert not list(folder.glob(".*"))


def test_soft_labels_of_two_teachers_do_not_mix(teacher, soft_labels, tmp_path):
    refused = run("soft_labels", tmp_path, f"run={teacher}", "checkpoint=last", "inference=sliding_window", f"output={soft_labels}", status=1)
    assert refused.startswith(f"error: {soft_labels}: holds soft labels with ")


def remove(folder: Path, case: str) -> None:
    (folder / f"{case}_soft_label.nii.gz").unlink()


def of_shape(*shape: int):
    return lambda folder, case: save(folder / f"{case}_soft_label.nii.gz", np.full(shape, 1 / shape[-1], np.float32))


def of_classes(folder: Path, case: str) -> None:
    manifest = folder / "soft_labels.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": ["background", "up", "down"]}))


def cut_short(folder: Path, case: str) -> None:
    file = folder / f"{case}_soft_label.nii.gz"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove,
            r"no soft label of the training case '{case}', {case}_soft_label.nii.gz. densecal-soft-labels with the same output= goes on",
        ),
        (of_shape(8, 9, 8, 4), "expected a channel for each of the 3 classes of blobs, but got the shape (8, 9, 8, 4) of a volume"),
        (of_shape(8, 9, 7, 3), "has the shape (8, 9, 7)"),
        (of_classes, "the soft labels are of the classes ['background', 'up', 'down'], but blobs has"),
        (cut_short, "cannot be read"),
    ],
    ids=["missing", "channels", "grid", "classes", "damaged"],
)
def test_soft_labels_that_do_not_fit_are_named(damage, message, blobs, teacher, soft_labels, tmp_path):
    folder = Path(shutil.copytree(soft_labels, tmp_path / "soft"))
    case = json.loads((teacher / "splits.json").read_text())["train"][0]
    damage(folder, case)
    card = override_card(load_card(blobs / "blobs.yaml"), {"root": str(blobs)})
    with pytest.raises((ValueError, OSError, DataProblems)) as refused:
        SegmentationData(card, progress=False, training_companions=CachedTeachers([str(folder)], card=card).companions)
    assert message.replace("{case}", case) in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            [],
            "error: loss: learns from teachers, but there is none. Give trained runs: distillation=online distillation.teachers=[runs/EXPERIMENT/TIME].",
        ),
        (
            ["loss=ce", "distillation=online", "distillation.teachers=[{teacher}]"],
            "error: Expected a loss that learns from teachers, but CrossEntropyLoss does not.",
        ),
        (["distillation=online"], "error: distillation: Expected at least one teacher, but got none."),
        (
            ["distillation=online", "distillation.teachers=[{blobs}]"],
            "error: distillation: No checkpoint {blobs}/checkpoints/best.ckpt. It holds no finished epoch.",
        ),
    ],
    ids=["no-teacher", "nobody-listens", "empty", "no-run"],
)
def test_loss_and_teachers_go_together(more, message, blobs, teacher, tmp_path):
    def filled(text: str) -> str:
        return text.replace("{teacher}", str(teacher)).replace("{blobs}", str(blobs))

    refused = run("train", tmp_path, *student(blobs, tmp_path / "runs", *map(filled, more)), status=1)
    assert refused.startswith(filled(message))
    assert refused.count("\n") == 1


@pytest.mark.slow
def test_two_processes_are_taught_in_each(blobs, teacher, tmp_path):
    taught = ["distillation=online", f"distillation.teachers=[{teacher}]", "trainer.max_epochs=1", "data.samples_per_case=2"]
    command = [sys.executable, ROOT / "tools" / "train.py", "trainer=ddp", "trainer.devices=2", *student(blobs, tmp_path, *taught)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (the_run(tmp_path) / "report.html").exists()
