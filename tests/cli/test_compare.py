"""Studies: what is refused before anything runs, what is done and goes on, and the one that promises a student a quarter of its teacher's size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from blob_run import make_blob_run
from conftest import ROOT
from omegaconf import OmegaConf

from densecal.cli import compare as command
from densecal.cli import study_runs
from densecal.cli.compare import Study, compare
from densecal.cli.configuration import CommandError, build, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.cli.study_job import job
from densecal.cli.study_scores import score_run
from densecal.report.study_scores import read_scores

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
        jobs: How many runs are trained at once, and the log, of each call.
    """

    dies = ""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, Path | None]] = []

    def __call__(self, name: str, what: str, settings: list[str], *, jobs: int = 1, log: Path | None = None) -> None:
        self.append((name, *settings))
        self.jobs.append((jobs, log))
        if name == "study_job":
            folder, run = (line.split("=", 1)[1] for line in settings[-2:])
            for one in run.split(","):
                job(OmegaConf.create({"folder": folder.strip("'"), "run": one.strip("'")}))
        if name != "train":
            return
        given = dict(line.split("=", 1) for line in settings)
        run = Path(given["resume"]) if "resume" in given else Path(given["output_dir"], given["experiment_name"], "2026-01-31_12-00-00")
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "last.ckpt").touch()
        (run / "run.json").touch()
        if what == self.dies:
            raise CommandError(f"{what} stopped with exit status -9")
        (run / "report.html").touch()


@pytest.fixture
def calls(monkeypatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(command, "call", made)
    monkeypatch.setattr(study_runs, "call", made)
    return made


@pytest.fixture
def scored(monkeypatch) -> list[tuple]:
    """Takes the place of scoring: the runs of a study, where they lie, and how they are shown."""
    made: list[tuple] = []
    monkeypatch.setattr(command, "_score", lambda study, trained, folder, *how, held_out: made.append((study, trained, held_out)) or folder)
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


def test_each_seed_has_its_own_runs(study, calls, scored, tmp_path):
    assert compare([*study, "seeds=4,7", "measures=ece"]) == tmp_path / "out"
    trained = [dict(line.split("=", 1) for line in settings) for name, *settings in calls]
    assert [line["experiment_name"] for line in trained] == ["teacher_seed4", "student_seed4", "teacher_seed7", "student_seed7"]
    assert [line["seed"] for line in trained] == ["4", "4", "7", "7"]
    assert "/teacher_seed7/" in trained[3]["distillation.teachers"]
    ((found, places, held_out),) = scored
    assert {name: (one.method, one.replicate) for name, one in found.members.items()} == {
        f"{method}_seed{seed}": (method, {"seed": seed}) for seed in (4, 7) for method in ("teacher", "student")
    }
    assert places.keys() == found.runs.keys()
    assert held_out is False


@pytest.mark.parametrize(
    ("more", "suffixes"),
    [
        ({}, ["_seed0_fold2", "_seed0_fold3", "_seed1_fold2", "_seed1_fold3"]),
        ({"pair": True}, ["_seed0_fold2", "_seed1_fold3"]),
        ({"seeds": []}, ["_fold2", "_fold3"]),
    ],
    ids=["each", "pairs", "folds"],
)
def test_folds_are_trained_with_seeds(more, suffixes, tmp_path):
    file = write(tmp_path, **{"runs": {"ce": ["loss=ce"]}, "seeds": [0, 1], "folds": [2, 3], **more})
    study = Study.load(file).of_each_replicate()
    assert list(study.runs) == [f"ce{suffix}" for suffix in suffixes]
    assert study.lines(f"ce{suffixes[-1]}", [], {})[-1] == "data.fold=3"


def test_pairs_of_seeds_and_folds_are_chosen(calls, scored, tmp_path):
    file = write(tmp_path, runs={"ce": ["loss=ce"]}, seeds=[0, 1, 2], folds=[0, 1, 2], pair=True)
    compare([f"study={file}", f"output={tmp_path / 'out'}", "seeds=2", "folds=2"])
    assert [line[-1] for line in calls] == ["experiment_name=ce_seed2_fold2"]
    with pytest.raises(ValueError, match="`pair` needs as many seeds as folds, but got 1 and 3"):
        compare([f"study={file}", f"output={tmp_path / 'out'}", "seeds=2"])


def test_methods_are_chosen_and_added(study, calls, scored):
    compare([*study, "seeds=0", "methods=student", "add=svls"])
    assert [line[-1] for line in calls] == ["experiment_name=teacher_seed0", "experiment_name=student_seed0", "experiment_name=svls_seed0"]
    assert "loss=svls" in calls[2]


def test_a_loss_of_ones_own_is_one_file_and_one_word(study, calls, scored, tmp_path):
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "gentle.yaml").write_text("_target_: densecal.losses.FocalLoss\ngamma: 0.5\n")
    compare(["--config-dir", str(tmp_path / "mine"), *study, "seeds=0", "methods=", "add=gentle"])
    assert calls == [
        (
            "train",
            "seed=3",
            "loss=gentle",
            "seed=0",
            f"--config-dir={tmp_path / 'mine'}",
            f"output_dir={tmp_path / 'out'}",
            "experiment_name=gentle_seed0",
        )
    ]


