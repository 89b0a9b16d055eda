"""What a config says, in the words of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

from densecal.data.card import DataCard

__all__ = ["minutes", "reference", "shared_facts", "target_name", "training_facts"]


def reference(card: DataCard) -> str | None:
    """What the cases of a set with several raters are held against; ``None`` where there are none."""
    return "mean of the raters: the share of them who chose each class" if card.rater_files else None


def training_facts(config: DictConfig, model: nn.Module) -> dict[str, Any]:
    """How a network was trained.

    Args:
        config: The run's config.
        model: The network.

    Returns:
        Name -> text or number, in the order to show.
    """
    ratio = config.get("encoder_lr_ratio", 1.0)
    return {
        "model": f"{target_name(config.model)}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters",
        "loss": _settings(config.loss),
        **({"perturbation": _settings(config.perturbation)} if config.get("perturbation") else {}),
        **({"teachers": _settings(config.distillation)} if config.get("distillation") else {}),
        "optimizer": _settings(config.optimizer) + (f", the encoder at {ratio:g} of the learning rate" if ratio != 1 else ""),
        "schedule": _settings(config.scheduler) if config.scheduler else "constant learning rate",
        "patch": " x ".join(str(n) for n in config.data.patch_size) + (" voxels" if len(config.data.patch_size) == 3 else " pixels"),
        **({"raters in training": config.data.rater_fusion} if config.data.get("rater_files") else {}),
        "augmentation": ", ".join(config.data.pipeline) if config.data.augment and config.data.get("pipeline") else config.data.augment,
        "whole images by": _settings(config.inference),
        "seed": config.seed,
    }


def shared_facts(every: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several networks: a value that all share as it is, else the different ones.

    Example:
        >>> shared_facts([{"loss": "svls", "seed": 0}, {"loss": "svls", "seed": 1}])
        {'loss': 'svls', 'seed': [0, 1]}
    """
    values: dict[str, list[Any]] = {}
    for facts in every:
        for name, value in facts.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def target_name(node: DictConfig) -> str:
    """Name of the class that a ``_target_`` node builds."""
    return str(node._target_).rpartition(".")[2]


def _items(node: DictConfig) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in node.items()]


def _settings(node: DictConfig) -> str:
    """``Name (key value, ...)``, of nested objects too; terms by their names and weights."""
    words = [f"{key} {_spell(value)}" for key, value in _items(node) if not key.startswith("_") and value is not None]
    return target_name(node) + (f" ({', '.join(words)})" if words else "")


def _spell(value: Any) -> str:
    if isinstance(value, DictConfig):
        if "_target_" in value:
            return _settings(value)
        return " + ".join(f"{_spell(item.weight)} {key}" if isinstance(item, DictConfig) and "weight" in item else key for key, item in _items(value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def minutes(seconds: float) -> str:
    """A duration in words."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
