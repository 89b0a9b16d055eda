"""``densecal-evaluate``: a run and anybody's predictions give the same numbers for the same probabilities, and every fault is one line."""

from __future__ import annotations

import csv
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from blob_run import make_blob_run
from commands import run_command
from volumes import blob, save

from densecal.inference import Predictor


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_blob_run(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def root(run) -> Path:
    return run.parents[2]


def write_nnunet(folder: Path, case_id: str, probs: np.ndarray) -> None:
    """What ``nnUNetv2_predict --save_probabilities`` leaves: axes reversed, the hard label and a pickle beside."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{case_id}.npz", probabilities=probs.transpose(0, 3, 2, 1))
    save(folder / f"{case_id}.nii.gz", probs.argmax(0).astype(np.uint8))
    (folder / f"{case_id}.pkl").write_bytes(pickle.dumps({"spacing": [2.0, 1.0, 1.0]}))


@pytest.fixture(scope="module")
def nnunet(run, root, tmp_path_factory) -> Path:
    """The run's predictions of its test cases as nnU-Net would save them."""
    folder = tmp_path_factory.mktemp("nnunet")
    predictor = Predictor.from_run(run)
    names = json.loads((run / "splits.json").read_text())["test"]
    for name in names:
        write_nnunet(folder, name, predictor(root / "images" / f"{name}.nii.gz").probs.numpy())
    classes = {"background": 0, "left": 1, "right": 2}
    (folder / "dataset.json").write_text(json.dumps({"labels": classes, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}))
    return folder


@pytest.fixture(scope="module")
def labels(run, root, tmp_path_factory) -> Path:
    """Labels of the test cases alone."""
    folder = tmp_path_factory.mktemp("labels")
    for name in json.loads((run / "splits.json").read_text())["test"]:
        (folder / f"{name}.nii.gz").write_bytes((root / "labels" / f"{name}.nii.gz").read_bytes())
    return folder


class Command:
    """``densecal-evaluate`` into a folder of its own; keeps what it printed."""

    def __init__(self, tmp_path: Path) -> None:
        self.output, self.log = tmp_path / "out", tmp_path / "log.txt"

    def __call__(self, *arguments: str, printed: bool = False) -> int:
        return run_command("evaluate", [f"output={self.output}", "device=cpu", "replicates=50", *arguments], self.log, printed=printed)

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def summary(self, name: str = "") -> dict:
        return json.loads((self.output / name / "summary.json").read_text())


@pytest.fixture
def evaluate(tmp_path) -> Command:
    return Command(tmp_path)


def numbers_of(summary: dict) -> dict:
    return {key: summary[key] for key in ("mean", "pooled", "bins", "intervals", "curves", "num_defined", "cases")}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or a == pytest.approx(b, abs=1e-9)


def test_audit_of_nnunet_files_equals_the_checkpoint(evaluate, tmp_path, run, nnunet, labels):
    audit = Command(tmp_path / "audit")
    audit.log.parent.mkdir()
    assert evaluate(f"run={run}") == 0, evaluate.lines
    assert audit(f"predictions={nnunet}", f"labels={labels}") == 0, audit.lines
    ours, theirs = evaluate.summary(), audit.summary()
    assert [entry["name"] for entry in theirs["classes"]] == ["background", "left", "right"]
    assert_same(numbers_of(ours), numbers_of(theirs))
    assert ours["baseline"] == json.loads((run / "summary.json").read_text())["baseline"]  # the same cases
    assert theirs["baseline"] is None
    assert {path.name for path in audit.output.iterdir()} >= {"summary.json", "cases.csv", "table.md", "table.tex", "figures", "report.html"}


def test_run_is_evaluated_as_after_training(evaluate, run):
    assert evaluate(f"run={run}", "replicates=1000") == 0, evaluate.lines
    assert_same(numbers_of(json.loads((run / "summary.json").read_text())), numbers_of(evaluate.summary()))


def test_run_on_other_data(evaluate, tmp_path, run):
    for n in (7, 8):
        image, label = blob((8, 8, 10), seed=n)
        save(tmp_path / "other" / "images" / f"c{n}.nii.gz", image)
        save(tmp_path / "other" / "labels" / f"c{n}.nii.gz", label)
    assert evaluate(f"run={run}", f"root={tmp_path / 'other'}", "split=all") == 0, evaluate.lines
    assert [row["case_id"] for row in evaluate.summary()["cases"]] == ["c7", "c8"]


def test_several_models_side_by_side(evaluate, tmp_path, run, nnunet, labels):
    flat = tmp_path / "flat"
    for file in sorted(nnunet.glob("*.npz")):
        probs = np.load(file)["probabilities"].transpose(0, 3, 2, 1)
        write_nnunet(flat, file.stem, 0.5 * probs + 0.5 / 3)  # without a dataset.json: the classes are those of the others
    assert evaluate(f"run={{ours: {run}}}", f"predictions={{theirs: {nnunet}, flat: {flat}}}", f"labels={labels}", printed=True) == 0, evaluate.lines
    assert_same(numbers_of(evaluate.summary("ours")), numbers_of(evaluate.summary("theirs")))
    comparison = json.loads((evaluate.output / "comparison.json").read_text())
    same, changed = (comparison["differences"][name] for name in ("theirs", "flat"))
    assert same["ece"]["difference"] == pytest.approx(0.0, abs=1e-9)
    assert same["dice"] == pytest.approx({"difference": 0.0, "low": 0.0, "high": 0.0}, abs=1e-12)
    gap = evaluate.summary("flat")["pooled"]["all"]["ece_top_label"] - evaluate.summary("ours")["pooled"]["all"]["ece_top_label"]
    assert changed["ece"]["difference"] == pytest.approx(gap)
    assert changed["dice"]["difference"] == pytest.approx(0.0, abs=1e-12)
    assert (evaluate.output / "report.html").exists()
    assert len([line for line in evaluate.lines if "cases" in line]) == 3


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def truncate(folder: Path, name: str) -> None:
    content = (folder / f"{name}.npz").read_bytes()
    (folder / f"{name}.npz").write_bytes(content[: len(content) // 2])


def change(folder: Path, name: str, function) -> None:
    probs = np.load(folder / f"{name}.npz")["probabilities"].copy()
    np.savez_compressed(folder / f"{name}.npz", probabilities=function(probs))


def with_nan(probs):
    probs[0, 0, 0, 0] = np.nan
    return probs


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"cannot be read"),
        (lambda folder, name: change(folder, name, with_nan), r"NaN"),
        (lambda folder, name: change(folder, name, lambda p: 0.5 * p), r"sum"),
        (lambda folder, name: change(folder, name, lambda p: 20 * p - 10), r"from_logits"),
        (lambda folder, name: change(folder, name, lambda p: p[:, :-1]), r"shape"),
        (lambda folder, name: (folder / f"{name}.npz").unlink() or (folder / f"{name}.nii.gz").unlink(), r"has no prediction"),
        (lambda folder, name: (folder / f"{name}.npz").unlink(), r"probabilities"),
        (lambda folder, name: (folder / "extra.npz").write_bytes((folder / f"{name}.npz").read_bytes()), r"has no label"),
    ],
    ids=["truncated", "nan", "sum", "logits", "shape", "missing", "hard", "extra"],
)
def test_a_bad_case_is_named_and_nothing_is_written(spoil, message, evaluate, tmp_path, nnunet, labels):
    folder = copy_of(nnunet, tmp_path / "predictions")
    name = sorted(path.stem for path in folder.glob("*.npz"))[0]
    spoil(folder, name)
    blamed = "extra" if (folder / "extra.npz").exists() else name
    assert evaluate(f"predictions={folder}", f"labels={labels}") == 1
    first, second = evaluate.lines
    assert re.match(r"error: 1 problem, and nothing was written\. .*strict=false", first)
    assert re.search(rf"case '{blamed}'.*{message}", second)
    assert not evaluate.output.exists()


