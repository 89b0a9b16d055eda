"""``densecal-compare``: several runs side by side, trained one after another where they are a study's."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from densecal.cli.configuration import CommandError, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.cli.study import Study, study_names
from densecal.cli.study_runs import begun_runs, call, is_done, launch_runs, train_runs
from densecal.files import write_atomically
from densecal.registry import near_matches
from densecal.report.study import StudyRun, default_measures, difference_table, find_runs, mean_table, name_methods, read_run
from densecal.report.tables import markdown
from densecal.runs import find_checkpoint

__all__ = ["Study", "compare", "main"]

_HELP = """\
Put runs side by side: those of a study, which are trained first, or those that are there. Of a study, what is done already is not done again, and what was
stopped goes on.

  densecal-compare study=distill_hippocampus data.root=DIR                      a study of configs/study, or a file of your own: study=my_study.yaml
  densecal-compare study=hippocampus_small data.root=DIR jobs=2                 two runs at once
  densecal-compare study=hippocampus_small data.root=DIR add=my_loss            and a method more: a loss of configs/loss, or of --config-dir DIR
  densecal-compare study=distill_hippocampus data.epochs=10 output=runs/quick   settings of densecal-train, for every run
  densecal-compare study=distill_hippocampus runs.teacher=runs/EXPERIMENT/TIME  a run that is there already
  densecal-compare runs=runs/camvid_small                                       finished runs, in folders; methods are told apart by what differs but the seed
  densecal-compare scores=docs/studies/hippocampus_small/scores                 what a study has kept of its runs: the same page, without runs, network or data

Studies: {studies}.

Settings:
  study=NAME       what to run, a name or a YAML file with
                     settings: [KEY=VALUE, ...]          of densecal-train, for every run
                     runs: {{NAME: [KEY=VALUE, ...]}}      what each has of its own; ${{runs.NAME}} stands for the folder of an earlier one; the others are compared
                                                         with the first
                     seeds: [0, 1, 2]                    each run once for every seed
                     folds: [0, 1, 2]                    each run once for every fold, data.fold; with pair: true the first seed has the first fold, and so on
                     posthoc: [temperature]              calibrators to repair every run with, fitted on its validation cases; shown with and without
                     calibrate: [KEY=VALUE, ...]         of densecal-calibrate, such as fit_region=foreground
                     held_out: [data.KEY=VALUE, ...]     what of the data set makes cases that no run has seen those to be tested
                     evaluate: [KEY=VALUE, ...]          of densecal-evaluate, where there is one run of each
  runs=DIR,DIR     folders that hold finished runs, instead of a study
  scores=DIR,DIR   folders with scores of a study's runs, instead of a study
  seeds=0,1,2      instead of the study's; folds=0,1,2 likewise
  methods=A,B      these alone
  add=A,B          these too: losses of densecal or, with --config-dir DIR, of DIR/loss
  jobs=N           how many runs to train at once, the cores shared out; by default 1. What each says goes to train.log beside it then
  hydra/launcher=NAME hydra.launcher.KEY=VALUE
                   train by one of Hydra's launchers, such as submitit_slurm (pip install hydra-submitit-launcher), on machines that see the same folders
  commands=true    print the command of each run that can be trained now, one a line, and train nothing: for a scheduler of your own
  partial=true     train nothing, and show the runs that are done
  held_out=true    test on the cases that the study holds out, when every choice has been made
  output=DIR       where the runs and the comparison go; by default runs/studies/NAME for a study, else it is printed only
  runs.NAME=DIR    a run directory or checkpoint file instead of training NAME (NAME_seed0 where there are seeds)
  baseline=NAME    what the others are compared with; by default the first
  measures=A,B     which numbers, by their keys in summary.json: dice,ece,ece_foreground,nll; by default overlap, accuracy and calibration
  anything else    is a setting of densecal-train, for every run that is trained