def test_several_runs_at_once_wait_for_what_they_need(study, calls, scored, tmp_path):
    compare([*study, "seeds=0,1", "jobs=3"])
    names = [line[-1].removeprefix("experiment_name=") for line in calls]
    assert sorted(names[:2]) == ["teacher_seed0", "teacher_seed1"]
    assert sorted(names[2:]) == ["student_seed0", "student_seed1"]
    assert set(calls.jobs) == {(3, tmp_path / "out" / name / "train.log") for name in names}


def test_a_failure_lets_the_others_end(study, calls, scored):
    calls.dies = "teacher_seed0"
    with pytest.raises(CommandError, match="teacher_seed0 stopped with exit status -9"):
        compare([*study, "seeds=0,1", "jobs=2"])
    assert [line[-1] for line in calls].count("experiment_name=teacher_seed1") == 1
    assert scored == []


def test_commands_are_printed_for_a_scheduler(study, calls, scored, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare([*study, "seeds=0", "commands=true"]) is None
    assert calls == []
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"densecal-train seed=3 loss=ce seed=0 output_dir={out} experiment_name=teacher_seed0"]
    assert "1 more need some of these" in printed.err
    compare([*study, "seeds=0", "methods=teacher"])
    compare([*study, "seeds=0", "commands=true"])
    teacher = out / "teacher_seed0" / "2026-01-31_12-00-00"
    assert f"'distillation.teachers=[{teacher}]'" in capsys.readouterr().out.splitlines()[-1]


def test_runs_go_through_a_launcher_in_waves(study, calls, scored, tmp_path):
    out = tmp_path / "out"
    asked = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    calls.dies = "student_seed1"
    with pytest.raises(CommandError, match=r"student_seed1 did not come to its end; what it said is in .*student_seed1/train\.log"):
        compare([*study, "seeds=0,1", *asked])
    launched = [line for line in calls if line[0] == "study_job"]
    assert launched == [
        ("study_job", "-m", *asked, f"folder='{out}'", "run='teacher_seed0','teacher_seed1'"),
        ("study_job", "-m", *asked, f"folder='{out}'", "run='student_seed0','student_seed1'"),
    ]
    teacher = out / "teacher_seed1" / "2026-01-31_12-00-00"
    last = ("train", "seed=3", *DISTILLED[:2], f"distillation.teachers=[{teacher}]", "seed=1", f"output_dir={out}", "experiment_name=student_seed1")
    assert calls[-1] == last
    assert calls.jobs[-1] == (1, out / "student_seed1" / "train.log")
    calls.dies = ""
    calls.clear()
    compare([*study, "seeds=0,1", *asked])
    assert calls[1:] == [("train", f"resume={out / 'student_seed1' / '2026-01-31_12-00-00'}")]
    assert len(scored) == 1


