"""The folder of a run: where it is made, what lies in it, how it is found again."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

import densecal
from densecal.files import write_atomically

__all__ = [
    "RECORD",
    "RunInUse",
    "file_hash",
    "find_checkpoint",
    "find_latest_run",
    "lock_run",
    "new_run_dir",
    "provenance",
    "read_checkpoint",
    "read_record",
    "read_splits",
    "write_record",
]

RECORD = "run.json"
_LOCK = "run.lock"
_PACKAGES = ("torch", "lightning", "monai", "torchmetrics", "hydra-core", "nibabel", "numpy", "scipy")


class RunInUse(RuntimeError):
    """Another process is at work in a run directory."""


def new_run_dir(output_dir: Path, experiment: str) -> Path:
    """Make ``<output_dir>/<experiment>/<time>``; runs that start in the same second get a number."""
    stem = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = output_dir / experiment / (stem if attempt == 1 else f"{stem}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{output_dir / experiment}: a thousand runs started in one second.")


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep other processes out of a run directory for as long as the context lasts.

    ``run.lock`` names the process and its machine. The lock itself is the file system's, which drops it when the process ends, however it ends: a file that a killed
    process has left is no obstacle. A file system without locks keeps nobody out.

    Raises:
        RunInUse: If another process is at work there; the text names it.
    """
    with _locked(run / _LOCK) as file:
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": datetime.now().astimezone().isoformat(timespec="seconds")}, file)
        file.flush()
        try:
            yield
        finally:
            (run / _LOCK).unlink(missing_ok=True)  # while it is locked: whoever waits for the file sees that it is gone


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise RunInUse(f"{path.parent}: {_holder(file)} is at work in this run. Wait until it ends, or stop it.") from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield file
                return


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        said = json.load(file)
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (ValueError, KeyError):  # it is just writing it
        return "another process"


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json``: how the run was started and with what."""
    write_atomically(run / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(run: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        FileNotFoundError: If ``run`` is no run directory.
    """
    path = run / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"No run in {run}: there is no {RECORD}. Give the folder that `tools/train.py` named, runs/<experiment>/<time>.")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def read_splits(run: Path) -> dict[str, list[str]]:
    """Read ``splits.json``: split -> the names of its cases.

    Raises:
        FileNotFoundError: If ``run`` has none.
    """
    path = run / "splits.json"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}, which says what the run was trained on. Give the directory of a run, runs/EXPERIMENT/TIME.")
    splits = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(splits, dict)
    return splits


def find_latest_run(output_dir: Path, fits: Callable[[Path], bool]) -> Path:
    """The run below ``output_dir`` that started last, of those that ``fits`` accepts.

    Raises:
        FileNotFoundError: If there is none.
    """
    runs = [
        (datetime.fromisoformat(read_record(path.parent)["started"]), path.parent.name, path.parent)
        for path in output_dir.glob(f"*/*/{RECORD}")
        if fits(path.parent)
    ]
    if not runs:
        raise FileNotFoundError(f"No run with these settings in {output_dir} to resume. Leave out resume= to start one.")
    return max(runs)[-1]


def find_checkpoint(run: Path, name: str = "last") -> Path:
    """The checkpoint ``name`` (``"best"`` or ``"last"``) of a run directory, or ``run`` itself where it is a checkpoint file.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return run
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.ckpt"))
        found = f"Found {', '.join(there)}." if there else "It holds no finished epoch."
        raise FileNotFoundError(f"No checkpoint {path}. {found if run.is_dir() else 'There is no such run directory.'}")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of densecal's, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: If the file is damaged, or no checkpoint of densecal's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]}). Use the other one of best and last.") from error
    if not isinstance(content, dict) or "densecal" not in content:
        raise ValueError(f"{path}: is not a checkpoint of densecal's; it holds no config to build the network from.")
    return content


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content: two checkpoints of one hash hold the same network."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance() -> dict[str, Any]:
    """Versions, commit and command, for whoever wants to repeat a run."""
    packages = {"densecal": densecal.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "versions": packages, "commit": _commit(), "platform": platform.platform()}


def _commit() -> str | None:
    """Commit of the checkout that densecal runs from, with ``-dirty`` after it if files differ; None for an installed package."""
    root = Path(densecal.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
