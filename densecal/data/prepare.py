"""Data sets made from what installed packages ship: nothing to download."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["prepare"]


def prepare(name: str, root: Path) -> None:
    """Make the built-in data set ``name`` at ``root``, whole or not at all.

    It is written beside its place and renamed; where another process was first, its result stays.

    Raises:
        OSError: If the folder cannot be written, with the ways to choose another.
    """
    from densecal.data import mni152

    makers: dict[str, Callable[[Path], None]] = {"mni152": mni152.prepare}
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    except OSError as error:
        raise OSError(f"Cannot write the data set {name} to {root} ({error}). Choose a folder with data.root=DIR, or set XDG_CACHE_HOME.") from error
    try:
        makers[name](partial)
        partial.chmod(0o755)  # mkdtemp's is for the user alone
        os.rename(partial, root)
    except OSError:
        if not root.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
