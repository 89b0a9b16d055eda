"""Checkpoints are whole or absent."""

import pytest
import torch

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
