"""``densecal-calibrate``, and the other commands with what it leaves: a run and a folder of predictions, repaired."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from blob_run import make_blob_run
from commands import run_command
from conftest import ROOT
from omegaconf import OmegaConf
from volumes import blob, save

from densecal.cli.configuration import prepare_arguments
from densecal.cli.evaluate import _models
from densecal.cli.settings import CalibrateSettings, register_settings
from densecal.inference import Predictor
from densecal.inference.calibration import read_calibration
from densecal.metrics import ExpectedCalibrationError, dilate
from densecal.posthoc import TemperatureScaling


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Of one epoch, with a temperature and an isotonic map fitted."""
    run = make_blob_run(tmp_path_factory.mktemp("blobs"))
    log = run / "log.txt"
    assert run_command("calibrate", [f"run={run}", "posthoc=[temperature,isotonic]", "device=cpu", "replicates=50"], log) == 0, log.read_text()
    return run


@pytest.fixture(scope="module")
def root(run) -> Path:
    return run.parents[2]


QUICK = ("surface_tolerance=null", "boundary_width=null")

SURE = 3.0
"""How much too sure the saved predictions are."""


def write_nnunet(folder: Path, case_id: str, probs: np.ndarray) -> None:
    """What ``nnUNetv2_predict --save_probabilities`` leaves: axes reversed, the hard label and a pickle beside."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{case_id}.npz", probabilities=probs.transpose(0, 3, 2, 1))
    save(folder / f"{case_id}.nii.gz", probs.argmax(0).astype(np.uint8))
    (folder / f"{case_id}.pkl").write_bytes(b"\x80\x04never opened")


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(3, X, Y, Z)`` of a network that is too sure, and labels that follow the true ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 8, 9, 7, generator=generator)
    label = torch.multinomial(logits.softmax(0).flatten(1).T, 1, generator=generator).view(8, 9, 7)
    return (SURE * logits).softmax(0).numpy(), label.numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """``predictions`` and ``labels`` of eight cases as nnU-Net saves them, ``others`` of two more."""
    folder = tmp_path_factory.mktemp("saved")
    for n in range(10):
        probs, label = draw(n)
        write_nnunet(folder / ("predictions" if n < 8 else "others"), f"c{n}", probs)
        save(folder / ("labels" if n < 8 else "other_labels") / f"c{n}.nii.gz", label)
    for name in ("predictions", "others"):
        (folder / name / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "left": 1, "right": 2}}))
    return folder


class Command:
    """A command with its log."""

    def __init__(self, name: str, log: Path) -> None:
        self.name, self.log = name, log

    def __call__(self, *arguments: str) -> int:
        return run_command(self.name, ["device=cpu", *(["replicates=50"] if self.name != "predict" else []), *arguments], self.log)

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def calibrate(tmp_path) -> Command:
    return Command("calibrate", tmp_path / "calibrate.txt")


@pytest.fixture
def evaluate(tmp_path) -> Command:
    return Command("evaluate", tmp_path / "evaluate.txt")


@pytest.fixture
def predict(tmp_path) -> Command:
    return Command("predict", tmp_path / "predict.txt")


# A run.


def test_run_is_fitted_on_its_validation_cases_and_looked_at_on_its_test_cases(run):
    splits = json.loads((run / "splits.json").read_text())
    assert {path.name for path in (run / "calibration").iterdir()} == {
        "temperature.safetensors",
        "temperature.json",
        "isotonic.safetensors",
        "isotonic.json",
    }
    record = json.loads((run / "calibration" / "temperature.json").read_text())
    assert sorted(record["fitted_on"]) == sorted(splits["val"])
    assert sorted(record["evaluation"]["cases"]) == sorted(splits["test"])
    assert record["evaluation"]["num_folds"] is None
    assert record["classes"] == ["background", "left", "right"]
    before, after = (record["evaluation"][when]["scores"] for when in ("before", "after"))
    assert before["dice"] == after["dice"]
    summary = json.loads((run / "summary.json").read_text())
    for key, place in (("ece", "ece_top_label"), ("nll", "nll")):
        assert before[key] == pytest.approx(summary["pooled"]["all"][place], abs=1e-6)  # as the run's own report has it
        gap = record["evaluation"]["differences"][key]
        assert gap["difference"] == pytest.approx(after[key] - before[key])
        assert gap["low"] <= gap["high"]
    log = (run / "log.txt").read_text()
    assert all(word in log for word in ("before", "temperature", "isotonic", "on the test cases", f"ECE {after['ece']:.4f}"))


def test_temperature_of_a_run_is_that_of_its_validation_cases(run, root):
    predictor = Predictor.from_run(run)
    pairs = []
    for case_id in json.loads((run / "splits.json").read_text())["val"]:
        label = torch.from_numpy(blob((8, 9, 8), seed=int(case_id[1:]))[1].astype(np.int64))
        pairs.append((predictor(root / "images" / f"{case_id}.nii.gz").probs.unsqueeze(0), label.unsqueeze(0)))
    expected = TemperatureScaling(3).fit(pairs, from_probs=True)
    found = read_calibration(run / "calibration" / "temperature.safetensors").calibrator
    assert float(found.temperature) == pytest.approx(float(expected.temperature), rel=1e-4)


def test_predictor_applies_it(run, root):
    image = root / "images" / "b0.nii.gz"
    plain, calibrated = (Predictor.from_run(run, calibration=name)(image) for name in (None, "isotonic"))
    expected = read_calibration(run / "calibration" / "isotonic.safetensors").calibrator(plain.probs.unsqueeze(0), from_probs=True)[0]
    torch.testing.assert_close(calibrated.probs, expected)
    assert float((calibrated.probs - plain.probs).abs().max()) > 0.01
    torch.testing.assert_close(calibrated.confidence, expected.amax(0))


def test_predict_and_evaluate_apply_it(run, root, predict, evaluate, tmp_path):
    folder = tmp_path / "calibrated"
    assert predict(f"run={run}", f"input={root / 'images'}", f"output={folder}", "outputs=[probs]", "calibration=isotonic") == 0, predict.lines
    assert json.loads((folder / "calibration.json").read_text())["method"] == "isotonic"
    assert predict(f"run={run}", f"input={root / 'images'}", f"output={folder}", "outputs=[probs]") == 1
    assert re.search(r"holds predictions that isotonic has calibrated", predict.lines[-1])
    out = tmp_path / "out"
    assert evaluate(f"run={{ours: {run}}}", "calibration=isotonic", f"output={out}", *QUICK) == 0, evaluate.lines
    record = json.loads((run / "calibration" / "isotonic.json").read_text())["evaluation"]
    for name, when in (("ours", "before"), ("ours_isotonic", "after")):
        summary = json.loads((out / name / "summary.json").read_text())
        assert summary["pooled"]["all"]["ece_top_label"] == pytest.approx(record[when]["scores"]["ece"], abs=1e-6)
    assert summary["run"]["calibration"] == "isotonic, fitted on 2 cases"
    assert "isotonic, fitted on 2 cases" in (out / "ours_isotonic" / "report.html").read_text()
    assert "warning" not in evaluate.log.read_text()
    # The folder that was predicted: all six cases, those that it was fitted on among them.
    assert evaluate(f"predictions={folder}", f"labels={root / 'labels'}", f"output={tmp_path / 'again'}", *QUICK) == 0, evaluate.lines
    assert re.match(r"warning: 2 of these 6 cases .*isotonic was fitted on", evaluate.lines[0])
    assert any("isotonic was fitted on" in note for note in json.loads((tmp_path / "again" / "summary.json").read_text())["notes"])


def test_evaluating_a_run_on_the_cases_of_the_fit_warns(run, capsys):
    register_settings()
    arguments = prepare_arguments([f"run={run}", "calibration=temperature", "split=val", "device=cpu"], "evaluate")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        plain, calibrated = _models(hydra.compose("evaluate", arguments)).values()
    warning = r"2 of these 2 cases .*temperature was fitted on"
    assert re.match(f"warning: {warning}", capsys.readouterr().err)
    assert [any(re.match(warning, note) for note in model.notes) for model in (plain, calibrated)] == [False, True]


def test_another_checkpoint_or_way_of_predicting_is_refused(run, root, tmp_path):
    with pytest.raises(ValueError, match=r"fitted for images predicted by .*flip_axes"):
        Predictor.from_run(run, inference=OmegaConf.create({"_target_": "densecal.inference.WholeImage", "multiple": 2}), calibration="temperature")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"global_step": -1}, path)
    with pytest.raises(ValueError, match=r"fitted for another checkpoint.*densecal-calibrate"):
        Predictor.from_run(other, calibration="temperature")
    with pytest.raises(FileNotFoundError, match=r"no .*vector\.safetensors. There are: isotonic, temperature"):
        Predictor.from_run(run, calibration="vector")


def test_run_fitted_on_its_test_cases_is_cross_fitted(run, calibrate, tmp_path):
    assert calibrate(f"run=[{run}]", "split=test", f"output={tmp_path / 'out'}") == 0, calibrate.lines
    record = json.loads((tmp_path / "out" / "temperature.json").read_text())
    assert record["evaluation"]["num_folds"] == 2
    assert sorted(record["fitted_on"]) == sorted(record["evaluation"]["cases"])
    assert any("have not seen it" in line for line in calibrate.lines)


def test_unreadable_test_case_is_left_out_where_that_is_wanted(run, calibrate, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.parents[2], copy)
    place = copy / run.relative_to(run.parents[2])
    broken, kept = sorted(json.loads((place / "splits.json").read_text())["test"])
    image = copy / "images" / f"{broken}.nii.gz"
    image.write_bytes(image.read_bytes()[:100])
    assert calibrate(f"run={place}", f"root={copy}", f"output={tmp_path / 'out'}") == 1
    assert broken in calibrate.log.read_text()
    assert not (tmp_path / "out").exists()
    assert calibrate(f"run={place}", f"root={copy}", f"output={tmp_path / 'out'}", "strict=false") == 0, calibrate.lines
    assert json.loads((tmp_path / "out" / "temperature.json").read_text())["evaluation"]["cases"] == [kept]


# A folder.


def test_folder_of_predictions_is_cross_fitted(saved, calibrate, tmp_path):
    methods = ["temperature", "vector", "dirichlet", "histogram", "isotonic"]
    arguments = [f"predictions={saved / 'predictions'}", f"labels={saved / 'labels'}", f"output={tmp_path / 'out'}", f"posthoc=[{','.join(methods)}]"]
    assert calibrate(*arguments, "num_folds=4") == 0, calibrate.lines
    for name in methods:
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        scores = {when: record["evaluation"][when]["scores"] for when in ("before", "after")}
        assert scores["after"]["ece"] < 0.5 * scores["before"]["ece"], name
        assert scores["after"]["nll"] < scores["before"]["nll"], name
        assert record["evaluation"]["num_folds"] == 4
        assert record["num_pixels"] == 8 * 8 * 9 * 7
    assert json.loads((tmp_path / "out" / "temperature.json").read_text())["found"]["temperature"] == pytest.approx(SURE, rel=0.1)


def test_cross_fitting_holds_each_case_out(saved, calibrate, tmp_path):
    """The scores after are those of each case under a temperature of the other persons' cases."""
    folder = tmp_path / "out"
    pattern = r"subject_pattern='c0*([1-9]|0)'"
    assert calibrate(f"predictions={saved / 'predictions'}", f"labels={saved / 'labels'}", f"output={folder}", pattern) == 0, calibrate.lines
    record = json.loads((folder / "temperature.json").read_text())
    total, voxels = 0.0, 0
    drawn = {f"c{n}": draw(n) for n in range(8)}
    folds = fold_of(drawn)
    for case_id, (probs, label) in drawn.items():
        others = [
            (torch.from_numpy(p)[None], torch.from_numpy(y.astype(np.int64))[None]) for c, (p, y) in drawn.items() if folds[c] != folds[case_id]
        ]
        after = TemperatureScaling(3).fit(others, from_probs=True)(torch.from_numpy(probs)[None], from_probs=True)[0]
        right = after.gather(0, torch.from_numpy(label.astype(np.int64))[None])
        total, voxels = total - float(right.log().sum()), voxels + right.numel()
    assert record["evaluation"]["after"]["scores"]["nll"] == pytest.approx(total / voxels, rel=1e-5)


