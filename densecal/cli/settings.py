"""The top level of each command's config, with types, so that Hydra refuses what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

__all__ = ["PredictSettings", "TrainSettings", "register_settings"]


@dataclass
class TrainSettings:
    """``configs/train.yaml`` explains each setting and gives its default."""

    data: Any = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = None
    inference: Any = MISSING
    trainer: Any = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    experiment_name: str | None = None
    resume: str | None = None
    monitor: str = MISSING
    monitor_mode: str = MISSING
    evaluate: str = MISSING
    predictions: list[str] = field(default_factory=list)
    num_bins: int = MISSING


@dataclass
class PredictSettings:
    """``configs/predict.yaml`` explains each setting and gives its default."""

    run: str = MISSING
    checkpoint: str = MISSING
    input: str = MISSING
    output: str = MISSING
    outputs: list[str] = field(default_factory=list)
    device: str = MISSING


def register_settings() -> None:
    """Let the YAML files name the classes above in their defaults."""
    store = ConfigStore.instance()
    store.store(name="train_settings", node=TrainSettings)
    store.store(name="predict_settings", node=PredictSettings)