One run of each is tested side by side, with intervals over cases. Several, of seeds or folds, give means, standard deviations, differences with intervals over
cases and over runs, charts and a page, report.html; scores/ keeps all that they are made of.
"""

_AT_ONCE = 4
"""Runs that are calibrated by one process; those of a process that is stopped are calibrated anew."""

_OURS = {
    "output_dir": "output=DIR says where the runs go",
    "experiment_name": "the study names its runs",
    "resume": "what was stopped goes on by itself",
}


_STUDY = ("seeds", "folds", "methods", "add", "jobs", "commands", "partial", "held_out")
"""Settings that go with ``study=`` alone."""
_KNOWN = ("study", "runs", "scores", "output", "baseline", "measures", *_STUDY)


def main() -> None:
    """Compare; see ``densecal-compare --help``."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_HELP.format(studies=", ".join(study_names())), end="")
        return
    try:
        compare(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. The same command goes on from there.") from None


def compare(arguments: Sequence[str]) -> Path | None:
    """Put runs side by side, those of a study after training what is left of it.

    Nothing is started before every setting of every run has been checked.

    Returns:
        The folder of the comparison; None where it is printed only.

    Raises:
        CommandError: What the user can mend.
    """
    given, launcher, more = _parsed(arguments)
    for source, word in (("runs", "trains"), ("scores", "trains and tests")):
        if source in given:
            allowed = (source, "output", "baseline", "measures")
            if unsuitable := [*(f"{key}=" for key in given if key not in allowed), *launcher, *more]:
                raise CommandError(f"{unsuitable[0]} cannot act together with {source}=, which {word} nothing. Leave it out, or give a study=.")
    output = None if "output" not in given else Path(given["output"])
    baseline, measures = given.get("baseline"), _words(given.get("measures", ""))
    if "runs" in given:
        folders, unfinished = find_runs(map(Path, _words(given["runs"])))
        if not folders:
            raise CommandError(f"runs: none of the {len(unfinished)} runs is finished. Go on with one by tools/train.py resume={unfinished[0]}.")
        return _tabulate([read_run(folder) for folder in folders], unfinished, baseline, measures, output)
    if "scores" in given:
        return _show([Path(place) for place in _words(given["scores"])], "Methods side by side", baseline, measures, output)
    if "study" not in given:
        raise CommandError(f"Missing: study=NAME, runs=FOLDER or scores=FOLDER. {near_matches('', study_names())}")
    return _study(given, launcher, more, baseline, measures)


def _study(given: Mapping[str, str], launcher: Sequence[str], more: Sequence[str], baseline: str | None, measures: Sequence[str]) -> Path | None:
    """Train what is left of a study, and compare its runs."""
    study = Study.load(given["study"])
    replicates = {key: _numbers(key, given[key]) for key in ("seeds", "folds") if key in given}
    study = replace(study, **replicates)  # type: ignore[arg-type]
    if "methods" in given or "add" in given:
        study = study.of_methods([*(_words(given["methods"]) if "methods" in given else study.runs), *_words(given.get("add", ""))])
    flags = {key: _flag(key, given.get(key, "false")) for key in ("commands", "partial", "held_out")}
    jobs = _numbers("jobs", given.get("jobs", "1"))
    if len(jobs) > 1 or jobs[0] < 1:
        raise CommandError(f"jobs: expected how many runs to train at once, 1 or more, but got {given['jobs']!r}.")
    if launcher and "jobs" in given:
        raise CommandError(f"jobs cannot act together with {launcher[0]}, which says itself how many run at once. Leave it out.")
    study = study.of_each_replicate()
    if not study.members:
        if baseline or measures:
            raise CommandError(
                "baseline= and measures= are for several runs of each; one run of each is compared with the first, on all measures. Give seeds=0,1,2."
            )
        if flags["held_out"] or flags["partial"]:
            raise CommandError("held_out= and partial= are for several runs of each. Give seeds=0,1,2.")
    if flags["held_out"] and not study.held_out:
        raise CommandError(f"held_out: the study {study.name} does not say which cases are held out, as in `held_out: [data.fold=4]`.")
    folder = Path(given.get("output", f"runs/studies/{study.name}"))
    there = {key.removeprefix("runs."): str(Path(value).resolve()) for key, value in given.items() if key.startswith("runs.")}
    if unknown := [name for name in there if name not in study.runs]:
        raise CommandError(f"runs.{unknown[0]}: {near_matches(unknown[0], study.runs)}")
    for path in there.values():
        _checkpoint(path)
    _check(study, more)

    begun = begun_runs(study, folder, there, more)
    if flags["commands"]:
        _print_commands(study, more, folder, there, begun)
        return None
    if flags["partial"]:
        trained = there | {name: str(run.resolve()) for name, run in begun.items() if is_done(run)}
        print(f"{len(trained)} of {len(study.runs)} runs are done.", flush=True)
    elif launcher:
        trained = launch_runs(study, folder, there, begun, launcher)
    else:
        trained = train_runs(study, folder, there, begun, more, jobs=jobs[0])
    if study.members:
        return _score(study, trained, folder, baseline, measures, held_out=flags["held_out"])
    page = folder / "comparison"
    models = ",".join(f"{name}:'{trained[name]}'" for name in study.runs)
    call("evaluate", "the comparison", [f"run={{{models}}}", f"output={page}", *study.evaluate])
    return page


def _print_commands(study: Study, more: Sequence[str], folder: Path, there: Mapping[str, str], begun: Mapping[str, Path]) -> None:
    """The command of each run that can be trained now; those that need one of these come when it is done."""
    places = {**there, **{name: str(run) for name, run in begun.items() if is_done(run)}}
    left = [name for name in study.runs if name not in places]
    ready = [name for name in left if study.needs(name) <= places.keys()]
    for name in ready:
        own = [f"resume={begun[name]}"] if name in begun else [*study.lines(name, more, places), f"output_dir={folder}", f"experiment_name={name}"]
        print(f"densecal-train {shlex.join(own)}")
    if len(ready) < len(left):
        print(f"{len(left) - len(ready)} more need some of these. Ask again when they are done.", file=sys.stderr)


def _score(study: Study, trained: Mapping[str, str], folder: Path, baseline: str | None, measures: Sequence[str], *, held_out: bool) -> Path | None:
    """Score what is not scored yet, and show all."""
    from densecal.cli.study_scores import missing_scores, score_run  # torch is not needed for a mistyped setting

    runs = {name: Path(trained[name]) for name in study.runs if name in trained}
    if study.posthoc:
        _calibrate(study, runs, folder)
    page = folder / ("held_out" if held_out else "comparison")
    scores = page / "scores"
    changes = [line.removeprefix("data.") for line in study.held_out] if held_out else []
    own = {name: [line for line in lines if line.partition("=")[0] not in study.members[name].replicate] for name, lines in study.runs.items()}
    for name in missing_scores(runs, study, scores, changes):
        member = study.members[name]
        for one in score_run(runs[name], member.method, member.replicate, own[name], posthoc=study.posthoc, changes=changes):
            one.write(scores)
    return _show(
        [scores],
        f"{study.name}{', on cases held out' if held_out else ''}",
        baseline,
        measures,
        page,
        list(dict.fromkeys(m.method for m in study.members.values())),
    )


def _calibrate(study: Study, runs: Mapping[str, Path], folder: Path) -> None:
    """Fit the study's calibrators for the runs that have none, or others: ``calibrated.json`` says for which checkpoint they were fitted, and how."""
    from densecal.inference.calibration import FOLDER
    from densecal.inference.out_of_fold import tested_checkpoint
    from densecal.runs import file_hash

    settings = [f"posthoc=[{','.join(study.posthoc)}]", "replicates=0", *study.calibrate]
    wanted = {name: [file_hash(find_checkpoint(run, tested_checkpoint(run))), *settings] for name, run in runs.items()}
    path = folder / "calibrated.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    left = [
        name
        for name, run in runs.items()
        if noted.get(name) != wanted[name] or not all((run / FOLDER / f"{one}.safetensors").is_file() for one in study.posthoc)
    ]
    if left:
        print(f"Fitting {', '.join(study.posthoc)} on validation cases, {len(left)} runs", flush=True)
    for i in range(0, len(left), _AT_ONCE):
        some = left[i : i + _AT_ONCE]
        listed = ",".join(f"'{runs[name]}'" for name in some)
        call("calibrate", "calibration", [f"run=[{listed}]", *settings])
        noted |= {name: wanted[name] for name in some}
        write_atomically(path, json.dumps(noted, indent=2) + "\n")


