"""Several runs as one model: calibrated, evaluated beside its members, and predicted with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hydra
import nibabel as nib
import numpy as np
import pytest
import torch
from blob_run import make_blob_run, make_relative
from commands import run_command
from conftest import ROOT
from omegaconf import DictConfig
from volumes import blob

from densecal.cli import calibrate as calibrate_module
from densecal.cli import evaluate as evaluate_module
from densecal.cli.configuration import CommandError, prepare_arguments
from densecal.cli.members import member_paths
from densecal.cli.settings import register_settings
from densecal.inference.calibration import read_calibration
from densecal.inference.predictor import Predictor
from densecal.posthoc import TemperatureScaling
from densecal.runs import file_hash

QUICK = ("device=cpu", "replicates=50")


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[Path]:
    """Three runs of one split that differ in their networks, in a folder of their own."""
    run = make_blob_run(tmp_path_factory.mktemp("blobs"))
    folder = run.parents[1] / "seeds"
    return [make_relative(run, folder / f"seed{seed}", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def root(members) -> Path:
    return members[0].parents[2]


@pytest.fixture(scope="module")
def calibrators(members, tmp_path_factory) -> Path:
    """The folder of those that were fitted for the three."""
    folder = tmp_path_factory.mktemp("calibrators")
    log = folder / "log.txt"
    arguments = [listed("ensemble", members), "posthoc=[temperature,isotonic]", f"output={folder}", *QUICK]
    assert run_command("calibrate", arguments, log) == 0, log.read_text()
    return folder


def listed(setting: str, runs: list[Path]) -> str:
    return f"{setting}=[{','.join(map(str, runs))}]"


def composed(command: str, *arguments: str) -> DictConfig:
    register_settings()
    checked = prepare_arguments([*arguments, *QUICK], command)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return hydra.compose(command, checked)


def mean_of(runs: list[Path], image: Path) -> torch.Tensor:
    total = np.zeros((3, 8, 9, 8))
    for run in runs:
        total += Predictor.from_run(run)(image).probs.numpy()
    return torch.from_numpy(total / len(runs)).float()


def splits_of(run: Path) -> dict[str, list[str]]:
    return json.loads((run / "splits.json").read_text())


def test_ensemble_is_fitted_on_validation_cases_and_looked_at_on_test_cases(members, calibrators):
    record = json.loads((calibrators / "temperature.json").read_text())
    assert sorted(record["fitted_on"]) == sorted(splits_of(members[0])["val"])
    assert sorted(record["evaluation"]["cases"]) == sorted(splits_of(members[0])["test"])
    assert [member["run"] for member in record["members"]] == [str(run) for run in members]
    assert [member["checkpoint"] for member in record["members"]] == [file_hash(run / "checkpoints" / "best.ckpt") for run in members]
    assert "checkpoint" not in record
    log = (calibrators / "log.txt").read_text()
    assert f"the mean of {', '.join(map(str, members))}: fitted on 2 val cases" in log
    assert "on the test cases" in log


def test_temperature_is_that_of_the_mean(members, root, calibrators):
    pairs = []
    for case_id in splits_of(members[0])["val"]:
        label = torch.from_numpy(blob((8, 9, 8), seed=int(case_id[1:]))[1].astype(np.int64))
        pairs.append((mean_of(members, root / "images" / f"{case_id}.nii.gz").unsqueeze(0), label.unsqueeze(0)))
    expected = TemperatureScaling(3).fit(pairs, from_probs=True)
    found = read_calibration(calibrators / "temperature.safetensors").calibrator
    assert float(found.temperature) == pytest.approx(float(expected.temperature), rel=1e-4)


def test_ensemble_is_evaluated_beside_its_members(members, calibrators, tmp_path, capsys):
    out = tmp_path / "out"
    models = [listed("ensemble", members[::-1]), f"run={{a: {members[0]}}}"]
    fitted = f"calibration={calibrators / 'isotonic.safetensors'}"
    evaluate_module.evaluate(composed("evaluate", *models, fitted, f"output={out}", "surface_tolerance=null", "boundary_width=null"))
    record = json.loads((calibrators / "isotonic.json").read_text())["evaluation"]
    summaries = {name: json.loads((out / name / "summary.json").read_text()) for name in ("ensemble", "ensemble_isotonic", "a")}
    for name, when in (("ensemble", "before"), ("ensemble_isotonic", "after")):
        pooled = summaries[name]["pooled"]["all"]
        assert pooled["ece_top_label"] == pytest.approx(record[when]["scores"]["ece"], abs=1e-6)
        assert pooled["nll"] == pytest.approx(record[when]["scores"]["nll"], abs=1e-6)
    assert summaries["ensemble"]["run"]["run"] == [str(run) for run in reversed(members)]
    assert summaries["ensemble_isotonic"]["run"]["calibration"] == "isotonic, fitted on 2 cases"
    assert summaries["ensemble"]["run"]["loss"] == summaries["a"]["run"]["loss"]
    assert summaries["ensemble"]["baseline"]["class_shares"] == pytest.approx(summaries["a"]["baseline"]["class_shares"])  # of one split
    comparison = json.loads((out / "comparison.json").read_text())
    assert set(comparison["differences"]) == {"ensemble_isotonic", "a"}  # from the ensemble
    assert "warning" not in capsys.readouterr().err


def test_ensemble_predicts_calibrated_in_any_order(members, root, calibrators, tmp_path):
    image, log = root / "images" / "b0.nii.gz", tmp_path / "log.txt"
    path = calibrators / "isotonic.safetensors"
    arguments = [f"input={image}", "outputs=[probs]", f"calibration={path}", "device=cpu"]
    assert run_command("predict", [listed("run", members[::-1]), f"output={tmp_path / 'out'}", *arguments], log) == 0, log.read_text()
    probs = np.moveaxis(np.asarray(nib.load(tmp_path / "out" / "b0_probs.nii.gz").dataobj), -1, 0)
    expected = read_calibration(path).calibrator(mean_of(members, image).unsqueeze(0), from_probs=True)[0]
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert run_command("predict", [listed("run", members[:2]), f"output={tmp_path / 'other'}", *arguments], log) == 1
    (line,) = log.read_text().splitlines()
    assert re.match(r"error: .*isotonic\.safetensors: was fitted for the mean of .*seed0, .*seed1, .*seed2, and says nothing about the mean of", line)
    assert not (tmp_path / "other").exists()


def test_folder_of_runs_stands_for_all_of_them(members, tmp_path):
    folder = members[0].parent
    assert member_paths("run", str(folder)) == [str(run) for run in members]
    assert member_paths("run", [str(members[1]), str(members[0] / "checkpoints" / "last.ckpt")]) == [
        str(members[1]),
        str(members[0] / "checkpoints" / "last.ckpt"),
    ]
    assert member_paths("run", None) == []
    unfinished = make_relative(members[0], tmp_path / "runs" / "one", seed=0)
    (unfinished / "summary.json").unlink()
    with pytest.raises(CommandError, match=r"ensemble: .*runs/one in .*runs is not finished.*resume="):
        member_paths("ensemble", str(tmp_path / "runs"))


@pytest.fixture
def source(monkeypatch) -> list:
    """What would be fitted, in place of fitting it."""
    found: list = []
    monkeypatch.setattr(calibrate_module, "_fit", lambda config, source: found.append(source))
    return found


def test_members_of_other_splits_are_fitted_on_what_none_has_learnt(members, source, tmp_path, monkeypatch):
    one = make_relative(members[0], tmp_path / "one", seed=0, train="0", val="12", test="345")
    two = make_relative(members[0], tmp_path / "two", seed=1, train="1", val="03", test="245")
    calibrate_module.calibrate(composed("calibrate", listed("ensemble", [one, two])))
    assert source[0].fit.case_ids == ("b2", "b3")  # b1 and b0 were learnt by the other
    assert source[0].test.case_ids == ("b4", "b5")
    monkeypatch.chdir(tmp_path)
    assert source[0].folder().parent == Path("runs/calibration")


def test_ensemble_of_one_is_calibrated_as_the_run(members, source):
    calibrate_module.calibrate(composed("calibrate", listed("ensemble", members[:1])))
    calibrate_module.calibrate(composed("calibrate", f"run={members[0]}"))
    ours, theirs = source
    for name in ("title", "fit_split", "facts"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.folder() == theirs.folder() == members[0] / "calibration"
    assert (ours.fit.case_ids, ours.test.case_ids) == (theirs.fit.case_ids, theirs.test.case_ids)


FOLDS = ({"train": "01", "val": "23", "test": "45"}, {"train": "23", "val": "45", "test": "01"}, {"train": "45", "val": "01", "test": "23"})


@pytest.fixture
def folds(members, tmp_path) -> list[Path]:
    return [make_relative(members[0], tmp_path / f"fold{n}", seed=n, **splits) for n, splits in enumerate(FOLDS)]


def test_folds_are_told_what_to_do(folds, source):
    with pytest.raises(
        CommandError, match=r"ensemble: each val case of a member was trained on by another.*densecal-predict.*predictions=DIR labels=DIR"
    ):
        calibrate_module.calibrate(composed("calibrate", listed("ensemble", folds)))
    with pytest.raises(ValueError, match=r"split: no test case of blobs in .* is one of all 3 members of the ensemble"):
        evaluate_module._models(composed("evaluate", listed("ensemble", folds)))


def test_runs_of_other_data_are_no_ensemble(members, tmp_path):
    other = make_relative(members[0], tmp_path / "other", seed=4)
    path = other / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["densecal"]["config"]["data"]["root"] = "/elsewhere"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other: was trained on /elsewhere, but .*seed0 on .*root=DIR if they are copies"):
        evaluate_module._models(composed("evaluate", listed("ensemble", [members[0], other])))


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("calibrate", ["run={a}", "ensemble=[{a},{b}]"], r"ensemble: is one calibrator of several runs, and run= one of each"),
        ("calibrate", ["ensemble=[{a},{b}]", "predictions=x"], r"predictions: goes with saved predictions, not with ensemble="),
        ("calibrate", ["ensemble=[{a},{b}]", "split=train"], r"split: the network was trained on cases of split=train"),
        ("calibrate", ["ensemble=[{a},{a}]"], r"seed0/checkpoints/best\.ckpt: is named twice"),
        ("calibrate", ["ensemble=[]"], r"ensemble: expected a run or a list of runs"),
        ("evaluate", ["ensemble=[{a},{b}]", "run={{ensemble: {a}}}"], r"run: the name 'ensemble' is that of the ensemble"),
        ("evaluate", ["ensemble=[{a},{b}]", "calibration=temperature"], r"calibration: expected a file, .* an ensemble has no folder of its own"),
        ("evaluate", ["ensemble=[{a},/nowhere]"], r"No checkpoint /nowhere.*There is no such run directory"),
    ],
    ids=["run-too", "predictions-too", "train", "twice", "none", "name", "by-name", "nowhere"],
)
def test_mistakes_cost_one_line(command, arguments, message, members, source):
    config = composed(command, *(text.format(a=members[0], b=members[1]) for text in arguments))
    with pytest.raises((CommandError, ValueError, OSError), match=message):
        {"calibrate": calibrate_module.calibrate, "evaluate": evaluate_module._models}[command](config)
    assert not source
