"""``densecal-predict``: files and folders in, three files a volume out, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from blob_run import make_blob_run
from commands import run_command
from conftest import ROOT
from volumes import blob, save

from densecal.inference import Predictor, WholeImage

KINDS = ("label", "probs", "confidence")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of a run of one epoch."""
    return make_blob_run(tmp_path_factory.mktemp("blobs"))


@pytest.fixture
def scans(tmp_path) -> Path:
    """A folder of three volumes of different shapes, and of things that are none."""
    folder = tmp_path / "scans"
    for n, name in enumerate(("a.nii.gz", "b.c.nii.gz", "d.nii")):
        save(folder / name, blob((9 + n, 8, 10), seed=n)[0])
    (folder / "notes.txt").write_text("scanned on a Monday")
    (folder / ".a.nii.gz.1.unfinished").write_bytes(b"half")
    (folder / "more").mkdir()
    return folder


class Command:
    """``densecal-predict`` with a run and an output folder; keeps what it printed."""

    def __init__(self, run: Path, tmp_path: Path) -> None:
        self.run, self.output, self.log = run, tmp_path / "out", tmp_path / "log.txt"

    def __call__(self, *arguments: str, run: Path | None = None) -> int:
        return run_command("predict", [f"run={run or self.run}", f"output={self.output}", "device=cpu", *arguments], self.log)

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def written(self) -> set[str]:
        """Without what describes the probabilities."""
        return {path.name for path in self.output.iterdir()} - {"dataset.json"}


@pytest.fixture
def predict(run, tmp_path) -> Command:
    return Command(run, tmp_path)


def files(*stems: str) -> set[str]:
    return {f"{stem}_{kind}.nii.gz" for stem in stems for kind in KINDS}


def test_predict_one_file(predict, run, scans):
    assert predict(f"input={scans / 'a.nii.gz'}") == 0
    assert predict.written == files("a")
    probs = np.asarray(nib.load(predict.output / "a_probs.nii.gz").dataobj)
    np.testing.assert_allclose(probs, Predictor.from_run(run)(scans / "a.nii.gz").probs.movedim(0, -1).numpy(), atol=1e-5)
    assert {Path(word).name for line in predict.lines for word in line.split()} == files("a")  # it names what it wrote
    assert json.loads((predict.output / "dataset.json").read_text())["labels"] == {"background": 0, "left": 1, "right": 2}


def test_predict_as_the_run_did(predict, run):
    """This one in one piece, flipped and scaled, and so the labels that it wrote for its test cases."""
    window = Predictor.from_run(run).window
    assert isinstance(window, WholeImage)
    assert (window.spatial_dims, window.multiple, window.flip_axes, window.scales) == (3, (2, 2, 2), (0,), (0.75, 1.0))
    case = json.loads((run / "splits.json").read_text())["test"][0]
    assert predict(f"input={run.parents[2] / 'images' / f'{case}.nii.gz'}", "outputs=[label]") == 0
    written, again = (np.asarray(nib.load(folder / f"{case}_label.nii.gz").dataobj) for folder in (run / "predictions", predict.output))
    np.testing.assert_array_equal(again, written)


def test_predict_a_folder(predict, scans):
    assert predict(f"input={scans}") == 0
    assert predict.written == files("a", "b.c", "d")
    assert len(predict.lines) == 3
    for stem, side in (("a", 9), ("b.c", 10), ("d", 11)):
        assert nib.load(predict.output / f"{stem}_label.nii.gz").shape == (side, 8, 10)


def test_predict_chosen_outputs_from_the_chosen_checkpoint(predict, run, scans):
    assert predict(f"input={scans / 'a.nii.gz'}", "outputs=[probs]", "checkpoint=last") == 0
    assert predict.written == {"a_probs.nii.gz"}
    probs = np.asarray(nib.load(predict.output / "a_probs.nii.gz").dataobj)
    np.testing.assert_allclose(probs, Predictor.from_run(run, "last")(scans / "a.nii.gz").probs.movedim(0, -1).numpy(), atol=1e-5)


def test_predict_from_a_checkpoint_file(predict, run, scans):
    assert predict(f"input={scans / 'd.nii'}", run=run / "checkpoints" / "last.ckpt") == 0
    assert predict.written == files("d")


def test_predict_again_replaces_its_files_and_no_others(predict, scans):
    source = f"input={scans / 'a.nii.gz'}"
    assert predict(source) == 0
    fresh = np.asarray(nib.load(predict.output / "a_label.nii.gz").dataobj)
    (predict.output / "a_label.nii.gz").write_bytes(b"stale")
    (predict.output / "keep.nii.gz").write_bytes(b"mine")
    assert predict(source) == 0
    np.testing.assert_array_equal(np.asarray(nib.load(predict.output / "a_label.nii.gz").dataobj), fresh)
    assert predict.written == files("a") | {"keep.nii.gz"}
    assert (predict.output / "keep.nii.gz").read_bytes() == b"mine"


def test_predict_into_the_input_folder_leaves_the_images(predict, scans):
    before = (scans / "a.nii.gz").read_bytes()
    predict.output = scans
    assert predict(f"input={scans / 'a.nii.gz'}") == 0
    assert files("a") < predict.written
    assert (scans / "a.nii.gz").read_bytes() == before