def _show(
    places: Sequence[Path], title: str, baseline: str | None, measures: Sequence[str], folder: Path | None, order: Sequence[str] = ()
) -> Path | None:
    """The page of scores, and its tables on the screen."""
    from densecal.report.study_page import study_tables, write_study
    from densecal.report.study_scores import read_scores

    runs = [one for place in places for one in read_scores(place)]
    order = list(order) or list(dict.fromkeys(run.method for run in sorted(runs, key=lambda run: str(run.facts.get("started")))))
    runs = sorted((run for run in runs if run.method in order), key=lambda run: (order.index(run.method), run.posthoc))
    if folder is None:
        print(study_tables(runs, baseline=baseline, measures=measures), end="", flush=True)
        return None
    page, tables = write_study(folder, title, runs, baseline=baseline, measures=measures)
    print(f"{tables}report  {page.resolve()}", flush=True)
    return folder


def _tabulate(
    runs: Sequence[StudyRun], unfinished: Sequence[Path], baseline: str | None, measures: Sequence[str], folder: Path | None
) -> Path | None:
    """Print a table of means and one of differences for each data set; write them, and the numbers of each run, into ``folder``."""
    tables, rows = [], []
    for data in dict.fromkeys(run.data for run in runs):
        found = sorted((run for run in runs if run.data == data), key=lambda run: run.started)
        methods: dict[str, list[StudyRun]] = {}
        for name, run in zip(name_methods(found), found, strict=True):
            methods.setdefault(name, []).append(run)
            rows.append({"method": name, "data": data, "run": str(run.folder), "seed": run.settings.get("seed"), "scores": dict(run.scores)})
        keys = list(measures) or default_measures(found)
        tables.append(mean_table(methods, keys, f"{data}. Mean and standard deviation over runs"))
        if len(methods) > 1:
            caption = "Differences, paired by seed and fold, with the 95 % interval of their mean by Student's t"
            tables.append(difference_table(methods, baseline or next(iter(methods)), keys, caption))
    page = "\n".join(markdown(table) for table in tables)
    if unfinished:
        page += f"\nNot finished, and left out: {', '.join(map(str, unfinished))}.\n"
    print(page, end="", flush=True)
    if folder is not None:
        write_atomically(folder / "comparison.md", page)
        write_atomically(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    return folder


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.strip().removeprefix("[").removesuffix("]").split(",") if word.strip()]


