"""nnU-Net's trainers with a loss of this package, by their names."""

from __future__ import annotations

import os
import re
import shlex
from collections import UserList
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import densecal
from densecal.files import write_atomically
from densecal.integrations.nnunet.loss import NNUNetLoss
from densecal.labels import DEFAULT_IGNORE_INDEX, LabelSchema
from densecal.registry import near_matches
from densecal.resources import configs_dir

__all__ = ["DensecalTrainer", "lookup_folder", "trainer_class", "trainer_settings"]

SETTINGS = "DENSECAL_NNUNET"
"""Environment variable of the settings."""
RECORD = "densecal.yaml"
"""File beside ``plans.json`` that says with which settings a model was trained."""

_NAME = re.compile(r"(?P<base>\w+?)Densecal(?:_(?P<loss>\w+))?(?:-(?P<label>[\w.]+))?")
_SIDE_INPUTS = ("image", "spacing", "case_id")
_LENGTHS = {"epochs": "num_epochs", "iterations": "num_iterations_per_epoch", "val_iterations": "num_val_iterations_per_epoch"}
_DEVICE = torch.device("cuda")
_Trainer: Any = object  # nnU-Net's comes after it among the bases


def lookup_folder() -> Path:
    """What ``nnUNet_extTrainer`` has to name.

    Example:
        >>> [file.name for file in lookup_folder().glob("*.py")]
        ['densecal_trainers.py']
    """
    return Path(__file__).resolve().parent / "lookup"


