"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["name_in_file", "remove_unfinished", "write_atomically", "write_file"]

_UNFINISHED = ".*.unfinished"


def name_in_file(name: str) -> str:
    """A name as part of a file's: everything but letters, digits, dots and hyphens becomes an underscore.

    Example:
        >>> name_in_file("tumour, whole")
        'tumour_whole'
    """
    return re.sub(r"[^\w.-]+", "_", name)


def write_file(path: Path, write: Callable[[BinaryIO], object], *, sync: bool = False) -> Path:
    """Have a file written beside its place and move it there at once, so that a reader never sees half of it, whenever the process dies.

    Args:
        path: Where it goes; missing folders are made.
        write: Is handed the open file.
        sync: Wait until it is on the disk before it is moved, so that it is whole after a loss of power, too.

    Returns:
        ``path``.

    Raises:
        OSError: If it cannot be written; the text names it and says why, and what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(_UNFINISHED.replace("*", f"{path.name}.{os.getpid()}"))
    try:
        with unfinished.open("wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except Exception as error:
        if (reason := _system_error(error)) is None:
            raise
        raise OSError(f"{path}: cannot be written ({reason.strerror or reason}).") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said. Whoever writes may say less: of a full disk torch says "unexpected pos"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left half written in a folder and below it. Nobody else may be writing there."""
    for path in folder.rglob(_UNFINISHED):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """:func:`write_file` with what it holds.

    Args:
        path: Where it goes; missing folders are made.
        content: Text (written as UTF-8) or bytes.

    Returns:
        ``path``.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_atomically(folder / "notes" / "a.txt", "done").read_text()
        'done'
    """
    return write_file(path, lambda file: file.write(content.encode() if isinstance(content, str) else content))
