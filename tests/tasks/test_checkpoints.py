"""Checkpoints are whole or absent."""

import resource

import pytest
import torch

from densecal.files import write_atomically, write_file
from densecal.tasks import AtomicCheckpointIO


def test_checkpoint_is_read_back(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, tmp_path / "new" / "last.ckpt")
    assert torch.load(tmp_path / "new" / "last.ckpt", weights_only=True) == {"epoch": 3}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    checkpoints, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    checkpoints.save_checkpoint({"epoch": 3}, path)
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save_checkpoint({"epoch": 4, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 3}


@pytest.mark.parametrize(
    "write", [lambda file: file.write(bytes(9000)), lambda file: torch.save({"weights": torch.zeros(9000)}, file)], ids=["bytes", "torch"]
)
def test_full_disk_is_said_and_leaves_the_old_file(write, tmp_path):
    path, before = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_atomically(path, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=rf"^{path}: cannot be written \(File too large\)\.$"):
            write_file(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
