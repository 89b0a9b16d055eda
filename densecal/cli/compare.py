"""``densecal-compare``: several runs side by side, trained one after another where they are a study's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from densecal.cli.configuration import CommandError, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.cli.study import Study, study_names
from densecal.files import write_atomically
from densecal.registry import near_matches
from densecal.report.study import StudyRun, default_measures, difference_table, find_runs, mean_table, name_methods, read_run
from densecal.report.tables import markdown
from densecal.runs import RECORD, find_checkpoint

__all__ = ["Study", "compare", "main"]

_HELP = """\
Put runs side by side: those of a study, which are trained one after another first, or those that are there. Of a study, what is done already is not done
again, and what was stopped goes on.

  densecal-compare study=distill_hippocampus data.root=DIR                      a study of configs/study, or a file of your own: study=my_study.yaml
  densecal-compare study=distill_hippocampus data.epochs=10 output=runs/quick   settings of densecal-train, for every run
  densecal-compare study=distill_hippocampus runs.teacher=runs/EXPERIMENT/TIME  a run that is there already
  densecal-compare runs=runs/camvid_small                                       finished runs, in folders; methods are told apart by what differs but the seed

Studies: {studies}.

Settings:
  study=NAME       what to run, a name or a YAML file with
                     settings: [KEY=VALUE, ...]          of densecal-train, for every run
                     runs: {{NAME: [KEY=VALUE, ...]}}      what each has of its own; ${{runs.NAME}} stands for the folder of an earlier one; the others are compared
                                                         with the first
                     seeds: [0, 1, 2]                    each run once for every seed
                     evaluate: [KEY=VALUE, ...]          of densecal-evaluate
  runs=DIR,DIR     folders that hold finished runs, instead of a study
  seeds=0,1,2      instead of the study's
  output=DIR       where the runs and the comparison go; by default runs/studies/NAME for a study, else it is printed only
  runs.NAME=DIR    a run directory or checkpoint file instead of training NAME (NAME_seed0 where there are seeds)
  baseline=NAME    what the others are compared with; by default the first
  measures=A,B     which numbers, by their keys in summary.json: dice,ece,ece_foreground,nll; by default overlap, accuracy and calibration
  anything else    is a setting of densecal-train, for every run that is trained

One run of each is tested side by side, with intervals over cases. Several, of seeds or folds, give means, standard deviations and paired differences.
"""

_OURS = {
    "output_dir": "output=DIR says where the runs go",
    "experiment_name": "the study names its runs",
    "resume": "what was stopped goes on by itself",
}


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
    given, more = _parsed(arguments)
    baseline, measures = given.pop("baseline", None), _words(given.pop("measures", ""))
    if "runs" in given:
        output = given.pop("output", None)
        if unsuitable := [*(f"{key}=" for key in given if key != "runs"), *more]:
            raise CommandError(f"{unsuitable[0]} cannot act together with runs=, which trains nothing. Leave it out, or give a study=.")
        folders, unfinished = find_runs(map(Path, _words(given["runs"])))
        if not folders:
            raise CommandError(f"runs: none of the {len(unfinished)} runs is finished. Go on with one by tools/train.py resume={unfinished[0]}.")
        return _tabulate([read_run(folder) for folder in folders], unfinished, None, baseline, measures, None if output is None else Path(output))
    if "study" not in given:
        raise CommandError(f"Missing: study=NAME or runs=FOLDER. {near_matches('', study_names())}")
    study = Study.load(given.pop("study"))
    if "seeds" in given:
        study = replace(study, seeds=_seeds(given.pop("seeds")))
    if not study.seeds and (baseline or measures):
        raise CommandError(
            "baseline= and measures= are for several runs of each; one run of each is compared with the first, on all measures. Give seeds=0,1,2."
        )
    study = study.of_each_seed()
    folder = Path(given.pop("output", f"runs/studies/{study.name}"))
    there = {key.removeprefix("runs."): str(Path(value).resolve()) for key, value in given.items()}
    if unknown := [name for name in there if name not in study.runs]:
        raise CommandError(f"runs.{unknown[0]}: {near_matches(unknown[0], study.runs)}")
    for path in there.values():
        _checkpoint(path)
    _check(study, more)

    trained = dict(there)
    begun = _begun(study, folder, there, more)
    for name in study.runs:
        if name not in there:
            trained[name] = str(_train(name, study.lines(name, more, trained), folder, begun).resolve())
    page = folder / "comparison"
    if study.methods:
        _tabulate([read_run(Path(trained[name])) for name in study.runs], [], list(study.methods.values()), baseline, measures, page)
    else:
        models = ",".join(f"{name}:'{trained[name]}'" for name in study.runs)
        _call("evaluate", "the comparison", [f"run={{{models}}}", f"output={page}", *study.evaluate])
    return page


def _tabulate(
    runs: Sequence[StudyRun],
    unfinished: Sequence[Path],
    names: Sequence[str] | None,
    baseline: str | None,
    measures: Sequence[str],
    folder: Path | None,
) -> Path | None:
    """Print a table of means and one of differences for each data set; write them, and the numbers of each run, into ``folder``."""
    tables, rows = [], []
    for data in dict.fromkeys(run.data for run in runs):
        members = [(run, names[place] if names else "") for place, run in enumerate(runs) if run.data == data]
        members = members if names else sorted(members, key=lambda member: member[0].started)
        found = [run for run, _ in members]
        methods: dict[str, list[StudyRun]] = {}
        for name, run in zip([name for _, name in members] if names else name_methods(found), found, strict=True):
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


def _seeds(value: str) -> list[int]:
    words = _words(value)
    if not words or len(set(words)) < len(words) or not all(word.isdecimal() for word in words):
        raise CommandError(f"seeds: expected different whole numbers such as 0,1,2, but got {value!r}.")
    return [int(word) for word in words]


def _parsed(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What is for the study itself, and the settings of its runs."""
    given: dict[str, str] = {}
    more: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            raise CommandError(f"Cannot read {argument!r}. Settings are written key=value, for example study=distill_hippocampus; --help lists them.")
        if key in _OURS:
            raise CommandError(f"{key} cannot be set: {_OURS[key]}.")
        if key in ("study", "runs", "seeds", "output", "baseline", "measures") or key.startswith("runs."):
            given[key] = value
        else:
            more.append(argument)
    return given, more


