"""Data sets that densecal puts on the disk itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock  # a dependency of torch

__all__ = ["build_once", "prepare"]


def prepare(name: str, root: Path) -> None:
    """Make the built-in data set ``name`` at ``root`` from what an installed package ships.

    Raises:
        OSError: If the folder cannot be written, with the ways to choose another.
    """
    from densecal.data import mni152

    makers: dict[str, Callable[[Path], None]] = {"mni152": mni152.prepare}

    def build(folder: Path) -> Path:
        makers[name](folder)
        return folder

    build_once(root, build)


def build_once(root: Path, build: Callable[[Path], Path]) -> None:
    """Have one process build the folder ``root``, whole or not at all, while the others wait for it.

    Args:
        root: Folder to build; nothing happens where it exists.
        build: Fills the empty folder it is given, beside ``root``, and returns the folder to rename to ``root``: that one, or one below it.

    Raises:
        OSError: If the parent of ``root`` cannot be written.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock"):
            if root.is_dir():
                return
            partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
            try:
                built = build(partial)
                built.chmod(0o755)  # mkdtemp's folder is for its owner alone
                built.rename(root)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except PermissionError as error:
        raise PermissionError(f"Cannot write {root} ({error}). Choose a folder with data.root=DIR.") from error
