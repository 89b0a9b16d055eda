"""A tiny run on volumes made on the fly, predicted in one piece, for the tests of the commands that read one."""

from __future__ import annotations

from pathlib import Path

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
