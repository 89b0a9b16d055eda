"""The body of ``densecal-train``: from a data set card to a trained network and a report on how far its confidence can be believed."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from collections import UserList
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import nn

import densecal
from densecal.cli.configuration import CommandError, build, build_loss, given_settings
from densecal.cli.evaluation import evaluate_run
from densecal.cli.facts import target_name
from densecal.cli.stopping import exit_status, sigterm_raises, worker_death
from densecal.data import DataCard, DataProblems, SegmentationData
from densecal.data.medium import medium_of
from densecal.files import remove_unfinished, write_atomically
from densecal.inference import Inferer
from densecal.instantiation import check_trusted
from densecal.losses import CompoundLoss
from densecal.metrics import SegmentationEvaluation
from densecal.models.pretrained import without_pretrained
from densecal.ops.activation import probabilities
from densecal.registry import near_matches
from densecal.runs import (
    RunInUse,
    find_checkpoint,
    find_latest_run,
    lock_run,
    new_run_dir,
    provenance,
    read_checkpoint,
    read_record,
    read_splits,
    write_record,
)
from densecal.seeds import derive_seed
from densecal.tasks import (
    AtomicCheckpointIO,
    CompactProgressBar,
    ConfigInCheckpoint,
    DistillationTask,
    EpochLines,
    FirstCheckpoint,
    History,
    NonFiniteLoss,
    SegmentationTask,
    StatelessRandomness,
    Teachers,
)
from densecal.tasks.non_finite import NON_FINITE

__all__ = ["train"]

_OURS = {
    "callbacks": "densecal sets the callbacks",
    "logger": "densecal logs to metrics.csv and TensorBoard",
    "plugins": "densecal sets the plugins",
    "default_root_dir": "output_dir= says where runs go",
    "use_distributed_sampler": "densecal's loaders divide the cases themselves",
    "fast_dev_run": "for a quick try: trainer.max_epochs=1 trainer.limit_train_batches=2",
    "enable_checkpointing": "a run without checkpoints cannot be tested or resumed",
}
"""Arguments of lightning.Trainer that a run sets itself."""

_HIGHER_IS_BETTER = ("dice", "iou", "soft_dice", "soft_iou", "qubiq_dice", "accuracy")

_MAY_CHANGE = (
    "trainer.",
    "inference.",
    *(f"data.{key}" for key in ("root", "test_root", "epochs", "num_workers", "cache", "download")),
    *("evaluate", "predictions", "output_dir", "experiment_name", "resume", "trust_config", "non_finite", "max_skipped"),
    "distillation.teachers",  # where they lie; the checkpoint knows them by their content
)
"""Settings that a resumed run may have anew: what was trained so far does not depend on them."""


class _EventFiles(TensorBoardLogger):
    """TensorBoard's own files alone; the settings are in ``config.yaml`` already."""

    def save(self) -> None:
        self.experiment.flush()


@dataclass
class _Run:
    """Where a run lies, and the checkpoint it goes on from."""

    config: DictConfig
    folder: Path | None = None
    checkpoint: Path | None = None


def train(config: DictConfig) -> Path:
    """Train, test and report.

    Nothing is written before the data are checked and the network, the loss and everything else have been built.

    Returns:
        The run directory.

    Raises:
        CommandError: What the user can mend.
    """
    _quiet()
    with ExitStack() as held:
        held.enter_context(sigterm_raises())
        return _train(config, held)


