"""Studies: what is refused before anything runs, what is done and goes on, and the one that promises a student a quarter of its teacher's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from blob_run import make_blob_run
from conftest import ROOT

from densecal.cli import compare as command
from densecal.cli.compare import Study, compare
from densecal.cli.configuration import build, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.report.study import StudyRun

STUDIES = sorted(path.stem for path in (ROOT / "configs" / "study").glob("*.yaml"))
DISTILLED = ["loss=distillation", "distillation=online", "distillation.teachers=[${runs.teacher}]"]


def write(folder: Path, **content: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture
def study(tmp_path) -> list[str]:
    """A study of two runs of a teacher and a student, and where it goes."""
    runs = {"teacher": ["loss=ce"], "student": DISTILLED}
    file = write(tmp_path, runs=runs, settings=["seed=3"], evaluate=["checkpoint=last"])
    return [f"study={file}", f"output={tmp_path / 'out'}"]


class Calls(list):
    """Takes the place of the commands: remembers their lines, and leaves behind what a training run does.

    Attributes:
        dies: Name of the run that is killed after its first epoch.
    """

    dies = ""

    def __call__(self, name: str, what: str, settings: list[str]) -> None:
        self.append((name, *settings))
        if name != "train":
            return
        given = dict(line.split("=", 1) for line in settings)
        run = Path(given["resume"]) if "resume" in given else Path(given["output_dir"], given["experiment_name"], "2026-01-31_12-00-00")
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "last.ckpt").touch()
        (run / "run.json").touch()
        if what == self.dies:
            raise command.CommandError(f"{what} stopped with exit status -9")
        (run / "report.html").touch()


@pytest.fixture
def calls(monkeypatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(command, "_call", made)
    return made


def test_runs_are_trained_in_turn_and_compared(study, calls, tmp_path):
    page = compare([*study, "data.epochs=2"])
    out = tmp_path / "out"
    teacher, student = (out / name / "2026-01-31_12-00-00" for name in ("teacher", "student"))
    assert calls == [
        ("train", "seed=3", "loss=ce", "data.epochs=2", f"output_dir={out}", "experiment_name=teacher"),
        ("train", "seed=3", *DISTILLED[:2], f"distillation.teachers=[{teacher}]", "data.epochs=2", f"output_dir={out}", "experiment_name=student"),
        ("evaluate", f"run={{teacher:'{teacher}',student:'{student}'}}", f"output={out / 'comparison'}", "checkpoint=last"),
    ]
    assert page == out / "comparison"


def test_each_seed_has_its_own_runs(study, calls, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        command,
        "read_run",
        lambda folder: made.append(folder) or StudyRun(folder, "", {}, {"seed": int(folder.parent.name[-1])}, {"ece": 0.5}, "set"),
    )
    assert compare([*study, "seeds=4,7", "measures=ece"]) == tmp_path / "out" / "comparison"
    trained = [dict(line.split("=", 1) for line in settings) for name, *settings in calls]
    assert [line["experiment_name"] for line in trained] == ["teacher_seed4", "teacher_seed7", "student_seed4", "student_seed7"]
    assert [line["seed"] for line in trained] == ["4", "7", "4", "7"]
    assert "/teacher_seed7/" in trained[3]["distillation.teachers"]
    assert [folder.parent.name for folder in made] == [line["experiment_name"] for line in trained]
    page = capsys.readouterr().out
    assert "| teacher | 2 | " in page
    assert "| minus teacher | pairs |" in page
    assert "| student | 2 | +0.0000" in page


def test_what_is_done_is_not_done_again(study, calls):
    compare(study)
    calls.clear()
    compare(study)
    assert [line[0] for line in calls] == ["evaluate"]


def test_what_was_stopped_goes_on(study, calls, tmp_path):
    calls.dies = "student"
    with pytest.raises(command.CommandError, match="student stopped with exit status -9"):
        compare(study)
    calls.dies = ""
    calls.clear()
    compare(study)
    assert [line[0] for line in calls] == ["train", "evaluate"]
    assert calls[0] == ("train", f"resume={tmp_path / 'out' / 'student' / '2026-01-31_12-00-00'}")


def test_a_run_that_is_there_is_taken(study, calls, tmp_path):
    file = tmp_path / "teacher.ckpt"
    file.touch()
    compare([*study, f"runs.teacher={file}"])
    assert f"distillation.teachers=[{file}]" in calls[0]
    assert calls[1][1].startswith(f"run={{teacher:'{file}',student:")
    assert len(calls) == 2
    assert json.loads((tmp_path / "out" / "study.json").read_text()).keys() == {"student"}


def test_done_runs_are_not_taken_for_others(study, calls, tmp_path):
    compare([*study, "data.epochs=2"])
    with pytest.raises(command.CommandError, match=r"the run teacher was made with data\.epochs=2\. Choose another output=DIR, or remove .*teacher"):
        compare(study)
    with pytest.raises(command.CommandError, match=r"the run teacher was made with data\.epochs=2"):
        compare([*study, "data.epochs=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study=distil_hippocampus"], "No study 'distil_hippocampus'. Did you mean 'distill_hippocampus'"),
        (["output=x"], "Missing: study=NAME or runs=FOLDER."),
        (["{study}", "data.epoch=3"], "teacher: Unknown setting 'data.epoch'. Did you mean 'data.epochs'?"),
        (["{study}", "loss=slvs"], "teacher: "),
        (["{study}", "runs.techer=x"], "runs.techer: Did you mean 'teacher'?"),
        (["{study}", "runs.teacher=nowhere"], "No checkpoint "),
        (["{study}", "output_dir=x"], "output_dir cannot be set: output=DIR says where the runs go."),
        (["{study}", "--multirun"], "Cannot read '--multirun'."),
        (["{study}", "seeds=a"], "seeds: expected different whole numbers such as 0,1,2, but got 'a'."),
        (["{study}", "measures=ece"], "baseline= and measures= are for several runs of each"),
    ],
)
def test_what_does_not_fit_is_one_line_and_starts_nothing(arguments, message, study, calls, tmp_path):
    with pytest.raises((ValueError, OSError)) as refused:
        compare([argument.replace("{study}", study[0]) for argument in arguments] + study[1:] * ("output=x" not in arguments))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"settings": ["seed=1"]}, "expected `runs`"),
        ({"runs": {"a": "loss=ce"}}, "expected 'a' to be a list of texts such as loss=svls, but got 'loss=ce'"),
        ({"runs": {"a": []}, "setings": []}, "Did you mean 'settings'?"),
        ({"runs": {"a/b": []}}, "names of runs become folders"),
        ({"runs": {"a": []}, "seeds": [1, 1]}, "expected 'seeds' to be a list of different whole numbers"),
        ({"runs": {"student": DISTILLED, "teacher": []}}, "student refers to the run 'teacher', which does not come before it"),
        (["runs"], "expected a mapping"),
    ],
    ids=["no-runs", "text", "key", "name", "seeds", "order", "list"],
)
def test_a_study_that_is_none_is_refused(content, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError) as refused:
        Study.load(str(file))
    assert message in str(refused.value)


# The studies of the package.


@pytest.mark.parametrize("name", STUDIES)
def test_every_setting_of_a_study_is_one(name):
    assert f"#   tools/compare.py study={name} " in (ROOT / "configs" / "study" / f"{name}.yaml").read_text()
    command._check(Study.load(name), [])


def composed(study: Study, run: str) -> Any:
    register_settings()
    arguments = prepare_arguments(study.lines(run, [], dict.fromkeys(study.runs, "other")), "train")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return hydra.compose("train", arguments)


def test_student_is_a_quarter_of_its_teacher_and_all_else_is_alike():
    study = Study.load("distill_hippocampus")
    configs = {name: composed(study, name) for name in study.runs}
    size = {}
    for name, config in configs.items():
        model = build(config.model, "model", in_channels=1, num_classes=3, spatial_dims=3)
        size[name] = sum(p.numel() for p in model.parameters())
    assert size["student"] == size["distilled"]
    assert size["student"] / size["teacher"] == pytest.approx(0.25, abs=0.005)
    for key in ("data", "optimizer", "scheduler", "trainer", "inference", "seed", "evaluate"):
        assert configs["student"][key] == configs["teacher"][key] == configs["distilled"][key], key
    assert configs["student"].loss == configs["teacher"].loss
    losses = {name: build(config.loss, "loss", num_classes=3) for name, config in configs.items()}
    assert losses["student"].weights == losses["distilled"].weights == {"ce": 0.25, "dml": 0.75}
    assert (losses["distilled"].target.mix, losses["distilled"].target.temperature) == (0.5, 1.0)
    assert configs["distilled"].distillation.checkpoint == configs["distilled"].evaluate == "last"


@pytest.mark.slow
def test_study_of_real_runs(tmp_path, capfd):
    """A student with and without a teacher, to the page with paired differences."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    teacher = make_blob_run(blobs)
    small = [f"data={blobs / 'blobs.yaml'}", f"data.root={blobs}", "model.channels=[2,4]", "trainer.accelerator=cpu", "trainer.max_epochs=2"]
    file = write(tmp_path, settings=small, runs={"student": ["loss=dml"], "teacher": ["loss=dml"], "distilled": DISTILLED})
    page = compare([f"study={file}", f"output={tmp_path / 'out'}", f"runs.teacher={teacher}"])
    found = json.loads((page / "comparison.json").read_text())
    assert found["compared_with"] == "student"
    assert set(found["differences"]) == {"teacher", "distilled"}
    assert {"difference", "low", "high"} == set(found["differences"]["distilled"]["dice"])
    assert (page / "report.html").is_file()
    compare([f"study={file}", f"output={tmp_path / 'out'}", f"runs.teacher={teacher}"])
    assert capfd.readouterr().out.count("student: done") == 1