def fold_of(cases) -> dict[str, int]:
    """Five folds of persons who are one digit each."""
    from densecal.seeds import derive_seed

    persons = sorted((case_id[1:] for case_id in cases), key=lambda person: derive_seed(0, "fold", person))
    return {f"c{person}": place % 5 for place, person in enumerate(persons)}


def test_one_person_is_not_looked_at(saved, calibrate, tmp_path):
    folder = tmp_path / "out"
    arguments = [f"predictions={saved / 'predictions'}", f"labels={saved / 'labels'}", f"output={folder}", "subject_pattern='(c)'"]
    assert calibrate(*arguments) == 0, calibrate.lines
    assert json.loads((folder / "temperature.json").read_text())["evaluation"] is None
    assert any("No case was held out" in line for line in calibrate.lines)


def test_nnunet_folder_is_repaired_in_its_own_layout(saved, calibrate, evaluate, tmp_path):
    fitted = tmp_path / "fitted"
    assert calibrate(f"predictions={saved / 'predictions'}", f"labels={saved / 'labels'}", f"output={fitted}") == 0, calibrate.lines
    repaired = tmp_path / "repaired"
    apply = [f"calibration={fitted / 'temperature.safetensors'}", f"apply_to={saved / 'others'}", f"output={repaired}"]
    assert calibrate(*apply) == 0, calibrate.lines
    assert {path.name for path in repaired.iterdir()} == {
        "calibration.json",
        "dataset.json",
        *(f"c{n}.{end}" for n in (8, 9) for end in ("npz", "pkl")),
    }
    scaling = read_calibration(fitted / "temperature.safetensors").calibrator
    for n in (8, 9):
        with np.load(repaired / f"c{n}.npz") as archive:
            assert archive.files == ["probabilities"]
            values = archive["probabilities"]
        source = np.load(saved / "others" / f"c{n}.npz")["probabilities"]
        assert (values.dtype, values.shape) == (source.dtype, source.shape)
        np.testing.assert_allclose(values, scaling(torch.from_numpy(source)[None], from_probs=True)[0], atol=1e-6)
    assert evaluate(f"predictions={repaired}", f"labels={saved / 'other_labels'}", f"output={tmp_path / 'audit'}", *QUICK) == 0, evaluate.lines
    audit = json.loads((tmp_path / "audit" / "summary.json").read_text())
    error = ExpectedCalibrationError()
    for probs, label in map(draw, (8, 9)):
        error.update(torch.from_numpy(probs)[None], torch.from_numpy(label.astype(np.int64))[None])
    assert audit["pooled"]["all"]["ece_top_label"] < 0.4 * float(error.compute())
    assert audit["run"]["calibration"] == "temperature, fitted on 8 cases"
    # Stopped and gone on with: what is there stays.
    kept = (repaired / "c9.npz").read_bytes()
    (repaired / "c8.npz").unlink()
    assert calibrate(*apply) == 0, calibrate.lines
    assert "2 cases, 1 of them there already" in calibrate.lines[-1]
    assert (repaired / "c9.npz").read_bytes() == kept
    np.testing.assert_allclose(np.load(repaired / "c8.npz")["probabilities"].sum(0), 1, atol=1e-5)


