"""One run of a study as a Hydra job, so that any of Hydra's launchers can take it to where there is room; ``densecal-compare`` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from densecal.cli.configuration import CommandError
from densecal.cli.study import filled
from densecal.cli.study_runs import NOTES, is_done, run_folders, train_run

__all__: list[str] = []

_QUIET = [{"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}]
_HYDRA = {"sweep": {"dir": "${folder}/jobs", "subdir": "."}, "output_subdir": None, "job": {"chdir": False}}


def job(config: DictConfig) -> None:
    """Train ``run`` of the study in ``folder``, where its settings are noted."""
    folder = Path(config.folder)
    noted = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    begun = run_folders(folder, config.run)
    if begun and is_done(begun[-1]):
        return
    places = {name: str(runs[-1].resolve()) for name in noted if (runs := run_folders(folder, name)) and is_done(runs[-1])}
    try:
        train_run(config.run, [filled(line, places) for line in noted[config.run]], folder, begun[-1] if begun else None, log=True)
    except CommandError as error:  # the other jobs go on; whoever launched them sees which run has not come to its end
        print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    ConfigStore.instance().store(name="study_job", node={"defaults": ["_self_", *_QUIET], "folder": "???", "run": "???", "hydra": _HYDRA})
    hydra.main(version_base="1.3", config_path=None, config_name="study_job")(job)()