def _numbers(key: str, value: str) -> list[int]:
    words = _words(value)
    if not words or len(set(words)) < len(words) or not all(word.isdecimal() for word in words):
        raise CommandError(f"{key}: expected different whole numbers such as 0,1,2, but got {value!r}.")
    return [int(word) for word in words]


def _flag(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise CommandError(f"{key}: expected true or false, but got {value!r}.")
    return value == "true"


def _parsed(arguments: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """What is for the study itself, for Hydra's launcher, and the settings of its runs."""
    given: dict[str, str] = {}
    launcher: list[str] = []
    more: list[str] = []
    options: list[str] = []
    words = list(arguments)
    while words:
        argument = words.pop(0)
        key, equals, value = argument.partition("=")
        if key == "--config-dir" and (equals or words):
            options = [f"{key}={Path(value if equals else words.pop(0)).absolute()}"]
            continue
        if argument.startswith("-") or not equals:
            raise CommandError(f"Cannot read {argument!r}. Settings are written key=value, for example study=distill_hippocampus; --help lists them.")
        if key in _OURS:
            raise CommandError(f"{key} cannot be set: {_OURS[key]}.")
        if key in _KNOWN or key.startswith("runs."):
            given[key] = value
        elif key == "hydra/launcher" or key.startswith("hydra.launcher."):
            launcher.append(argument)
        else:
            more.append(argument)
    return given, launcher, [*more, *options]


def _checkpoint(path: str) -> None:
    """That a run which is not to be trained has a checkpoint at all."""
    try:
        find_checkpoint(Path(path), "last")
    except FileNotFoundError:
        find_checkpoint(Path(path), "best")


def _check(study: Study, more: Sequence[str]) -> None:
    """Every setting of every run, and of the evaluation; runs that differ in seed and fold alone are one."""
    register_settings()
    places = dict.fromkeys(study.runs, "runs/of/another")
    checked = set()
    for name in study.runs:
        method = study.members[name].method if study.members else name
        if method in checked:
            continue
        checked.add(method)
        try:
            prepare_arguments(study.lines(name, more, places), "train")
        except CommandError as error:
            raise CommandError(f"{name}: {error}") from None
    prepare_arguments(study.evaluate, "evaluate")
    prepare_arguments([f"posthoc=[{','.join(study.posthoc)}]", *study.calibrate], "calibrate")


if __name__ == "__main__":
    main()
