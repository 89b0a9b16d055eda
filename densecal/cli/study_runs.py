"""Train the runs of a study: what is done is left, what was stopped goes on, several at once where there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from densecal.cli.configuration import CommandError
from densecal.cli.study import Study
from densecal.files import write_atomically
from densecal.runs import RECORD

__all__ = ["begun_runs", "call", "is_done", "launch_runs", "run_folders", "train_run", "train_runs"]

NOTES = "study.json"
"""In the folder of a study: the settings of each of its runs."""

_LOG = "train.log"


def run_folders(folder: Path, name: str) -> list[Path]:
    """The run directories of a name, the newest last."""
    return sorted(record.parent for record in (folder / name).glob(f"*/{RECORD}"))


def is_done(run: Path) -> bool:
    """Whether a run has come to its end."""
    return (run / "report.html").is_file()


def begun_runs(study: Study, folder: Path, there: Mapping[str, str], more: Sequence[str]) -> dict[str, Path]:
    """The runs that were begun before, which must have been made with the same settings; note those of all in ``study.json``.

    Raises:
        CommandError: If one was made with other settings.
    """
    begun = {name: runs[-1] for name in study.runs if name not in there and (runs := run_folders(folder, name))}
    path = folder / NOTES
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    places = {name: there.get(name, f"${{runs.{name}}}") for name in study.runs}
    wanted = {name: study.lines(name, more, places) for name in study.runs if name not in there}
    for name in begun:
        was, now = noted.get(name, []), wanted[name]
        if different := [line for line in [*was, *now] if (line in was) != (line in now)]:
            raise CommandError(
                f"{begun[name]}: the run {name} was {'made' if different[0] in was else 'not made'} with {different[0]}. Choose another output=DIR, or remove {folder / name}."
            )
    write_atomically(path, json.dumps({**noted, **wanted}, indent=2) + "\n")
    return begun


def train_runs(
    study: Study, folder: Path, there: Mapping[str, str], begun: Mapping[str, Path], more: Sequence[str], *, jobs: int = 1
) -> dict[str, str]:
    """Train each run to its end, if it has not come to it before.

    Args:
        study: Its runs, in order; one that refers to another waits for it.
        folder: Where the runs go.
        there: Runs that are there already, by name.
        begun: Of the others, those that were begun before.
        more: Further settings, for every run.
        jobs: How many at once. With more than one, what a run prints goes to ``train.log`` beside it, and the cores are shared out.

    Returns:
        The folder of every run by its name.

    Raises:
        CommandError: If a run fails; those that are under way come to their end first.
    """
    trained = _with_done(there, begun)
    left = [name for name in study.runs if name not in trained]
    started, count = time.perf_counter(), len(left)
    waiting: dict[Future[Path], str] = {}
    failed: CommandError | None = None
    with ThreadPoolExecutor(jobs) as pool:
        while left or waiting:
            ready = [name for name in left if study.needs(name) <= trained.keys()] if failed is None else []
            for name in ready[: jobs - len(waiting)]:
                left.remove(name)
                waiting[pool.submit(train_run, name, study.lines(name, more, trained), folder, begun.get(name), jobs=jobs, log=jobs > 1)] = name
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                name = waiting.pop(future)
                try:
                    trained[name] = str(future.result().resolve())
                except CommandError as error:
                    failed = failed or error
                    continue
                finished = count - len(left) - len(waiting)
                if jobs > 1 or count > 1:
                    rest = (time.perf_counter() - started) / finished * (count - finished)
                    print(f"{name}: trained, {finished} of {count}" + (f", about {_minutes(rest)} left" if count > finished else ""), flush=True)
    if failed is not None:
        raise failed
    return trained


def launch_runs(study: Study, folder: Path, there: Mapping[str, str], begun: Mapping[str, Path], launcher: Sequence[str]) -> dict[str, str]:
    """:func:`train_runs` by one of Hydra's launchers, which says how many at once, and where; the folder must be the same on all machines.

    Args:
        study: Its runs; those that refer to others are launched when these are done.
        folder: Where the runs go, and where :func:`begun_runs` has noted their settings.
        there: Runs that are there already, by name.
        begun: Of the others, those that were begun before.
        launcher: ``hydra/launcher=...`` and ``hydra.launcher.KEY=...``.

    Returns:
        The folder of every run by its name.

    Raises:
        CommandError: If a run or the launcher fails.
    """
    trained = _with_done(there, begun)
    while left := [name for name in study.runs if name not in trained]:
        ready = [name for name in left if study.needs(name) <= trained.keys()]
        print(f"{len(ready)} runs by {launcher[0]}: {', '.join(ready)}", flush=True)
        names = ",".join(f"'{name}'" for name in ready)
        call("study_job", "the launcher", ["-m", *launcher, f"folder='{folder.resolve()}'", f"run={names}"])
        for name in ready:
            runs = run_folders(folder, name)
            if not runs or not is_done(runs[-1]):
                raise CommandError(f"{name} did not come to its end; what it said is in {folder / name / _LOG}. The same command goes on from there.")
            trained[name] = str(runs[-1].resolve())
    return trained


def _with_done(there: Mapping[str, str], begun: Mapping[str, Path]) -> dict[str, str]:
    done = {name: run for name, run in begun.items() if is_done(run)}
    for name, run in done.items():
        print(f"{name}: done, {run}", flush=True)
    return {**there, **{name: str(run.resolve()) for name, run in done.items()}}


def train_run(name: str, settings: Sequence[str], folder: Path, begun: Path | None, *, jobs: int = 1, log: bool = False) -> Path:
    """Train one run of a study, or go on with it.

    Args:
        name: Of the run.
        settings: Its settings.
        folder: Of the study.
        begun: Where it was begun before.
        jobs: How many run at once; the cores are shared out.
        log: Whether what it prints goes to ``train.log`` beside it.

    Returns:
        Where it is.

    Raises:
        CommandError: If it fails.
    """
    if begun is not None and (begun / "checkpoints" / "last.ckpt").is_file():
        settings = [f"resume={begun}"]
    else:
        settings = [*settings, f"output_dir={folder}", f"experiment_name={name}"]
    print(f"{name}: densecal-train {' '.join(settings)}", flush=True)
    call("train", name, settings, jobs=jobs, log=folder / name / _LOG if log else None)
    return run_folders(folder, name)[-1]


def call(command: str, name: str, settings: Sequence[str], *, jobs: int = 1, log: Path | None = None) -> None:
    """Run a command in a process of its own, as if typed: nothing of a run is left for the next one.

    Args:
        command: ``"train"`` for example.
        name: What it does, for the error.
        settings: Its arguments.
        jobs: How many run at once; the cores are shared out.
        log: Where its output goes; by default on the screen.

    Raises:
        CommandError: If it fails.
    """
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    line = [sys.executable, "-m", f"densecal.cli.{command}", *settings]
    if log is None:
        code = subprocess.call(line, env=environment)
        said = "what it said is above"
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.call(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
        said = f"what it said is in {log}"
    if code:
        raise CommandError(f"{name} stopped with exit status {code}; {said}. The same command goes on from there.")


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
