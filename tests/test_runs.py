"""Run directories: made, found again, read."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

import densecal
from densecal import runs


def make_run(folder: Path, started: str) -> Path:
    folder.mkdir(parents=True)
    runs.write_record(folder, {"started": started})
    return folder


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    made = [runs.new_run_dir(tmp_path, "a") for _ in range(4)]
    assert len(set(made)) == 4
    assert all(folder.is_dir() and folder.parent == tmp_path / "a" for folder in made)
    datetime.strptime(made[0].name, "%Y-%m-%d_%H-%M-%S")


def test_latest_run_is_the_one_that_started_last(tmp_path):
    old = make_run(tmp_path / "z" / "1", "2026-10-25T02:50:00+02:00")
    new = make_run(tmp_path / "a" / "1", "2026-10-25T02:10:00+01:00")  # twenty minutes later: the clock was set back
    (tmp_path / "a" / "empty").mkdir()
    assert runs.find_latest_run(tmp_path, lambda _: True) == new
    assert runs.find_latest_run(tmp_path, lambda run: run != new) == old
    with pytest.raises(FileNotFoundError, match="No run with these settings"):
        runs.find_latest_run(tmp_path, lambda _: False)


def test_record_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No run in .*there is no run\.json"):
        runs.read_record(tmp_path)


def test_checkpoint_by_name_or_path(tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    path.parent.mkdir()
    path.touch()
    assert runs.find_checkpoint(tmp_path, "best") == path
    assert runs.find_checkpoint(path, "last") == path
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt\. Found best\.ckpt\."):
        runs.find_checkpoint(tmp_path, "last")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no finished epoch"):
        runs.find_checkpoint(tmp_path, "last")
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        runs.find_checkpoint(tmp_path / "nowhere")


HOLD = """
import sys, time
from pathlib import Path
from densecal.runs import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_goes_with_its_process(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(runs.RunInUse, match=rf"process {first.pid} on \S+, since \S+, is at work in this run"), runs.lock_run(tmp_path):
        pass
    first.kill()
    first.wait()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == first.pid
    with runs.lock_run(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


class Code:
    def __reduce__(self):
        return (print, ("run by a checkpoint",))


def test_checkpoints_are_data_not_programs(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save({"densecal": {}, "bad": Code()}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: cannot be read as a checkpoint"):
        runs.read_checkpoint(path)
    assert capsys.readouterr().out == ""


def test_unusable_checkpoints(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"densecal": {"version": "0"}, "weight": torch.ones(100)}, path)
    assert runs.read_checkpoint(path)["weight"].sum() == 100
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"last\.ckpt: cannot be read as a checkpoint"):
        runs.read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: is not a checkpoint of densecal's"):
        runs.read_checkpoint(path)


def test_provenance_names_versions_and_commit():
    facts = json.loads(json.dumps(runs.provenance()))
    assert facts["versions"]["densecal"] == densecal.__version__
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert head.startswith(facts["commit"].removesuffix("-dirty"))
