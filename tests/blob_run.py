"""A tiny run on volumes made on the fly, predicted in one piece, for the tests of the commands that read one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from commands import run_command
from volumes import blob, save

CARD = {
    "name": "blobs",
    "classes": ["background", "left", "right"],
    "patch_size": [8, 8, 8],
    "batch_size": 2,
    "num_workers": 0,
    "augment": False,
    "val_fraction": 0.3,
    "test_fraction": 0.3,
}


def make_blob_run(root: Path) -> Path:
    """The directory of a run of one epoch; data and card lie in ``root``."""
    for n in range(6):
        image, label = blob((8, 9, 8), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump(CARD))
    settings = [f"data={root / 'blobs.yaml'}", f"data.root={root}", f"output_dir={root / 'runs'}", "trainer.accelerator=cpu", "trainer.max_epochs=1"]
    whole = ["inference=whole_image", "inference.multiple=2", "inference.flip_axes=[0]", "inference.scales=[0.75,1.0]"]
    log = root / "log.txt"
    assert run_command("train", [*settings, "model.channels=[4,8]", *whole], log) == 0, log.read_text()
    (record,) = (root / "runs").glob("*/*/run.json")
    return record.parent


def make_relative(run: Path, folder: Path, *, seed: int, **splits: str) -> Path:
    """A run like another with other weights and, where they are given, other splits of the cases b0, b1, ...: ``train="01", val="23", test="45"``.

    It is as finished as the other, and as long trained; only its network has not come to its weights by training.
    """
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "config.yaml", "summary.json", "splits.json"):
        shutil.copyfile(run / name, folder / name)
    named = {name: [f"b{n}" for n in numbers] for name, numbers in splits.items()}
    if named:
        (folder / "splits.json").write_text(json.dumps(named))
    for path in (run / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(seed)
        for name, value in content["state_dict"].items():
            if name.endswith("weight"):
                content["state_dict"][name] = 2 * value + 0.3 * torch.randn(value.shape, generator=generator)
        if named:
            content["densecal"]["config"]["data"]["splits"] = named
        torch.save(content, folder / "checkpoints" / path.name)
    return folder
