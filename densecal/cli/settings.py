"""The top level of each command's config, with types, so that Hydra refuses what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from densecal.cli.sources import register_sources

__all__ = [
    "CalibrateSettings",
    "CorruptLabelsSettings",
    "EvaluateSettings",
    "FindLabelErrorsSettings",
    "NNUNetSettings",
    "PredictSettings",
    "SoftLabelSettings",
    "TrainSettings",
    "register_settings",
]


@dataclass
class TrainSettings:
    """``configs/train.yaml`` explains each setting and gives its default."""

    data: Any = MISSING
    model: Any = MISSING
    loss: Any = MISSING
    perturbation: Any = None
    distillation: Any = None
    optimizer: Any = MISSING
    scheduler: Any = None
    encoder_lr_ratio: float = MISSING
    inference: Any = MISSING
    trainer: Any = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    experiment_name: str | None = None
    resume: str | None = None
    trust_config: bool = MISSING
    monitor: str | None = None
    monitor_mode: str = MISSING
    non_finite: str = MISSING
    max_skipped: int = MISSING
    evaluate: str = MISSING
    predictions: list[str] = field(default_factory=list)
    num_bins: int = MISSING


@dataclass
class PredictSettings:
    """``configs/predict.yaml`` explains each setting and gives its default."""

    inference: Any = None
    run: Any = MISSING
    checkpoint: str = MISSING
    calibration: str | None = None
    input: str = MISSING
    output: str = MISSING
    outputs: list[str] = field(default_factory=list)
    device: str = MISSING
    trust_config: bool = MISSING


@dataclass
class SoftLabelSettings:
    """``configs/soft_labels.yaml`` explains each setting and gives its default."""

    data: Any = None
    inference: Any = None
    run: str = MISSING
    checkpoint: str = MISSING
    output: str = MISSING
    root: str | None = None
    split: str = MISSING
    device: str = MISSING
    trust_config: bool = MISSING


@dataclass
class _ScoredSettings:
    """Where predictions and the labels to hold them against come from, and how saved ones are read."""

    data: Any = None
    inference: Any = None
    root: str | None = None
    split: str | None = None
    device: str = MISSING
    trust_config: bool = MISSING
    predictions: Any = None
    labels: str | None = None
    images: str | None = None
    classes: list[str] | None = None
    from_logits: bool = MISSING
    axes: str = MISSING
    label_values: list[int] | None = None
    prediction_suffix: str | None = None
    label_suffix: str = MISSING
    ignore_index: int | None = None
    background: int | None = None
    strict: bool = MISSING
    output: str | None = None


@dataclass
class EvaluateSettings(_ScoredSettings):
    """``configs/evaluate.yaml`` explains each setting and gives its default."""

    run: Any = None
    ensemble: Any = None
    checkpoint: str = MISSING
    calibration: str | None = None
    regions: dict[str, list[int]] = field(default_factory=dict)
    activation: str | None = None
    subject_pattern: str | None = None
    num_bins: int = MISSING
    foreground_radius: int = MISSING
    boundary_width: float | None = None
    boundary_unit: str = MISSING
    surface_tolerance: float | None = None
    replicates: int = MISSING


@dataclass
class CalibrateSettings(_ScoredSettings):
    """``configs/calibrate.yaml`` explains each setting and gives its default."""

    posthoc: Any = MISSING
    run: Any = None
    ensemble: Any = None
    checkpoint: str | None = None
    regions: dict[str, list[int]] = field(default_factory=dict)
    activation: str | None = None
    subject_pattern: str | None = None
    apply_to: str | None = None
    calibration: str | None = None
    control: dict[str, float] = field(default_factory=dict)
    fit_region: str = MISSING
    foreground_radius: int = MISSING
    num_folds: int = MISSING
    num_bins: int = MISSING
    replicates: int = MISSING


@dataclass
class CorruptLabelsSettings:
    """``configs/corrupt_labels.yaml`` explains each setting and gives its default."""

    data: Any = None
    output: str = MISSING
    share: float = MISSING
    split: str = MISSING
    kind: Any = MISSING
    severity: Any = MISSING
    transition: list[list[float]] | None = None
    seed: int = MISSING
    link: bool = MISSING


@dataclass
class FindLabelErrorsSettings(_ScoredSettings):
    """``configs/find_label_errors.yaml`` explains each setting and gives its default."""

    runs: Any = None
    checkpoint: str | None = None
    score: str = MISSING
    top: int = MISSING
    known: str | None = None


@dataclass
class NNUNetSettings:
    """``configs/nnunet.yaml`` explains each setting and gives its default."""

    loss: Any = MISSING
    perturbation: Any = None
    epochs: int | None = None
    iterations: int | None = None
    val_iterations: int | None = None


def register_settings() -> None:
    """Let the YAML files name the classes above in their defaults, and the command line a pair of architecture and encoder."""
    register_sources()
    store = ConfigStore.instance()
    store.store(name="train_settings", node=TrainSettings)
    store.store(name="predict_settings", node=PredictSettings)
    store.store(name="soft_label_settings", node=SoftLabelSettings)
    store.store(name="evaluate_settings", node=EvaluateSettings)
    store.store(name="calibrate_settings", node=CalibrateSettings)
    store.store(name="corrupt_labels_settings", node=CorruptLabelsSettings)
    store.store(name="find_label_errors_settings", node=FindLabelErrorsSettings)
    store.store(name="nnunet_settings", node=NNUNetSettings)