def _train(config: DictConfig, held: ExitStack) -> Path:
    first = getattr(rank_zero_only, "rank", None) in (0, None)
    try:
        choices, values = given_settings()
        run = _resume(config, choices, values) if config.resume is not None else _Run(config)
        if run.folder is not None and first:
            held.enter_context(lock_run(run.folder))
        config = run.config
        _check(config)
        card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data))
        assert isinstance(card, DataCard)
        _check_outputs(config, card)
        if config.monitor is None:
            config.monitor = "val/dice" if card.schema.has_structure else "val/iou_dataset"
        L.seed_everything(config.seed, verbose=False)
        teachers = _build_teachers(config, card)
        companions = teachers.companions if teachers else None
        data = SegmentationData(card, seed=config.seed, progress=sys.stderr.isatty(), training_companions=companions)
        task = _build_task(config, card, data, teachers, resumed=run.checkpoint is not None)
        if run.folder is not None and run.checkpoint is not None:
            _check_same_cases(run.folder, data)
            task.on_load_checkpoint(read_checkpoint(run.checkpoint))
        # The other ranks never use their own guess: Lightning hands them rank 0's.
        folder = run.folder or (new_run_dir(Path(config.output_dir), _experiment_name(config)) if first else Path(config.output_dir))
    except (ValueError, OSError, RunInUse, DataProblems) as error:
        raise CommandError(str(error)) from None
    try:
        config.data.root = str(data.root.resolve())
        content = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
        history = History(folder / "metrics.csv")
        trainer = _build_trainer(config, card, data, folder, history, ConfigInCheckpoint(content, densecal.__version__), run.checkpoint)
        _check_smallest_batch(config, card, task, trainer, len(data.splits["train"]))
    except (CommandError, ValueError, OSError) as error:
        if first and run.folder is None:
            os.removedirs(folder)
        raise CommandError(str(error)) from None

    with _failing_in_one_line(folder, trainer):
        if trainer.is_global_zero:
            if run.folder is None:
                held.enter_context(lock_run(folder))
            _begin(folder, config, content, data, run.checkpoint)
            _announce(config, data, task, folder, run.checkpoint)
        trainer.fit(task, datamodule=data, ckpt_path=run.checkpoint, weights_only=True if run.checkpoint else None)
        folder = trainer.strategy.broadcast(folder)
        evaluate_run(folder, data, config, task=task, trainer=trainer, history=history)
    return folder


@contextmanager
def _failing_in_one_line(folder: Path, trainer: L.Trainer) -> Iterator[None]:
    """What ends a run from outside is said in one line, with how to go on."""
    go_on = f"Go on with resume={folder}"
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stop:
        if trainer.is_global_zero:
            print(f"\nStopped. {go_on}", flush=True)
        raise SystemExit(exit_status(stop)) from None
    except NonFiniteLoss as error:
        raise CommandError(f"{error} {go_on} and such a setting of the trainer; another optimizer.lr is another run.") from error
    except OSError as error:
        raise CommandError(f"{error} {go_on}, when that is mended.") from error
    except Exception as error:
        if (death := worker_death(error)) is None:
            raise
        raise CommandError(
            f"Data loading: {death}. When memory runs out, the system kills what takes the most: fewer data.num_workers and data.cache=false take less. {go_on}"
        ) from error


def _check(config: DictConfig) -> None:
    for name, allowed in (("evaluate", ("best", "last")), ("monitor_mode", ("auto", "max", "min")), ("non_finite", NON_FINITE)):
        if config[name] not in allowed:
            raise CommandError(f"{name}: expected one of {allowed}, but got {config[name]!r}.")
    for name, reason in _OURS.items():
        if config.trainer.get(name) is not None:
            raise CommandError(f"trainer.{name} cannot be set: {reason}.")


def _check_outputs(config: DictConfig, card: DataCard) -> None:
    allowed = medium_of(card).outputs
    if unknown := [name for name in config.predictions if name not in allowed]:
        raise CommandError(f"predictions: expected any of {allowed}, but got {unknown[0]!r}.")


def _experiment_name(config: DictConfig) -> str:
    choices = HydraConfig.get().runtime.choices
    made = [config.data.name, _stem(choices, "loss"), _stem(choices, "perturbation")]
    return str(config.experiment_name or _stem(choices, "experiment") or "_".join(name for name in made if name))


def _stem(choices: Mapping[str, Any], group: str) -> str:
    choice = choices.get(group)
    return "" if choice in (None, "null", "None") else str(choice).replace("/", "_")


def _build_teachers(config: DictConfig, card: DataCard) -> Teachers | None:
    if config.get("distillation") is None:
        return None
    config.distillation.teachers = [str(Path(teacher).resolve()) for teacher in config.distillation.teachers]
    try:
        teachers: Teachers = build(config.distillation, "distillation", trust_config=config.trust_config)(card=card)
    except (ValueError, OSError) as error:
        raise CommandError(f"distillation: {error}") from None
    return teachers