def test_a_job_is_one_of_hydra(tmp_path, capfd):
    """By the launcher that Hydra has itself: a run that is done is left, one that fails leaves the others alone."""
    done = tmp_path / "done=1" / "2026-01-31_12-00-00"
    done.mkdir(parents=True)
    (done / "run.json").touch()
    (done / "report.html").touch()
    (tmp_path / "study.json").write_text(json.dumps({"done=1": [], "bad": ["los=ce"], "worse": ["seed=a"]}))
    study_runs.call("study_job", "the launcher", ["-m", "hydra/launcher=basic", f"folder='{tmp_path}'", "run='bad','done=1','worse'"])
    said = capfd.readouterr()
    assert "bad: densecal-train los=ce output_dir=" in said.out
    assert [line.split(" stopped")[0] for line in said.err.splitlines()] == ["error: bad", "error: worse"]
    assert "Unknown setting 'los'" in (tmp_path / "bad" / "train.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "jobs") == ["bad", "done=1", "study.json", "worse"]


def test_what_is_done_can_be_shown_before_the_rest(study, calls, scored, capsys):
    calls.dies = "student_seed1"
    with pytest.raises(CommandError):
        compare([*study, "seeds=0,1"])
    calls.clear()
    compare([*study, "seeds=0,1", "partial=true"])
    assert calls == []
    assert "3 of 4 runs are done." in capsys.readouterr().out
    assert scored[0][1].keys() == {"teacher_seed0", "student_seed0", "teacher_seed1"}


def test_what_is_done_is_not_done_again(study, calls):
    compare(study)
    calls.clear()
    compare(study)
    assert [line[0] for line in calls] == ["evaluate"]


def test_what_was_stopped_goes_on(study, calls, tmp_path):
    calls.dies = "student"
    with pytest.raises(CommandError, match="student stopped with exit status -9"):
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
    with pytest.raises(CommandError, match=r"the run teacher was made with data\.epochs=2\. Choose another output=DIR, or remove .*teacher"):
        compare(study)
    with pytest.raises(CommandError, match=r"the run teacher was made with data\.epochs=2"):
        compare([*study, "data.epochs=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study=distil_hippocampus"], "No study 'distil_hippocampus'. Did you mean 'distill_hippocampus'"),
        (["output=x"], "Missing: study=NAME, runs=FOLDER or scores=FOLDER."),
        (["{study}", "data.epoch=3"], "teacher: Unknown setting 'data.epoch'. Did you mean 'data.epochs'?"),
        (["{study}", "loss=slvs"], "teacher: "),
        (["{study}", "runs.techer=x"], "runs.techer: Did you mean 'teacher'?"),
        (["{study}", "runs.teacher=nowhere"], "No checkpoint "),
        (["{study}", "output_dir=x"], "output_dir cannot be set: output=DIR says where the runs go."),
        (["{study}", "--multirun"], "Cannot read '--multirun'."),
        (["{study}", "seeds=a"], "seeds: expected different whole numbers such as 0,1,2, but got 'a'."),
        (["{study}", "folds=1,1"], "folds: expected different whole numbers such as 0,1,2, but got '1,1'."),
        (["{study}", "jobs=0"], "jobs: expected how many runs to train at once, 1 or more, but got '0'."),
        (["{study}", "jobs=1,2"], "jobs: expected how many runs to train at once, 1 or more, but got '1,2'."),
        (["{study}", "jobs=2", "hydra/launcher=joblib"], "jobs cannot act together with hydra/launcher=joblib"),
        (["scores=nowhere", "hydra/launcher=joblib"], "hydra/launcher=joblib cannot act together with scores="),
        (["{study}", "partial=yes"], "partial: expected true or false, but got 'yes'."),
        (["{study}", "add=svl"], "svl: "),
        (["{study}", "held_out=true"], "held_out= and partial= are for several runs of each."),
        (["{study}", "seeds=0", "held_out=true"], "held_out: the study mine does not say which cases are held out"),
        (["scores=nowhere", "jobs=2"], "jobs= cannot act together with scores=, which trains and tests nothing."),
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
        ({"runs": {"a": []}, "seeds": [0], "folds": [0, 1], "pair": True}, "`pair` needs as many seeds as folds, but got 1 and 2"),
        ({"runs": {"a": []}, "pair": 1}, "expected 'pair' to be true or false"),
        ({"runs": {"a": []}, "held_out": ["loss=ce"]}, "expected `held_out` to be settings of the data set such as data.fold=4"),
        ({"runs": {"student": DISTILLED, "teacher": []}}, "student refers to the run 'teacher', which does not come before it"),
        (["runs"], "expected a mapping"),
    ],
    ids=["no-runs", "text", "key", "name", "seeds", "pair", "flag", "held-out", "order", "list"],
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
    command._check(Study.load(name).of_each_replicate(), [])


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