def test_fit_and_repair_in_one_go_warns_of_its_own_cases(saved, calibrate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [f"predictions={saved / 'predictions'}", f"labels={saved / 'labels'}", f"apply_to={saved / 'predictions'}"]
    assert calibrate(*arguments, f"output={tmp_path / 'repaired'}", "posthoc=[isotonic]") == 0, calibrate.lines
    assert any(line.startswith("warning: 8 of these 8 cases") for line in calibrate.lines)
    assert any("hard label maps are not copied" in line for line in calibrate.lines)
    assert len(list((tmp_path / "repaired").glob("*.npz"))) == 8
    assert len(list(tmp_path.glob("runs/calibration/*/isotonic.safetensors"))) == 1
    assert calibrate(*arguments, f"output={tmp_path / 'repaired'}", "posthoc=[temperature]") == 1
    assert re.search(r"that isotonic has calibrated", calibrate.lines[-1])


def test_regions_are_repaired_near_the_structure(calibrate, tmp_path):
    """Two regions that overlap, one channel each, fitted where they and what lies near them are."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for n in range(4):
        label = torch.zeros(2, 20, 20, dtype=torch.long)
        label[0, 4:12, 4:12], label[1, 6:10, 6:10] = 1, 1
        logits = (2.0 * label - 1) + torch.randn(2, 20, 20, generator=generator)
        pairs.append(((4 * logits).sigmoid(), label))
        for folder, values in (("predictions", pairs[-1][0].numpy()), ("labels", label.numpy().astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / folder / f"c{n}.npy", values)
    arguments = [
        f"predictions={tmp_path / 'predictions'}",
        f"labels={tmp_path / 'labels'}",
        "activation=sigmoid",
        "fit_region=foreground",
        "foreground_radius=2",
    ]
    assert calibrate(*arguments, f"output={tmp_path / 'out'}", "posthoc=[temperature,vector,isotonic,histogram]") == 0, calibrate.lines
    mask = dilate(pairs[0][1].any(0, keepdim=True), 2)
    expected = TemperatureScaling(2, activation="sigmoid").fit([(p[None], y[None], mask) for p, y in pairs], from_probs=True)
    record = json.loads((tmp_path / "out" / "temperature.json").read_text())
    assert record["num_pixels"] == 4 * int(mask.sum())
    assert record["found"]["temperature"] == pytest.approx(float(expected.temperature), rel=1e-4)
    assert record["region"] == "foreground"
    assert (
        calibrate(f"calibration={tmp_path / 'out' / 'vector.safetensors'}", f"apply_to={tmp_path / 'predictions'}", f"output={tmp_path / 'new'}") == 0
    )
    vector = read_calibration(tmp_path / "out" / "vector.safetensors").calibrator
    np.testing.assert_allclose(np.load(tmp_path / "new" / "c2.npy"), vector(pairs[2][0][None], from_probs=True)[0], atol=1e-6)
    assert calibrate(*arguments, f"output={tmp_path / 'more'}", "posthoc=[dirichlet]") == 1
    assert re.match(r"error: posthoc\.dirichlet: .*cannot act on regions", calibrate.lines[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"Nothing to calibrate: give .*run=DIR, or .*predictions=DIR labels=DIR"),
        (["predictions={saved}/predictions"], r"labels: give the folder"),
        (["run={run}", "predictions={saved}/predictions"], r"predictions: goes with saved predictions"),
        (["run={run}", "split=train"], r"split: the network was trained on cases of split=train.*split=val"),
        (["run={run}/checkpoints/best.ckpt"], r"No .*splits\.json"),
        (["run={run}", "posthoc=[temprature]"], r"No posthoc 'temprature'.*Did you mean 'temperature'"),
        (["run={run}", "posthoc=[]"], r"Missing: posthoc. Give it as posthoc="),
        (["run={run}", "posthoc.temperature.max_pixels=0"], r"posthoc\.temperature: Expected `max_pixels`"),
        (["run={run}", "fit_region=near"], r"fit_region: expected one of"),
        (["run={run}", "num_folds=1"], r"num_folds: expected 2 or more"),
        (["calibration=x.safetensors"], r"calibration: give the folder to repair"),
        (["calibration={saved}/x.safetensors", "apply_to={saved}/others", "output={out}"], r"calibration: no file"),
        (["predictions={saved}/predictions", "labels={saved}/labels", "apply_to={saved}/others"], r"output: say where"),
        (["predictions={saved}/predictions", "labels={saved}/labels", "apply_to={saved}/others", "output={saved}/others"], r"would overwrite"),
        (
            ["predictions={saved}/predictions", "labels={saved}/labels", "apply_to={saved}/others", "output={out}", "posthoc=[temperature,vector]"],
            r"apply_to: takes one method",
        ),
        (
            ["predictions={saved}/predictions", "labels={saved}/labels", "background=null", "fit_region=foreground"],
            r"fit_region: there is no background",
        ),
        (["predictions={saved}/predictions", "labels={saved}/other_labels"], r"No case has both"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_cost_one_line_and_write_nothing(arguments, message, run, saved, calibrate, tmp_path):
    assert calibrate(*(text.format(run=run, saved=saved, out=tmp_path / "out") for text in arguments)) == 1
    assert re.match(f"error: .*{message}", calibrate.lines[-1]), calibrate.lines
    assert {path.name for path in tmp_path.iterdir()} == {"calibrate.txt"}


def test_damaged_prediction_is_named_and_nothing_is_written(saved, calibrate, tmp_path):
    folder = tmp_path / "predictions"
    shutil.copytree(saved / "predictions", folder)
    content = (folder / "c3.npz").read_bytes()
    (folder / "c3.npz").write_bytes(content[: len(content) // 2])
    arguments = [f"predictions={folder}", f"labels={saved / 'labels'}", f"output={tmp_path / 'out'}"]
    assert calibrate(*arguments) == 1
    assert re.search(r"case 'c3' cannot be read", calibrate.lines[-1])
    assert not (tmp_path / "out").exists()
    assert calibrate(*arguments, "strict=false") == 0, calibrate.lines
    assert len(json.loads((tmp_path / "out" / "temperature.json").read_text())["fitted_on"]) == 7


def test_settings_are_those_of_the_config():
    """A key in one of them alone would be one that the command does not read, or no user can find."""
    register_settings()
    prepare_arguments([], "calibrate")
    listed = set(OmegaConf.load(ROOT / "configs" / "calibrate.yaml")) - {"defaults", "hydra"}
    declared = {key for kind in CalibrateSettings.__mro__ for key in getattr(kind, "__annotations__", {})}
    assert listed | {"data", "inference", "posthoc"} == declared