def trainer_class(name: str) -> type:
    """The trainer of a name such as ``nnUNetTrainerDensecal_svls`` or ``nnUNetTrainerDA5Densecal_nacl-strong``.

    Args:
        name: A trainer of nnU-Net to build on, ``Densecal``, maybe ``_`` and a loss, maybe ``-`` and a word of one's own.

    Raises:
        AttributeError: If the name is not of this form.
        ValueError: If there is no such loss.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise AttributeError(name)
    if parts["loss"] is not None:
        _check_loss(name, parts["loss"])
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    base = recursive_find_trainer_class_by_name(parts["base"])
    return type(name, (DensecalTrainer, base), {"loss_name": parts["loss"], "__module__": __name__, "__doc__": DensecalTrainer.__doc__})


def trainer_settings(loss: str | None = None) -> dict[str, Any]:
    """The checked settings that the environment variable ``DENSECAL_NNUNET`` gives.

    Args:
        loss: The loss that the trainer's name says, if it does.

    Raises:
        ValueError: (one line) If a setting is unknown or out of range, or names another loss.

    Example:
        >>> os.environ["DENSECAL_NNUNET"] = "loss.sigma=1.5 epochs=250"
        >>> settings = trainer_settings("svls")
        >>> settings["epochs"], settings["loss"]["sigma"], settings["loss"]["_target_"]
        (250, 1.5, 'densecal.losses.SVLSLoss')
        >>> del os.environ["DENSECAL_NNUNET"]
    """
    from omegaconf import OmegaConf

    from densecal.cli.configuration import CommandError, composed

    try:
        lines = shlex.split(os.environ.get(SETTINGS, ""))
        if loss is not None:
            if other := [line for line in lines if line.startswith("loss=") and line != f"loss={loss}"]:
                raise CommandError(f"{other[0]}, but the name of the trainer says {loss}. Leave one of them out.")
            lines = [f"loss={loss}", *(line for line in lines if line != f"loss={loss}")]
        config = composed(lines, "nnunet")
        for name in _LENGTHS:
            if config[name] is not None and config[name] < 1:
                raise CommandError(f"{name}: expected 1 or more, or null, but got {config[name]}.")
    except ValueError as error:
        raise CommandError(f"{SETTINGS}: {error}") from None
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


class DensecalTrainer(_Trainer):
    """What a trainer of nnU-Net does otherwise for a loss of this package; a base to put before it: ``class Mine(DensecalTrainer, nnUNetTrainerDA5)``.

    The loss knows the classes or regions and the ignored label of ``dataset.json``; outputs are weighted as the trainer weights them. Its side inputs are the image,
    the spacing and the name of the case; it is told of epochs, steps and validations. ``densecal.yaml`` beside ``plans.json`` holds the settings, which are those of
    all folds; checkpoints hold them and what the loss has learned, and a training that goes on has to have the same. Network, augmentation, optimizer, mixed
    precision, compilation and several processes are as in the trainer it is built on.
    """

    loss_name: str | None = None
    """The loss that the name of the class says."""
    my_init_kwargs: dict[str, Any]

    def __init__(self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: torch.device = _DEVICE) -> None:
        self.settings = trainer_settings(self.loss_name)
        self._loaded: dict[str, Any] | None = None
        super().__init__(plans, configuration, fold, dataset_json, device)
        for ours, theirs in _LENGTHS.items():
            if self.settings[ours] is not None:
                setattr(self, theirs, self.settings[ours])

    def _build_loss(self) -> nn.Module:
        weights = getattr(super()._build_loss(), "weight_factors", None)
        schema = _schema(self.dataset_json["labels"], self.label_manager)
        loss = _made(self.settings, schema, lambda: self.do_split()[0])
        ignore_channel = self.label_manager.has_regions and self.label_manager.has_ignore_label
        dims = len(self.configuration_manager.patch_size)
        return NNUNetLoss(loss, schema, spatial_dims=dims, weights=weights, ignore_channel=ignore_channel).to(self.device)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        record = Path(self.output_folder_base) / RECORD
        if record.is_file():
            _hold_against(self.settings, yaml.safe_load(record.read_text(encoding="utf-8")), record)
        if self._loaded is not None:
            _hold_against(self.settings, self._loaded["settings"], "the checkpoint")
            self.loss.load_state_dict(self._loaded["loss"])
        if self.local_rank == 0:
            text = f"# Written by densecal {densecal.__version__}\n{yaml.safe_dump(self.settings, sort_keys=False)}"
            write_atomically(record, text)
            self.print_to_log_file(f"densecal {densecal.__version__}\n{text}", also_print_to_console=False, add_timestamp=False)
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.loss.train()
        self._step = self.current_epoch * self.num_iterations_per_epoch
        inner = self.loss.loss
        inner.on_epoch(self.current_epoch, self.num_epochs)
        numbers: dict[str, float] = inner.loss.numbers() if hasattr(inner.loss, "numbers") else {}
        if numbers:
            self.print_to_log_file("loss:", ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.loss.loss.on_step(self._step, self.num_epochs * self.num_iterations_per_epoch)
        self._step += 1
        self.loss.context = self._side_inputs(batch)
        result: dict[str, Any] = super().train_step(batch)
        return result

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.loss.eval()

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.loss.context = self._side_inputs(batch)
        result: dict[str, Any] = super().validation_step(batch)
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        super().on_validation_epoch_end(val_outputs)
        latest = {name: float(self.logger.get_value(theirs, step=-1)) for name, theirs in (("loss", "val_losses"), ("dice", "mean_fg_dice"))}
        self.loss.on_validation(latest)
        self.loss.loss.on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        # nnU-Net saves no more than it knows of, the arguments of the constructor among it.
        self.my_init_kwargs["densecal"] = {"settings": self.settings, "version": densecal.__version__, "loss": self.loss.state_dict()}
        try:
            super().save_checkpoint(filename)
        finally:
            del self.my_init_kwargs["densecal"]

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.my_init_kwargs = dict(self.my_init_kwargs)
        self._loaded = self.my_init_kwargs.pop("densecal", None)

    def _side_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        needs = self.loss.loss.needs
        side: dict[str, Any] = {}
        if "image" in needs:
            side["image"] = batch["data"].to(self.device, non_blocking=True)
        if "spacing" in needs:
            side["spacing"] = torch.tensor([list(self.configuration_manager.spacing)] * len(batch["data"]), device=self.device)
        if "case_id" in needs:
            side["case_id"] = [str(key) for key in batch["keys"]]
        return side


def _check_loss(name: str, loss: str) -> None:
    losses = sorted(path.stem for path in (configs_dir() / "loss").glob("*.yaml"))
    if loss not in losses and SETTINGS not in os.environ:  # it may be one of the user's own, which the settings say where to find
        raise ValueError(f"-tr {name}: no loss {loss!r}. {near_matches(loss, losses)}")


def _schema(labels: Mapping[str, Any], manager: Any) -> LabelSchema:
    """The classes or regions of ``dataset.json``, as nnU-Net reads it."""
    named = {name: value for name, value in labels.items() if name != "ignore"}
    if not manager.has_regions:
        ignore = manager.ignore_label if manager.has_ignore_label else DEFAULT_IGNORE_INDEX
        return LabelSchema(tuple(sorted(named, key=lambda name: int(named[name]))), ignore)
    regions = tuple(name for name, value in named.items() if set(value if isinstance(value, (list, tuple)) else [value]) != {0})
    return LabelSchema(regions, DEFAULT_IGNORE_INDEX, None, activation="sigmoid")


def _made(settings: Mapping[str, Any], schema: LabelSchema, case_ids: Any) -> nn.Module:
    """The loss that the settings describe, its labels perturbed if they say so."""
    from omegaconf import OmegaConf

    from densecal.cli.configuration import CommandError, build_loss
    from densecal.losses import CompoundLoss
    from densecal.targets.base import check_activation

    names = UserList(case_ids())
    loss: nn.Module = build_loss(OmegaConf.create(settings["loss"]), "loss", schema, case_ids=names)
    if settings["perturbation"]:
        if not isinstance(loss, CompoundLoss):
            raise CommandError(f"perturbation: {type(loss).__name__} has no labels to perturb. Choose a loss of densecal's, or leave it out.")
        make = build_loss(OmegaConf.create(settings["perturbation"]), "perturbation", schema, case_ids=names)
        try:
            loss.replace_target(make(label_target=loss.target))
        except (TypeError, ValueError) as error:
            raise CommandError(f"perturbation: {error}") from None
    try:
        check_activation(loss, schema)
    except ValueError as error:
        raise CommandError(f"loss: {error}") from None
    if lacking := [name for name in getattr(loss, "needs", ()) if name not in _SIDE_INPUTS]:
        raise CommandError(f"loss: needs {lacking[0]!r}, which nnU-Net's batches do not hold. Choose another loss.")
    if next(loss.parameters(), None) is not None:
        raise CommandError(f"loss: {type(loss).__name__} has parameters, but nnU-Net's optimizer is given those of the network alone.")
    return loss


def _hold_against(settings: Mapping[str, Any], other: Any, where: Path | str) -> None:
    """Refuse to mix trainings of different settings in one model."""
    ours, theirs = _flat(settings), _flat(other)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{where}: was trained with {key}={theirs.get(key)}, but {SETTINGS} says {ours.get(key)}. Give the same settings, a name of its own to "
                "this training (-tr ...Densecal_LOSS-NAME), or take the folder away."
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
