"""Which trained runs a setting names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from densecal.cli.configuration import CommandError

__all__ = ["member_paths"]


def member_paths(setting: str, value: Any) -> list[str]:
    """The members of an ensemble.

    Args:
        setting: What it is called.
        value: Run directory or checkpoint file, or a list of them; a folder of runs stands for all that it holds. ``None`` for no ensemble.

    Raises:
        CommandError: If there is no member, or a run in a folder is not finished.
    """
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if value is None:
        return []
    if isinstance(value, dict) or not value:
        raise CommandError(f"{setting}: expected a run or a list of runs, {setting}=[RUN,RUN], but got {value}.")
    return [member for path in (value if isinstance(value, list) else [value]) for member in _runs_at(setting, str(path))]


def _runs_at(setting: str, path: str) -> list[str]:
    from densecal.report.study import find_runs
    from densecal.runs import RECORD

    folder = Path(path)
    if (folder / "checkpoints").is_dir() or not next(folder.rglob(RECORD), None):
        return [path]  # a run, a checkpoint file, or none at all, which whoever loads it will tell
    finished, others = find_runs([folder])
    if others:
        raise CommandError(
            f"{setting}: {others[0]} in {folder} is not finished. Go on with it by densecal-train resume={others[0]}, or name the runs."
        )
    return [str(run) for run in finished]
