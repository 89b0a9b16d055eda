"""Checkpoints of untrained networks, which will do for teachers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from densecal.data import DataCard
from densecal.registry import MODELS

CARD = DataCard(name="blobs", classes=["background", "left", "right"], patch_size=[8, 8, 8], augment=False, cache=False)
REGIONS = {"left": [1], "right": [2], "both": [1, 2]}
"""Regions of these classes; as many, so that the same networks do."""
IMAGES = replace(CARD, patch_size=[16, 16], image_channels=3, normalisation="imagenet", background=None)


def write_teacher(path: Path, card: DataCard = CARD, *, model: str = "unet", seed: int = 0, sharp: float = 10.0, **options: Any) -> Path:
    """A checkpoint such as ``densecal-train`` writes, of random weights; ``sharp`` multiplies those of the network's last layer, so that it is sure of something."""
    options = options or {"channels": [4, 8]}
    torch.manual_seed(seed)
    network = MODELS[model](card.image_channels, card.schema.num_classes, spatial_dims=card.spatial_dims, **options)
    last = [module for module in network.modules() if getattr(module, "out_channels", None) == card.schema.num_classes][-1]
    with torch.no_grad():
        last.weight.mul_(sharp)
    config = {
        "data": asdict(card),
        "model": {"_target_": f"densecal.models.{model}", **options},
        "inference": {"_target_": "densecal.inference.customary_inferer", "multiple": 2},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"densecal": {"config": config, "version": "0"}, "state_dict": state}, path)
    return path


class Pointwise(torch.nn.Module):
    """Looks at one pixel at a time, so that what it says of a patch is a patch of what it says of the image, however that is turned."""

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int = 3) -> None:
        super().__init__()
        kind = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[spatial_dims]
        self.one = kind(in_channels, 8, 1)
        self.two = kind(8, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(image).tanh())


def write_pointwise(path: Path, card: DataCard, seed: int = 0) -> Path:
    """A checkpoint of one."""
    torch.manual_seed(seed)
    network = Pointwise(card.image_channels, card.schema.num_classes, card.spatial_dims)
    with torch.no_grad():
        network.two.weight.mul_(5)
    config = {
        "data": asdict(card),
        "model": {"_target_": "teachers.Pointwise"},
        "inference": {"_target_": "densecal.inference.WholeImage", "spatial_dims": card.spatial_dims},
    }
    torch.save({"densecal": {"config": config, "version": "0"}, "state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, path)
    return path
