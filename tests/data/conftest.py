"""Small data sets, made on the fly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from volumes import blob, save

from densecal.data.card import DataCard


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., DataCard]:
    """Write a set of cases ``s001, s002, ...`` of slightly different shapes; return its card. Cases 2k-1 and 2k are one subject."""

    def make(
        cases: int = 8, *, folder: str = "set", layout: str = "decathlon", soft: bool = False, shape: tuple[int, ...] = (9, 12, 10), **changes: Any
    ) -> DataCard:
        root = tmp_path / folder
        images, labels = ("imagesTr", "labelsTr") if layout == "decathlon" else ("images", "labels")
        for n in range(1, cases + 1):
            image, label = blob(tuple(s + n % 3 for s in shape), seed=n)
            target = np.stack([0.8 * (label == c) + 0.2 / 3 for c in range(3)], axis=-1).astype(np.float32) if soft else label
            save(root / images / f"s{n:03}.nii.gz", image)
            save(root / labels / f"s{n:03}.nii.gz", target)
        if layout == "decathlon":
            listing = [{"image": f"./{images}/s{n:03}.nii.gz", "label": f"./{labels}/s{n:03}.nii.gz"} for n in range(1, cases + 1)]
            (root / "dataset.json").write_text(json.dumps({"training": listing}))
        settings = {
            "name": "blobs",
            "classes": ["background", "left", "right"],
            "layout": layout,
            "root": str(root),
            "soft_labels": soft,
            "subject_pattern": r"s(\d+)",
            "subject_size": 2,
            "patch_size": [8, 16, 8],
            "batch_size": 2,
            "num_workers": 0,
        }
        return DataCard(**(settings | changes))

    return make