def _build_task(config: DictConfig, card: DataCard, data: SegmentationData, teachers: Teachers | None, *, resumed: bool) -> SegmentationTask:
    known: dict[str, Any] = {"in_channels": card.image_channels, "num_classes": data.schema.num_classes, "spatial_dims": card.spatial_dims}
    if resumed:
        known |= without_pretrained(hydra.utils.get_object(config.model._target_))
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model: nn.Module = build(config.model, "model", **known)
    loss = _build_loss(config, data)
    window: Inferer = build(config.inference, "inference", patch_size=list(card.patch_size), spatial_dims=card.spatial_dims)
    if teachers is None and "teacher_logits" in getattr(loss, "needs", ()):
        raise CommandError(
            "loss: learns from teachers, but there is none. Give trained runs: distillation=online distillation.teachers=[runs/EXPERIMENT/TIME]."
        )
    task = (SegmentationTask if teachers is None else partial(DistillationTask, teachers=teachers))(
        model,
        loss,
        data.schema,
        window,
        optimizer=build(config.optimizer, "optimizer"),
        scheduler=build(config.scheduler, "scheduler") if config.scheduler else None,
        encoder_lr_ratio=config.encoder_lr_ratio,
        max_steps=_max_steps(config),
        non_finite=config.non_finite,
        max_skipped=config.max_skipped,
        num_bins=config.num_bins,
        foreground_radius=card.foreground_radius,
    )
    try:
        task.make_optimizer([nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise CommandError(f"optimizer: {error}") from None
    scores = {f"val/{name}" for name in _probe(task, data)}
    if config.monitor not in scores:
        raise CommandError(f"monitor: no score {config.monitor!r}. {near_matches(config.monitor, scores)}")
    return task


def _build_loss(config: DictConfig, data: SegmentationData) -> nn.Module:
    """The loss, with its labels perturbed if the config says so."""
    case_ids = UserList(case.id for case in data.splits["train"])  # taken as one thing by OmegaConf, which makes a node of each name of a list
    loss: nn.Module = build_loss(config.loss, "loss", data.schema, case_ids=case_ids)
    if config.get("perturbation"):
        if not isinstance(loss, CompoundLoss):
            raise CommandError(
                f"perturbation: {type(loss).__name__} is not composed of a target and terms, so there are no labels to perturb. "
                "Choose a loss of densecal's, or leave perturbation out."
            )
        make = build_loss(config.perturbation, "perturbation", data.schema, case_ids=case_ids)
        try:
            loss.replace_target(make(label_target=loss.target))
        except (TypeError, ValueError) as error:
            raise CommandError(f"perturbation: {error}") from None
    if getattr(loss, "needs_validation", False) and not (data.splits["val"] and config.trainer.get("limit_val_batches") != 0):
        raise CommandError(
            "data.val_fraction: the levels of perturbation follow the accuracy on validation cases, of which there are none. Set it above 0 and leave "
            "trainer.limit_val_batches alone, or choose levels that need none: perturbation=confidence_smoothing, loss_smoothing or stochastic."
        )
    return loss


def _max_steps(config: DictConfig) -> int | None:
    steps = config.trainer.get("max_steps")
    return None if steps in (None, -1) else int(steps)


@torch.no_grad()
def _probe(task: SegmentationTask, data: SegmentationData) -> list[str]:
    """Send one empty patch through network, loss and metrics, so that what does not fit shows before the run begins; return the names of the scores."""
    card = data.card
    image = torch.zeros(1, card.image_channels, *card.patch_size)
    expected = (1, task.schema.num_classes, *card.patch_size)
    task.eval()
    problem = None
    try:
        logits = task(image)
        if tuple(logits.shape) != expected:
            problem = f"its output is {tuple(logits.shape)} instead of {expected}"
    except Exception as error:
        problem = str(error).splitlines()[0].rstrip(".")
    if problem:
        patch = " x ".join(str(n) for n in card.patch_size)
        raise CommandError(
            f"model: cannot take patches of {patch} {medium_of(card).element}s ({problem}). "
            "Choose data.patch_size=[...] divisible by the product of the network's strides: 8 for the default unet, 32 for swin_unetr and most encoders of images."
        )
    label_map = torch.zeros(1, 1, *card.patch_size, dtype=torch.long)
    shares = torch.zeros(1, len(card.classes), *card.patch_size)
    shares[:, 0] = 1
    batch: dict[str, Any] = {
        "image": image,
        "label": shares if card.soft else label_map,
        "case_index": torch.zeros(1, dtype=torch.long),
        "case_id": ["probe"],
    }
    for companion in data.splits["train"][0].companions:
        batch[companion.name] = torch.full(expected, 1 / expected[1]) if companion.shares else label_map.repeat_interleave(len(companion.files), 1)
    if medium_of(card).measured:
        batch["spacing"] = torch.ones(1, 3)
    try:
        task.losses(logits, data.on_after_batch_transfer(batch, 0))
    except Exception as error:
        raise CommandError(f"loss: {str(error).splitlines()[0]}") from None
    task.train()
    evaluation = SegmentationEvaluation(task.schema)
    reference = data.on_after_batch_transfer({"label": shares if card.as_reference().soft else label_map}, 0)["label"]
    evaluation.update(probabilities(logits, task.schema.activation), reference, batch["case_index"])
    return list(evaluation.compute().scalars())


def _check_smallest_batch(config: DictConfig, card: DataCard, task: SegmentationTask, trainer: L.Trainer, cases: int) -> None:
    """Batch normalisation of features pooled to one pixel has no variance to take in a batch of one image: better said now than by the last batch of an epoch."""
    draws = -(-cases * card.samples_per_case // trainer.world_size)
    last = draws % card.batch_size if trainer.limit_train_batches == 1.0 else 0
    if 1 not in (card.batch_size, last) or (config.trainer.get("sync_batchnorm") and trainer.world_size > 1):
        return
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in task.model.modules()):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(task.model).train()(torch.zeros(1, card.image_channels, *card.patch_size))  # a copy: running statistics change
    except ValueError as error:
        size = next((n for n in (*range(card.batch_size, 1, -1), *range(card.batch_size + 1, draws + 1)) if draws % n != 1), None)
        raise CommandError(
            f"data.batch_size: with {card.batch_size}, {draws} patches leave a batch of one, on which the network's batch normalisation cannot train "
            f"({str(error).splitlines()[0].rstrip('.')}). {f'Choose data.batch_size={size}' if size else 'Draw more, with data.samples_per_case'}."
        ) from None


def _build_trainer(
    config: DictConfig, card: DataCard, data: SegmentationData, folder: Path, history: History, record: ConfigInCheckpoint, checkpoint: Path | None
) -> L.Trainer:
    options: dict[str, Any] = {"dirpath": folder / "checkpoints", "save_on_train_epoch_end": True, "enable_version_counter": False}
    higher = config.monitor.removeprefix("val/").startswith(_HIGHER_IS_BETTER)
    mode = {"auto": "max" if higher else "min"}.get(config.monitor_mode, config.monitor_mode)
    best = [ModelCheckpoint(filename="best", monitor=config.monitor, mode=mode, **options)] if data.splits["val"] else []
    first = FirstCheckpoint(folder / "checkpoints" / "last.ckpt")
    progress = CompactProgressBar(leave=False) if sys.stderr.isatty() else EpochLines()
    step = read_checkpoint(checkpoint)["global_step"] if checkpoint else None
    try:
        return build(
            config.trainer,
            "trainer",
            max_epochs=config.trainer.max_epochs or (card.epochs if _max_steps(config) is None else -1),
            max_steps=-1,  # the task ends the training
            callbacks=[StatelessRandomness(config.seed), history, record, progress, *best, ModelCheckpoint(filename="last", **options), first],
            logger=_EventFiles(folder, name="", version="tensorboard", purge_step=step),
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            default_root_dir=folder,
        )
    except (RuntimeError, ImportError) as error:
        raise CommandError(f"trainer: {str(error).splitlines()[0]}") from None


def _begin(folder: Path, config: DictConfig, content: dict[str, Any], data: SegmentationData, checkpoint: Path | None) -> None:
    """Write what the run is; a run that goes on keeps its record and loses its old report."""
    if checkpoint is not None:
        (folder / "report.html").unlink(missing_ok=True)
        remove_unfinished(folder)
        before = read_record(folder)
        record = before | {"resumed": [*before.get("resumed", []), _now()]}
    else:
        choices = {group: str(choice) for group, choice in HydraConfig.get().runtime.choices.items() if not group.startswith("hydra/")}
        record = {"started": _now(), "choices": choices, **provenance()}
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))
    splits = {name: [case.id for case in cases] for name, cases in data.splits.items()}
    write_atomically(folder / "splits.json", json.dumps(splits, indent=2) + "\n")
    write_record(folder, record)  # the last of the three: it makes the folder a run


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _announce(config: DictConfig, data: SegmentationData, task: SegmentationTask, folder: Path, checkpoint: Path | None) -> None:
    card = data.card
    sizes = ", ".join(f"{len(data.splits[name])} {word}" for name, word in (("train", "to train on"), ("val", "to validate"), ("test", "to test")))
    patch = " x ".join(str(n) for n in card.patch_size)
    regions = f"; regions {', '.join(card.regions)}" if card.regions else ""
    print(f"data    {card.name}: {sizes}; patches of {patch} {medium_of(data.card).element}s{regions}")
    print(f"model   {config.model._target_.rpartition('.')[2]}, {sum(p.numel() for p in task.model.parameters()) / 1e6:.2f} million parameters")
    around = f", its labels through {target_name(config.perturbation)}" if config.get("perturbation") else ""
    print(f"loss    {target_name(config.loss)}{around}")
    if config.get("distillation") is not None:
        print(f"taught  by {' and '.join(config.distillation.teachers)}")
    print(f"run     {folder}{_whence(read_checkpoint(checkpoint)) if checkpoint else ''}", flush=True)


