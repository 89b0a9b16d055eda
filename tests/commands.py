"""Run densecal's commands in processes of their own, and have them die where a test wants."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

# A clean server imports everything once; each process is a fork of it.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "densecal.cli.training",
        "densecal.cli.predict",
        "densecal.cli.train",
        "densecal.cli.evaluate",
        "densecal.cli.soft_labels",
        "densecal.cli.calibrate",
    ]
)

MOMENTS = ("training", "validation", "best", "last")


def run_command(name: str, arguments: list[str], log: Path, die_in: str | None = None, epoch: int = 2) -> int:
    """Run a command of densecal's and return its exit status, negative for the signal it died of.

    Args:
        name: Module of the command, ``"train"``, ``"predict"``, ``"evaluate"``, ``"calibrate"``, ``"find_label_errors"`` or ``"soft_labels"``.
        arguments: Its command line.
        log: File for what it prints.
        die_in: Where to be killed in ``epoch`` (counted from 0): in a ``"training"`` step, in ``"validation"``, or half-way through writing the checkpoint
            ``"best"`` or ``"last"``.
        epoch: The epoch to die in.
    """
    process = _PROCESSES.Process(target=_run, args=(name, arguments, log, die_in, epoch))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise TimeoutError(log.read_text())
    assert process.exitcode is not None
    return process.exitcode


def _run(name: str, arguments: list[str], log: Path, die_in: str | None, epoch: int) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    # As in a process that was started from a shell; this one has inherited the fork server that it comes from.
    multiprocessing.set_start_method("fork", force=True)
    if die_in is not None:
        _plant(die_in, epoch)
    sys.argv = [f"densecal-{name}", *arguments]
    importlib.import_module(f"densecal.cli.{name}").main()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _plant(die_in: str, epoch: int) -> None:
    import torch

    from densecal.tasks import SegmentationTask

    if die_in in ("training", "validation"):
        step = f"{die_in}_step"
        original = getattr(SegmentationTask, step)

        def dying_step(self, batch, batch_idx):
            if self.current_epoch == epoch and batch_idx == 1:
                _die()
            return original(self, batch, batch_idx)

        setattr(SegmentationTask, step, dying_step)
        return

    save = torch.save

    def dying_save(content, file):
        if content["epoch"] == epoch and die_in in Path(file.name).name:
            import io

            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            _die()
        save(content, file)

    torch.save = dying_save