def test_scores_of_real_runs_with_and_without_repair_and_on_cases_held_out(tmp_path, monkeypatch, capsys):
    """Two runs that are there, one the other's copy: the page, then the same page from the scores alone."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    run = make_blob_run(blobs)
    copy = tmp_path / "copy" / "run"
    shutil.copytree(run, copy)
    seen = json.loads((run / "splits.json").read_text())
    file = write(
        tmp_path,
        settings=[f"data={blobs / 'blobs.yaml'}", f"data.root={blobs}"],
        runs={"ce": ["loss=ce"], "dice_ce": ["loss=dice_ce"]},
        seeds=[0],
        posthoc=["temperature"],
        held_out=["data.test_fraction=0.3"],
    )
    out = tmp_path / "out"
    arguments = [f"study={file}", f"output={out}", f"runs.ce_seed0={run}", f"runs.dice_ce_seed0={copy}"]
    page = compare(arguments)
    assert page == out / "comparison"
    printed = (page / "comparison.md").read_text()
    assert printed in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    nll = summary["pooled"]["all"]["nll"]
    scores = {one.name: one for one in read_scores(page / "scores")}
    assert scores.keys() == {"ce", "ce + temperature", "dice_ce", "dice_ce + temperature"}
    assert scores["ce"].scores["nll"] == pytest.approx(nll, rel=1e-4)
    assert scores["ce"].cases.case_ids == tuple(seen["test"])
    assert scores["ce + temperature"].scores["nll"] != pytest.approx(nll, rel=1e-4)
    assert scores["ce + temperature"].facts["found"]["temperature"] > 0
    assert "| dice\\_ce | +0.0000 (+0.0000 to +0.0000) |" in printed

    times = {path: path.stat().st_mtime_ns for path in (page / "scores").iterdir()}
    compare(arguments)
    assert times == {path: path.stat().st_mtime_ns for path in (page / "scores").iterdir()}, "scored twice"
    with Path(file).open("a") as lines:
        lines.write("calibrate: [fit_region=foreground]\n")
    compare(arguments)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {path.name for path in times}, "fitted otherwise, and scored anew"
    printed = (page / "comparison.md").read_text()
    held = compare([*arguments, "held_out=true"])
    assert held == out / "held_out"
    assert (held / "comparison.md").read_text() == printed, "the same cases, said otherwise"
    shutil.rmtree(blobs)
    again = compare([f"scores={page / 'scores'}", f"output={tmp_path / 'again'}"])
    assert (again / "comparison.md").read_text() == printed
    assert (again / "report.html").is_file()


def test_calibration_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """What one process has fitted is noted when it ends; the next time the others are left."""
    study = Study.load(write(tmp_path, runs={"ce": ["loss=ce"]}, seeds=list(range(10)), posthoc=["temperature"])).of_each_replicate()
    runs = {name: tmp_path / name for name in study.runs}
    for run in runs.values():
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "last.ckpt").write_text(run.name)
    monkeypatch.setattr("densecal.inference.out_of_fold.tested_checkpoint", lambda run: "last")
    fitted: list[str] = []

    def call(_command: str, _name: str, settings: list[str]) -> None:
        names = [name for name in runs if f"'{runs[name]}'" in settings[0]]
        if len(fitted) == 4:
            fitted.append("stopped")
            raise CommandError("stopped")
        for name in names:
            (runs[name] / "calibration").mkdir(exist_ok=True)
            (runs[name] / "calibration" / "temperature.safetensors").touch()
        fitted.extend(names)

    monkeypatch.setattr(command, "call", call)
    with pytest.raises(CommandError, match="stopped"):
        command._calibrate(study, runs, tmp_path)
    command._calibrate(study, runs, tmp_path)
    command._calibrate(study, runs, tmp_path)
    assert fitted == [*list(runs)[:4], "stopped", *list(runs)[4:]]


def test_held_out_cases_must_be_new_to_the_runs(tmp_path):
    run = make_blob_run(tmp_path)
    with pytest.raises(ValueError, match=r"held_out: .* was trained on or chose by \d+ of these cases"):
        score_run(run, "ce", {"seed": 0}, [], changes=["split_seed=5"])