def _whence(content: Mapping[str, Any]) -> str:
    return f", from the end of epoch {content['epoch'] + 1}" if content["global_step"] else ", from its beginning"


def _resume(config: DictConfig, choices: Mapping[str, str], values: list[str]) -> _Run:
    """The run to go on with, and its config with what the command line may change.

    Raises:
        CommandError: If the command line asks for another run than the one it names.
        FileNotFoundError: If there is no such run, or no checkpoint in it.
    """
    if config.resume == "latest":

        def fits(folder: Path) -> bool:
            return (folder / "checkpoints" / "last.ckpt").is_file() and _conflict(folder, config, choices, values) is None

        folder = find_latest_run(Path(config.output_dir), fits)
    else:
        folder = Path(config.resume)
        if conflict := _conflict(folder, config, choices, values):
            raise CommandError(f"{conflict} Leave it out to go on with that run, or leave out resume= to start a new one.")
    checkpoint = find_checkpoint(folder, "last")
    read_checkpoint(checkpoint)
    saved = _saved_config(folder)
    if not config.trust_config:
        check_trusted(saved, folder / "config.yaml")
    for key in ("trust_config", *values):
        OmegaConf.update(saved, key, OmegaConf.select(config, key), force_add=True)
    return _Run(saved, folder, checkpoint)


