"""Run densecal's commands in processes of their own, and have them come to harm where a test wants."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from blank import print_blank

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


def run_command(
    name: str, arguments: list[str], log: Path, die_in: str | None = None, epoch: int = 2, by: str = "kill", *, printed: bool = False
) -> int:
    """Run a command of densecal's and return its exit status, negative for the signal it died of.

    Args:
        name: Module of the command, ``"train"``, ``"predict"``, ``"evaluate"``, ``"calibrate"``, ``"find_label_errors"`` or ``"soft_labels"``.
        arguments: Its command line.
        log: File for what it prints.
        die_in: Where it comes to harm in ``epoch`` (counted from 0): in a ``"training"`` step, in ``"validation"``, half-way through writing the checkpoint
            ``"best"`` or ``"last"``, when that is written and not yet in its place (``"renaming"``); or, after training, when ``"predictions"`` or a file such as
            ``"summary.json"`` are written and not yet in their place.
        epoch: The epoch to come to harm in.
        by: What happens: ``"kill"``, ``"interrupt"`` (Ctrl-C), ``"terminate"``, ``"full"`` (files cannot grow any more), ``"worker"`` (the workers are killed).
        printed: Whether figures are printed; else they are made, and their files are blank.
    """
    process = _PROCESSES.Process(target=_run, args=(name, arguments, log, die_in, epoch, by, printed))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise TimeoutError(log.read_text())
    assert process.exitcode is not None
    return process.exitcode


def run_ranks(script: str, folder: Path, world_size: int = 2) -> None:
    """Run a script as each rank of a process group by gloo, to its end.

    Args:
        script: Python code that finds ``rank`` and ``folder``, a ``str``, among its names, and the tests by theirs, such as ``metrics.test_ordered``.
        folder: Where it leaves what it has found.
        world_size: Number of ranks.
    """
    processes = [_PROCESSES.Process(target=_rank, args=(script, rank, world_size, folder)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert statuses == [0] * world_size, "\n".join((folder / f"log{rank}.txt").read_text() for rank in range(world_size))


def _rank(script: str, rank: int, world_size: int, folder: Path) -> None:
    _print_into(folder / f"log{rank}.txt")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    exec(compile(script, "rank.py", "exec"), {"__name__": "rank", "rank": rank, "folder": str(folder)})
    distributed.destroy_process_group()


def _print_into(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _run(name: str, arguments: list[str], log: Path, die_in: str | None, epoch: int, by: str, printed: bool) -> None:
    _print_into(log)
    import torch

    torch.set_num_threads(1)
    # As in a process that was started from a shell; this one has inherited the fork server that it comes from.
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
    if not printed:
        print_blank()
    if die_in is not None:
        _plant(die_in, epoch, _HARM[by])
    sys.argv = [f"densecal-{name}", *arguments]
    importlib.import_module(f"densecal.cli.{name}").main()


def _fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]


_HARM: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full": _fill_disk,
    "worker": _kill_workers,
}


def _plant(die_in: str, epoch: int, harm: Callable[[], None]) -> None:
    import torch

    from densecal.tasks import SegmentationTask

    if die_in in ("training", "validation"):
        step = f"{die_in}_step"
        original = getattr(SegmentationTask, step)

        def harmful_step(self, batch, batch_idx):
            if self.current_epoch == epoch and batch_idx == 1:
                harm()
            return original(self, batch, batch_idx)

        setattr(SegmentationTask, step, harmful_step)
        return

    saved = -1
    save, replace = torch.save, os.replace

    def harmful_save(content, file):
        nonlocal saved
        saved = content["epoch"]
        if saved == epoch and die_in in Path(file.name).name:
            import io

            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            harm()
            file.seek(0)
        save(content, file)

    def harmful_replace(source, target):
        target = Path(target)
        checkpoint = die_in == "renaming" and saved == epoch and target.name == "last.ckpt"
        if checkpoint or die_in in (target.name, target.parent.name):
            harm()
        replace(source, target)

    torch.save, os.replace = harmful_save, harmful_replace
