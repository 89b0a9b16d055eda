"""The whole command on a small set: what it writes, how it fails, and that a killed run comes to the same numbers."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from commands import MOMENTS, run_command
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from volumes import blob, save

from densecal.runs import lock_run

EPOCHS = 4
CARD = {
    "name": "blobs",
    "classes": ["background", "left", "right"],
    "patch_size": [8, 16, 8],
    "batch_size": 2,
    "num_workers": 2,
    "foreground_fraction": 0.5,
    "augmentation": {"affine_probability": 0.5, "noise_probability": 0.5, "bias_probability": 0.5, "contrast_probability": 0.5, "flip_axes": [0]},
    "val_fraction": 0.3,
    "test_fraction": 0.3,
    "epochs": EPOCHS,
    "notes": ["Boxes in noise."],
}


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Path:
    """Ten small volumes and their card ``blobs.yaml``: 4 to train on, 3 to validate, 3 to test."""
    root = tmp_path_factory.mktemp("blobs")
    for n in range(10):
        image, label = blob((9 + n % 3, 14, 10), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump(CARD))
    return root


def settings(blobs: Path, output: Path, *more: str) -> list[str]:
    small = ["model.channels=[4,8]", "model.dropout=0.2", "trainer.accelerator=cpu", "scheduler=poly"]
    return [f"data={blobs / 'blobs.yaml'}", f"data.root={blobs}", f"output_dir={output}", *small, *more]


def the_run(output: Path) -> Path:
    runs = [path.parent for path in output.glob("*/*/run.json")]
    assert len(runs) == 1, runs
    return runs[0]


def scores(run: Path) -> dict[str, object]:
    """Every number a run ends with, without times."""
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("run")
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader((run / "metrics.csv").open())]
    return {"summary": summary, "history": history, "cases": (run / "cases.csv").read_text()}


@pytest.fixture(scope="module")
def uninterrupted(blobs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    log = output / "log.txt"
    assert run_command("train", settings(blobs, output), log, printed=True) == 0, log.read_text()
    return the_run(output)


def test_run_directory_holds_everything(uninterrupted):
    names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/events.out.tfevents")}
    assert len(events) == 1
    predictions = {
        f"predictions/{case}_{kind}.nii.gz"
        for case in json.loads((uninterrupted / "splits.json").read_text())["test"]
        for kind in ("label", "confidence")
    }
    figures = {name for name in names if name.startswith("figures/")}
    assert "figures/reliability.png" in figures
    assert names - events - figures == predictions | {
        "cases.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        "report.html",
        "run.json",
        "splits.json",
        "summary.json",
        "table.md",
        "table.tex",
    }
    assert uninterrupted.parent.name == "blobs_dice_ce"
    assert len(list(csv.DictReader((uninterrupted / "metrics.csv").open()))) == EPOCHS
    page = (uninterrupted / "report.html").read_text()
    assert "Boxes in noise." in page
    record = json.loads((uninterrupted / "run.json").read_text())
    assert record["choices"]["loss"] == "dice_ce"
    assert record["versions"]["torch"]


def test_output_ends_with_the_path_of_the_report(uninterrupted):
    last = (uninterrupted.parents[1] / "log.txt").read_text().strip().splitlines()[-1]
    assert Path(last.split()[-1]) == uninterrupted / "report.html"


def test_report_holds_what_the_class_shares_alone_would_score(uninterrupted, blobs):
    """Shares counted from the training labels' files; the test cases' most common class is what such a model would predict."""
    baseline = json.loads((uninterrupted / "summary.json").read_text())["baseline"]
    splits = json.loads((uninterrupted / "splits.json").read_text())
    train, test = (
        np.concatenate([nib.load(blobs / "labels" / f"{case}.nii.gz").get_fdata().ravel() for case in splits[name]]) for name in ("train", "test")
    )
    shares = [(train == c).mean() for c in range(3)]
    assert baseline["class_shares"] == pytest.approx(shares)
    assert baseline["scores"]["accuracy"] == pytest.approx((test == 0).mean())
    assert baseline["scores"]["nll"] == pytest.approx(-sum((test == c).mean() * np.log(shares[c]) for c in range(3)))
    assert baseline["scores"]["dice"] == 0
    assert "class shares alone: Dice 0.0000, ECE " in (uninterrupted.parents[1] / "log.txt").read_text()


def test_written_predictions_have_the_reported_dice(uninterrupted, blobs):
    """Dice from the files alone, by its definition."""
    rows = {row["case_id"]: row for row in csv.DictReader((uninterrupted / "cases.csv").open())}
    assert len(rows) == 3
    for case, row in rows.items():
        predicted = nib.load(uninterrupted / "predictions" / f"{case}_label.nii.gz").get_fdata()
        reference = nib.load(blobs / "labels" / f"{case}.nii.gz").get_fdata()
        for c, name in ((1, "left"), (2, "right")):
            dice = 2 * ((predicted == c) & (reference == c)).sum() / ((predicted == c).sum() + (reference == c).sum())
            assert float(row[f"dice/{name}"]) == pytest.approx(dice, abs=1e-6)


# The run that meets with everything, below, is killed at the others.
@pytest.mark.parametrize("moment", [pytest.param(moment, marks=pytest.mark.slow) if moment in ("training", "last") else moment for moment in MOMENTS])
def test_killed_run_resumes_to_the_same_numbers(moment, blobs, uninterrupted, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("train", settings(blobs, tmp_path), log, die_in=moment) == -signal.SIGKILL, log.read_text()
    run = the_run(tmp_path)
    assert not (run / "report.html").exists()
    before = len((run / "metrics.csv").read_text().splitlines()) - 1
    assert before == (2 if moment in ("training", "validation") else 3)  # the row of epoch 2 is written before its checkpoints
    assert run_command("train", [f"resume={run}"], log) == 0, log.read_text()
    assert "from the end of epoch 2" in log.read_text()
    assert scores(run) == scores(uninterrupted)
    assert not list(run.rglob("*.unfinished"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [round(event.value, 6) for event in events.Scalars("val/dice")] == [
        round(float(row["val/dice"]), 6) for row in csv.DictReader((run / "metrics.csv").open())
    ]


def test_killed_run_of_losses_that_learn_resumes_to_the_same_numbers(blobs, tmp_path):
    """Multipliers set by validation, a table of soft labels, a mixture over losses, a weight that follows a schedule, levels of perturbation and draws by them."""
    learning = [
        "loss=compound",
        "target=one_hot",
        "term=[ce,crac,online_label_smoothing,bootstrapped]",
        "loss.terms.ce.weight={_target_:densecal.schedules.Linear,start:0.5,end:1.0}",
        "perturbation=aslp",
        *(
            f"perturbation.{setting}"
            for setting in ("rule.eta=0.02", "rule.accuracy_weight=2", "alpha=0.4", "beta=0.5", "warmup=1", "expected=false")
        ),
    ]
    log = tmp_path / "log.txt"
    assert run_command("train", settings(blobs, tmp_path / "whole", *learning), log) == 0, log.read_text()
    assert "loss    CompoundLoss, its labels through AdaptivePerturbation" in log.read_text()
    assert run_command("train", settings(blobs, tmp_path / "cut", *learning), log, die_in="training") == -signal.SIGKILL, log.read_text()
    assert run_command("train", [f"resume={the_run(tmp_path / 'cut')}"], log) == 0, log.read_text()
    whole, cut = the_run(tmp_path / "whole"), the_run(tmp_path / "cut")
    assert scores(cut) == scores(whole)
    page = (cut / "report.html").read_text()
    assert "Linear (start 0.5, end 1) ce + 1 crac" in page

    assert cut.parent.name == "blobs_compound_aslp"
    assert (cut / "training_cases.csv").read_text() == (whole / "training_cases.csv").read_text()
    levels = {row["case_id"]: float(row["perturbation"]) for row in csv.DictReader((cut / "training_cases.csv").open())}
    assert sorted(levels) == sorted(json.loads((cut / "splits.json").read_text())["train"])
    assert len(set(levels.values())) == len(levels)
    history = list(csv.DictReader((cut / "metrics.csv").open()))
    assert [float(row["train/perturbation_mean"]) for row in history[:2]] == pytest.approx(
        [0.4, 0.4]
    )  # the warm-up, and the epoch whose end is the first update
    assert float(history[2]["train/perturbation_min"]) < float(history[2]["train/perturbation_max"])
    assert "AdaptivePerturbation (rule CalibrationRule (eta 0.02, accuracy_weight 2" in page
    assert "Level of label perturbation" in page


def test_killed_run_of_so_many_steps_resumes_to_the_same_numbers(blobs, uninterrupted, tmp_path):
    """Eight steps are four epochs of two, whatever the card says; the rate has come to nothing after as many."""
    log = tmp_path / "log.txt"
    steps = settings(blobs, tmp_path, "trainer.max_steps=8", "data.epochs=1")
    assert run_command("train", steps, log, die_in="training") == -signal.SIGKILL, log.read_text()
    run = the_run(tmp_path)
    assert run_command("train", [f"resume={run}"], log) == 0, log.read_text()
    assert re.findall(r"^epoch (\S+)", log.read_text(), flags=re.MULTILINE) == ["3/4", "4/4"]
    assert scores(run) == scores(uninterrupted)


@pytest.mark.slow
def test_killed_run_on_real_volumes_resumes_to_the_same_numbers(hippocampus, tmp_path):
    """Killed at every moment in turn, in one run: in a step, in validation, in the writing of each checkpoint."""
    options = ["data=hippocampus", f"data.root={hippocampus}", "loss=svls", "model.dropout=0.2", "trainer.max_epochs=5", "trainer.accelerator=cpu"]
    log = tmp_path / "log.txt"
    assert run_command("train", [*options, f"output_dir={tmp_path / 'whole'}"], log) == 0, log.read_text()
    begin = [*options, f"output_dir={tmp_path / 'cut'}"]
    for epoch, moment in enumerate(sorted(MOMENTS), start=1):  # "best" first: the second epoch is better than the first
        assert run_command("train", begin, log, die_in=moment, epoch=epoch) == -signal.SIGKILL, log.read_text()
        begin = [f"resume={the_run(tmp_path / 'cut')}"]
    assert run_command("train", begin, log) == 0, log.read_text()
    assert scores(the_run(tmp_path / "cut")) == scores(the_run(tmp_path / "whole"))


def test_resume_latest_takes_the_last_run_with_these_settings(blobs, tmp_path):
    log = tmp_path / "log.txt"
    runs: list[Path] = []
    for seed in (0, 1):
        assert run_command("train", settings(blobs, tmp_path, f"seed={seed}"), log, die_in="training", epoch=1) == -signal.SIGKILL
        runs += [path.parent for path in tmp_path.glob("*/*/run.json") if path.parent not in runs]
    first, second = runs
    assert run_command("train", settings(blobs, tmp_path, "seed=0", "resume=latest", "trainer.max_epochs=2"), log) == 0, log.read_text()
    assert (first / "report.html").exists()
    assert not (second / "report.html").exists()
    assert run_command("train", settings(blobs, tmp_path, "seed=2", "resume=latest"), log) == 1
    assert "No run with these settings" in log.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [("loss=svls", r"loss=svls: the run in .* was made with loss=dice_ce"), ("seed=5", r"seed=5: the run in .* was made with seed=0")],
)
def test_resumed_run_cannot_become_another(change, message, uninterrupted, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("train", [f"resume={uninterrupted}", change], log) == 1
    assert re.search(message, log.read_text())
    assert (uninterrupted / "report.html").exists()


def test_resuming_needs_a_checkpoint(blobs, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("train", settings(blobs, tmp_path), log, die_in="last", epoch=0) == -signal.SIGKILL  # the one before the first step
    assert run_command("train", [f"resume={the_run(tmp_path)}"], log) == 1
    assert re.fullmatch(r"error: No checkpoint .*last\.ckpt\. It holds no finished epoch\.\n", log.read_text())
    assert run_command("train", settings(blobs, tmp_path, "resume=latest"), log) == 1
    assert "No run with these settings" in log.read_text()
    assert run_command("train", [f"resume={tmp_path / 'nowhere'}"], log) == 1
    assert "No run in" in log.read_text()


def damage(root: Path, kind: str) -> str:
    """Damage one case; return what the line about it must hold."""
    if kind == "truncated":
        path = root / "images" / "b3.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
        return r"b3\.nii\.gz.*cannot be read"
    label = nib.load(root / "labels" / "b3.nii.gz")
    values = np.asarray(label.dataobj).copy()
    if kind == "shape":
        save(root / "labels" / "b3.nii.gz", values[:-1])
        return r"labels/b3\.nii\.gz.*has the shape"
    values[0, 0, 0] = 7
    save(root / "labels" / "b3.nii.gz", values)
    return r"labels/b3\.nii\.gz.*outside the card's classes 0 to 2: 7 \(1 voxels\)"


@pytest.mark.parametrize("kind", ["truncated", "shape", "value"])
def test_damaged_set_fails_early_and_leaves_nothing(kind, blobs, tmp_path):
    copy = tmp_path / "set"
    for path in blobs.glob("*/*.nii.gz"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    message = damage(copy, kind)
    output, log = tmp_path / "runs", tmp_path / "log.txt"
    assert run_command("train", [*settings(blobs, output), f"data.root={copy}"], log) == 1
    lines = log.read_text().strip().splitlines()
    assert len([line for line in lines if "b3" in line]) == 1
    assert re.search(message, log.read_text())
    assert not output.exists()


def test_impossible_settings_fail_early_and_leave_nothing(blobs, tmp_path):
    output, log = tmp_path / "runs", tmp_path / "log.txt"
    for change, message in {
        "data.patch_size=[9,16,8]": "model: cannot take patches of 9 x 16 x 8",
        "loss.activation=sigmoid": "sigmoid",
        "monitor=val/dicee": "Did you mean 'val/dice'",
        "trainer.devices=0": "trainer",
        "optimizer.lr=-1": "optimizer: Invalid learning rate",
        "encoder_lr_ratio=0.1": "a network with an `encoder` for `encoder_lr_ratio` 0.1, but UNet has none",
    }.items():
        assert run_command("train", settings(blobs, output, change), log) == 1, change
        assert message in log.read_text()
        assert len(log.read_text().splitlines()) == 1, log.read_text()
        assert not output.exists()


def test_failing_in_training_leaves_no_report(blobs, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("train", settings(blobs, tmp_path), log, die_in="last", epoch=0) == -signal.SIGKILL
    run = the_run(tmp_path)
    assert not (run / "report.html").exists()
    assert not (run / "summary.json").exists()


def test_second_set_replaces_the_test_split(blobs, tmp_path):
    other = tmp_path / "other"
    for n in range(2):
        image, label = blob((10, 12, 11), seed=100 + n)
        save(other / "images" / f"c{n}.nii.gz", image)
        save(other / "labels" / f"c{n}.nii.gz", label)
    log = tmp_path / "log.txt"
    more = [
        "trainer.max_epochs=1",
        f"data.test_root={other}",
        "data.spacing=[1.5,1.5,1.5]",
        "data.orientation=LPS",
        "loss=nacl",
        "predictions=[probs]",
    ]
    assert run_command("train", settings(blobs, tmp_path / "runs", *more), log) == 0, log.read_text()
    run = the_run(tmp_path / "runs")
    assert [row["case_id"] for row in csv.DictReader((run / "cases.csv").open())] == ["c0", "c1"]
    # Scored and written on the files' own grid, whatever the network worked on.
    probs = nib.load(run / "predictions" / "c0_probs.nii.gz")
    assert probs.shape == (10, 12, 11, 3)
    np.testing.assert_allclose(probs.affine, nib.load(other / "images" / "c0.nii.gz").affine)
    assert {int(row["num_voxels"]) for row in csv.DictReader((run / "cases.csv").open())} == {10 * 12 * 11}


def test_sweep_makes_one_run_per_job(blobs, tmp_path):
    log = tmp_path / "log.txt"
    assert run_command("train", ["-m", *settings(blobs, tmp_path / "runs", "loss=svls,ce", "trainer.max_epochs=1")], log) == 0, log.read_text()
    assert {path.parents[1].name for path in (tmp_path / "runs").glob("*/*/report.html")} == {"blobs_svls", "blobs_ce"}


def in_processes(*command: str | Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_two_processes_validate_to_the_numbers_of_one(uninterrupted, tmp_path):
    """The last checkpoint, whose scores one process has logged; three cases for two processes."""
    assert len(json.loads((uninterrupted / "splits.json").read_text())["val"]) == 3
    in_processes(ROOT / "tests" / "validate_run.py", uninterrupted, 2, tmp_path / "scores.json")
    two = json.loads((tmp_path / "scores.json").read_text())
    *_, row = csv.DictReader((uninterrupted / "metrics.csv").open())
    one = {name: float(value) for name, value in row.items() if name.startswith("val/")}
    assert len(one) > 10
    assert two == pytest.approx(one, abs=1e-6, nan_ok=True)


def test_two_processes_train_into_one_run_as_one_process(blobs, tmp_path):
    """Rank 0 alone names the run directory. With the same batches, divided, losses, levels of perturbation and scores are those of one process."""
    rule = [f"perturbation.{setting}" for setting in ("warmup=0", "alpha=0.2", "rule.eta=0.02", "rule.accuracy_weight=2")]
    common = [
        "loss=dice_ce",
        "loss.sync_stats=true",
        "perturbation=aslp",
        *rule,
        "model.dropout=0",
        "trainer.max_epochs=2",
        "predictions=[]",
        "data.samples_per_case=2",
    ]
    log = tmp_path / "log.txt"
    assert run_command("train", settings(blobs, tmp_path / "one", *common, "data.batch_size=4"), log) == 0, log.read_text()
    two = settings(blobs, tmp_path / "two", *common, "data.batch_size=2")
    in_processes(ROOT / "tools" / "train.py", "trainer=ddp", "trainer.devices=2", *two)
    runs = [the_run(tmp_path / name) for name in ("one", "two")]
    assert all((run / "report.html").exists() for run in runs)
    one, two = ({row["case_id"]: float(row["perturbation"]) for row in csv.DictReader((run / "training_cases.csv").open())} for run in runs)
    assert len(set(one.values()) - {0.0, 0.2}) == 4
    assert two == pytest.approx(one, rel=1e-3)
    one, two = (
        [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader((run / "metrics.csv").open())]
        for run in runs
    )
    assert two[1] == pytest.approx(one[1], rel=1e-3, abs=1e-3, nan_ok=True)


def test_two_processes_test_to_the_numbers_of_one(uninterrupted, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(uninterrupted, run)
    for written in ("summary.json", "cases.csv", "report.html"):
        (run / written).unlink()
    in_processes(ROOT / "tools" / "train.py", f"resume={run}", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    assert scores(run) == scores(uninterrupted)


HARM = [  # where, in which epoch, what, the exit status, what it says, and where the run goes on
    ("training", 0, "interrupt", 130, "Stopped. Go on with resume={run}", "its beginning"),
    ("last", 0, "terminate", 143, "Stopped. Go on with resume={run}", "its beginning"),
    ("training", 1, "worker", 1, r"error: Data loading: worker \(pid.* less\. Go on with resume={run}", "the end of epoch 1"),
    ("last", 1, "full", 1, r"error: {run}/checkpoints/last\.ckpt: cannot be written \(File too large\)\. Go on with resume={run}, when.*", "the end of epoch 1"),
    ("renaming", 2, "kill", -signal.SIGKILL, None, "the end of epoch 2"),
    ("training", 3, "kill", -signal.SIGKILL, None, "the end of epoch 3"),
    ("predictions", 3, "full", 1, r"error: {run}/predictions/.*: cannot be written \(File too large\)\. Go on with resume={run}, when.*", "the end of epoch 4"),
    ("cases.csv", 3, "full", 1, r"error: {run}/table\.md: cannot be written \(File too large\)\. Go on with resume={run}, when.*", "the end of epoch 4"),
    ("predictions", 3, "interrupt", 130, "Stopped. Go on with resume={run}", "the end of epoch 4"),
    ("report.html", 3, "kill", -signal.SIGKILL, None, "the end of epoch 4"),
]  # fmt: skip


def test_run_that_meets_with_everything_comes_to_the_same_numbers(blobs, uninterrupted, tmp_path):
    """Stopped by hand and by the system, out of space, short of a worker, killed between a file and its place: in one run, at one moment after the other."""
    log, line = tmp_path / "log.txt", settings(blobs, tmp_path)
    for moment, epoch, by, status, last_line, whence in HARM:
        assert run_command("train", line, log, die_in=moment, epoch=epoch, by=by) == status, (moment, epoch, by, log.read_text())
        run, said = the_run(tmp_path), log.read_text()
        line = [f"resume={run}"]
        assert "Traceback" not in said
        assert last_line is None or re.fullmatch(last_line.format(run=run), said.strip().splitlines()[-1]), said
        assert bool(list(run.rglob("*.unfinished"))) == (by == "kill" and moment != "training")
        assert (run / "run.lock").exists() == (by == "kill")
        assert not (run / "report.html").exists()
        if whence == "its beginning":
            predict = [f"run={run}", "checkpoint=last", f"input={blobs / 'images'}", f"output={tmp_path / 'out'}"]
            assert run_command("predict", predict, log) == 1
            assert "last.ckpt: holds no finished epoch" in log.read_text()
        elif moment != "last":
            content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
            assert f"the end of epoch {content['epoch'] + 1}" == whence
    with lock_run(run):
        assert run_command("train", line, log) == 1
        assert re.fullmatch(rf"error: {run}: process {os.getpid()} on \S+, since \S+, is at work in this run\. Wait.*\n", log.read_text())
    assert run_command("train", line, log) == 0, log.read_text()
    assert f", from {whence}" in log.read_text()
    assert scores(run) == scores(uninterrupted)
    assert not [path for name in ("*.unfinished", "run.lock") for path in run.rglob(name)]


def test_loss_that_is_not_finite_is_one_line(blobs, tmp_path):
    log = tmp_path / "log.txt"
    diverging = ["optimizer=sgd", "optimizer.lr=1e38", "scheduler=none", "loss=ce", "data.num_workers=0"]
    assert run_command("train", settings(blobs, tmp_path, *diverging), log) == 1
    said = log.read_text().strip().splitlines()[-1]
    assert re.match(r"error: The (loss|network's output) is not finite for (the case|cases) b\d", said), said
    assert f"Go on with resume={the_run(tmp_path)} and such a setting" in said
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_killed_processes_leave_none_behind(blobs, tmp_path):
    """Their loader workers and fork servers go with them."""
    command = [sys.executable, ROOT / "tools" / "train.py", "trainer=ddp", "trainer.devices=2", *settings(blobs, tmp_path, "trainer.max_epochs=9999")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout is not None
    assert any(line.startswith("epoch 1/") for line in first.stdout)
    others = [int(pid) for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    ranks = [first.pid, *(pid for pid in others if "train.py" in Path(f"/proc/{pid}/cmdline").read_text())]
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    for _ in range(60):
        try:
            os.killpg(first.pid, 0)  # sends nothing; asks whether the group has a process left
        except ProcessLookupError:
            return
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    pytest.fail("processes were left behind")
