"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["name_in_file", "write_atomically"]


def name_in_file(name: str) -> str:
    """A name as part of a file's: everything but letters, digits, dots and hyphens becomes an underscore.

    Example:
        >>> name_in_file("tumour, whole")
        'tumour_whole'
    """
    return re.sub(r"[^\w.-]+", "_", name)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file beside its place and move it there at once, so that a reader never sees half of it.

    Args:
        path: Where it goes; missing folders are made.
        content: Text (written as UTF-8) or bytes.

    Returns:
        ``path``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_atomically(folder / "notes" / "a.txt", "done").read_text()
        'done'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