@pytest.mark.parametrize(
    "spoil", [lambda folder, name: change(folder, name, with_nan), lambda folder, name: truncate(folder, name)], ids=["nan", "truncated"]
)
def test_a_bad_case_is_left_out_where_that_is_wanted(spoil, evaluate, tmp_path, nnunet, labels):
    folder = copy_of(nnunet, tmp_path / "predictions")
    names = sorted(path.stem for path in folder.glob("*.npz"))
    spoil(folder, names[0])
    assert evaluate(f"predictions={folder}", f"labels={labels}", "strict=false") == 0, evaluate.lines
    summary = evaluate.summary()
    assert [row["case_id"] for row in summary["cases"]] == names[1:]
    assert any(f"Left out: {folder}" in note and names[0] in note for note in summary["notes"])


def test_a_label_outside_the_classes_is_named(evaluate, tmp_path, nnunet, labels):
    folder = copy_of(labels, tmp_path / "labels")
    path = sorted(folder.iterdir())[0]
    label = blob((8, 9, 8), seed=0)[1]
    label[0, 0, 0] = 7
    save(path, label)
    assert evaluate(f"predictions={nnunet}", f"labels={folder}") == 1
    assert re.search(rf"{path.name.removesuffix('.nii.gz')}.*7.*ignore_index", evaluate.lines[1])
    assert not evaluate.output.exists()


def test_cases_csv_names_the_cases(evaluate, nnunet, labels):
    assert evaluate(f"predictions={nnunet}", f"labels={labels}", "surface_tolerance=null") == 0, evaluate.lines
    with (evaluate.output / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case_id"] for row in rows] == sorted(path.name.removesuffix(".nii.gz") for path in labels.iterdir())
    assert "hd95" not in rows[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            r"Nothing to evaluate: give a trained run as run=DIR, or several as ensemble=\[DIR,DIR\], or saved probabilities as predictions=DIR labels=DIR",
        ),
        (["predictions=/nowhere"], r"labels: give the folder of reference labels"),
        (["predictions=/nowhere", "labels=/nowhere"], r"predictions: no folder /nowhere"),
        (["run=/nowhere"], r"/nowhere.*no such run directory"),
        (["run=/nowhere", "split=tset"], r"split: expected one of .*'tset'"),
        (["run=/nowhere", "num_bins=0"], r"num_bins: expected at least 1, but got 0"),
        (["run=/nowhere", "boundary_width=-1"], r"boundary_width: expected a number above 0, or null"),
        (["run=[/nowhere,/nowhere]"], r"run: expected each path once"),
        (["run={../up: /nowhere}"], r"run: names become folders"),
        (["predictions=/nowhere", "labels=/nowhere", "subject_pattern=abc"], r"subject_pattern: expected a group in brackets"),
        (["prediction=/nowhere"], r"Unknown setting 'prediction'\. Did you mean 'predictions'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_is_one_line(arguments, message, evaluate):
    assert evaluate(*arguments) == 1
    (line,) = evaluate.lines
    assert re.match(f"error: .*{message}", line), line
    assert not evaluate.output.exists()