def _saved_config(folder: Path) -> DictConfig:
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)
    return config


def _conflict(folder: Path, config: DictConfig, choices: Mapping[str, str], values: list[str]) -> str | None:
    """What the command line asks for that the run in ``folder`` is not."""
    record, saved = read_record(folder), _saved_config(folder)
    for group, choice in choices.items():
        if record["choices"].get(group) != choice and group != "trainer":
            return f"{group}={choice}: the run in {folder} was made with {group}={record['choices'].get(group)}."
    for key in values:
        was, now = OmegaConf.select(saved, key), OmegaConf.select(config, key)
        if was != now and not key.startswith(_MAY_CHANGE):
            return f"{key}={now}: the run in {folder} was made with {key}={was}."
    return None


def _check_same_cases(folder: Path, data: SegmentationData) -> None:
    saved = read_splits(folder)
    for name in ("train", "val"):
        if saved[name] != [case.id for case in data.splits[name]]:
            raise CommandError(f"{folder}: the data set's {name} cases are not those the run began with (see splits.json there). Start a new run.")


def _quiet() -> None:
    """Leave out what Lightning and torch say about themselves; warnings about the run stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        r".*does not have many workers.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
        r".*Using a non-tuple sequence for multidimensional indexing.*",
        r".*across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message=text)