def _checkpoint(path: str) -> None:
    """That a run which is not to be trained has a checkpoint at all."""
    try:
        find_checkpoint(Path(path), "last")
    except FileNotFoundError:
        find_checkpoint(Path(path), "best")


def _check(study: Study, more: Sequence[str]) -> None:
    """Every setting of every run, and of the evaluation."""
    register_settings()
    places = dict.fromkeys(study.runs, "runs/of/another")
    for name in study.runs:
        try:
            prepare_arguments(study.lines(name, more, places), "train")
        except CommandError as error:
            raise CommandError(f"{name}: {error}") from None
    prepare_arguments(study.evaluate, "evaluate")


def _begun(study: Study, folder: Path, there: Mapping[str, str], more: Sequence[str]) -> dict[str, Path]:
    """The runs that were begun before, which must have been made with the same settings; note those of all."""
    begun = {name: runs[-1] for name in study.runs if name not in there and (runs := _runs(folder, name))}
    path = folder / "study.json"
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    places = {name: there.get(name, f"${{runs.{name}}}") for name in study.runs}
    wanted = {name: study.lines(name, more, places) for name in study.runs if name not in there}
    for name in begun:
        was, now = noted.get(name, []), wanted[name]
        if different := [line for line in [*was, *now] if (line in was) != (line in now)]:
            raise CommandError(
                f"{begun[name]}: the run {name} was {'made' if different[0] in was else 'not made'} with {different[0]}. Choose another output=DIR, or remove {folder / name}."
            )
    write_atomically(path, json.dumps(wanted, indent=2) + "\n")
    return begun


def _runs(folder: Path, name: str) -> list[Path]:
    """The run directories of a name, the newest last."""
    return sorted(record.parent for record in (folder / name).glob(f"*/{RECORD}"))


def _train(name: str, settings: list[str], folder: Path, begun: Mapping[str, Path]) -> Path:
    """Train a run to its end, if it has not come to it before, and return its directory."""
    if name in begun and (begun[name] / "report.html").is_file():
        print(f"{name}: done, {begun[name]}", flush=True)
        return begun[name]
    if name in begun and (begun[name] / "checkpoints" / "last.ckpt").is_file():
        settings = [f"resume={begun[name]}"]
    else:
        settings = [*settings, f"output_dir={folder}", f"experiment_name={name}"]
    print(f"{name}: densecal-train {' '.join(settings)}", flush=True)
    _call("train", name, settings)
    return _runs(folder, name)[-1]


def _call(command: str, name: str, settings: Sequence[str]) -> None:
    """Each in a process of its own, as if typed: nothing of a run is left for the next one."""
    code = subprocess.call([sys.executable, "-m", f"densecal.cli.{command}", *settings])
    if code:
        raise CommandError(f"{name} stopped with exit status {code}; what it said is above. The same command goes on from there.")


if __name__ == "__main__":
    main()
