"""How a long command ends before its time: by Ctrl-C, by SIGTERM, by a worker that dies, by a disk that is full."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["exit_status", "sigterm_raises", "worker_death"]


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Have SIGTERM, by which a batch system takes a machine back, raise ``SystemExit`` of the customary status, so that all are told and files are put away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def exit_status(stop: BaseException) -> Any:
    """The customary status of a process that was stopped: 130 after Ctrl-C, 143 after SIGTERM. Lightning makes an exit of its own of either."""
    seen: BaseException | None = stop
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    if seen is not None:
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if isinstance(stop, SIGTERMException) else getattr(stop, "code", None)


def worker_death(error: BaseException) -> str | None:
    """What became of a worker that loads data, in torch's words, if that is what the error is about, or what it was raised from.

    Python raises it wherever the process is at that moment, and who is there may make an error of its own of it, as ``inspect`` does.

    Example:
        >>> worker_death(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
        'worker (pid 7) is killed by signal: Killed'
    """
    seen: BaseException | None = error
    while seen is not None:
        found = re.search(r"DataLoader (worker \(pid.*?)\.?\s*$", str(seen).strip().partition("\n")[0])
        if found and isinstance(seen, RuntimeError):
            return found[1]
        seen = seen.__cause__ or seen.__context__
    return None