def test_predict_goes_on_after_a_bad_file(predict, scans):
    content = (scans / "a.nii.gz").read_bytes()
    (scans / "a.nii.gz").write_bytes(content[: len(content) // 2])
    assert predict(f"input={scans}") == 1
    assert predict.written == files("b.c", "d")
    errors = [line for line in predict.lines if line.startswith("error: ")]
    assert len(errors) == 2
    assert re.search(r"scans/a\.nii\.gz: cannot be read", errors[0])
    assert re.fullmatch(r"error: 1 of 3 volume\(s\) could not be predicted; the others are in .*/out\.", errors[1])
    assert len(predict.lines) == 4  # two volumes and two errors


def test_no_volume_predicted_leaves_nothing(predict, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"no image")
    assert predict(f"input={tmp_path / 'scan.nii.gz'}") == 1
    first, last = predict.lines
    assert re.match(r"error: .*scan\.nii\.gz: cannot be read", first)
    assert last == "error: 1 of 1 volume(s) could not be predicted."
    assert not predict.output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs=[probabilities]"], r"outputs: expected any of .*'probs'.*'probabilities'"),
        (["outputs=[overlay]"], r"outputs: of a volume expected any of .*'confidence'\), but got 'overlay'"),
        (
            ["inference=whole_image", "inference.flip_axes=[3]"],
            r"inference: Expected `flip_axes` to be different ones of .*\(0, 1, 2\), but got \(3,\)",
        ),
        (["outputs=[]"], r"outputs: expected at least one of .*'probs'"),
        (["checkpoint=first"], r"checkpoint: expected one of \('best', 'last'\), but got 'first'"),
        (["device=gpu"], r"device: cannot use 'gpu'"),
        (["input=/nowhere"], r"input: no file or folder /nowhere"),
        (["run=/nowhere"], r"/nowhere.*no such run directory"),
        (["outpt=/x"], r"Unknown setting 'outpt'\. Did you mean 'output"),
        (["output"], r"Cannot read 'output'\. Settings are written key=value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_command_is_one_line(arguments, message, predict, scans):
    assert predict(f"input={scans}", *arguments) == 1
    (line,) = predict.lines
    assert re.match(f"error: .*{message}", line)
    assert not predict.output.exists()


@pytest.mark.parametrize("missing", [["run"], ["input"], ["input", "output"]], ids="-".join)
def test_missing_settings_are_named(missing, run, scans, tmp_path):
    given = {"run": run, "input": scans, "output": tmp_path / "out"}
    arguments = [f"{name}={value}" for name, value in given.items() if name not in missing]
    assert run_command("predict", arguments, tmp_path / "log.txt") == 1
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert re.match(rf"error: Missing: {', '.join(missing)}\. Give .* as {missing[0]}=", line)
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoint_is_one_line(predict, run, scans, tmp_path):
    content = (run / "checkpoints" / "best.ckpt").read_bytes()
    damaged = tmp_path / "run" / "checkpoints" / "best.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content[: len(content) // 2])
    assert predict(f"input={scans}", run=tmp_path / "run") == 1
    (line,) = predict.lines
    assert re.match(rf"error: {re.escape(str(damaged))}: cannot be read as a checkpoint", line)
    assert not predict.output.exists()


def test_foreign_checkpoint_is_one_line(predict, scans, tmp_path):
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert predict(f"input={scans}", run=foreign) == 1
    (line,) = predict.lines
    assert re.match(rf"error: {re.escape(str(foreign))}: is not a checkpoint of densecal's", line)


def test_run_without_the_chosen_checkpoint_says_which_there_are(predict, run, scans, tmp_path):
    copy = tmp_path / "run" / "checkpoints" / "last.ckpt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    assert predict(f"input={scans}", run=tmp_path / "run") == 1
    (line,) = predict.lines
    assert re.match(r"error: No checkpoint .*best\.ckpt\. Found last\.ckpt\.", line)


def test_folder_without_volumes_is_one_line(predict, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "scan.png").write_bytes(b"")
    assert predict(f"input={tmp_path / 'empty'}") == 1
    (line,) = predict.lines
    assert re.match(r"error: input: no \.nii\.gz or \.nii files in .*empty", line)


def test_two_volumes_of_one_name_are_refused(predict, scans):
    save(scans / "a.nii", blob((8, 8, 8), seed=0)[0])
    assert predict(f"input={scans}") == 1
    (line,) = predict.lines
    assert re.match(r"error: input: .*scans holds a\.nii and a\.nii\.gz, whose predictions would have one name", line)
    assert not predict.output.exists()


def test_output_that_cannot_be_written_is_one_line(predict, scans):
    predict.output.write_text("a file where the folder should be")
    assert predict(f"input={scans}") == 1
    (line,) = predict.lines
    assert re.match(rf"error: output: cannot write to {re.escape(str(predict.output))} \(File exists\)", line)
    assert predict.output.read_text() == "a file where the folder should be"


def test_paths_with_spaces_and_signs(predict, run, tmp_path):
    """Quoted as Hydra asks for; a name as a scanner gives it."""
    scan = save(tmp_path / "day 1 = (first), c.nii.gz", blob((8, 8, 8), seed=0)[0])
    assert predict(f"input='{scan}'") == 0, predict.lines
    assert predict.written == files("day 1 = (first), c")


def test_tool_runs_and_explains_itself():
    """``tools/predict.py`` in a process of its own; the settings are those of the config."""
    result = subprocess.run([sys.executable, ROOT / "tools" / "predict.py", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    for setting in ("run: ???", "input: ???", "checkpoint: best"):
        assert setting in result.stdout
