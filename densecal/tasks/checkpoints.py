"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from densecal.files import write_file

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it to the disk, then rename it.

    Lightning's own writes to the system's temporary folder and moves the file from there, which is a copy where that folder lies on another disk: a process
    killed in the copy leaves half a checkpoint under the good one's name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        write_file(Path(path), lambda file: torch.save(checkpoint, file), sync=True)
