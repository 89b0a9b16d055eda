"""What a command line may say, and that everything else is one line and nothing written."""

from __future__ import annotations

import os
import re
import sys
from collections import UserList
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from densecal.cli.configuration import CommandError, accepted, build, build_loss, command, given_settings, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.data.card import card_names, load_card
from densecal.labels import LabelSchema
from densecal.losses import CompoundLoss
from densecal.resources import configs_dir
from densecal.schedules import Linear, TwoStage
from densecal.targets import Target


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to stand in; a test that only checks a command line leaves it as it was."""
    register_settings()
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def composed(*overrides: str) -> DictConfig:
    arguments = prepare_arguments(overrides, "train")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        return hydra.compose("train", arguments)


REFUSED = {
    "key-top": (["sede=1"], r"Unknown setting 'sede'\. Did you mean 'seed'\?"),
    "key-nested": (
        ["optimizer.lrr=0.1"],
        r"Unknown setting 'optimizer\.lrr'\. Did you mean 'optimizer\.lr'\? Settings of 'optimizer': .*weight_decay",
    ),
    "key-of-the-constructor": (["optimizer.amsgrd=true"], r"Unknown setting 'optimizer\.amsgrd'\. Did you mean 'optimizer\.amsgrad'\?"),
    "key-of-the-trainer": (["trainer.max_epoch=3"], r"Unknown setting 'trainer\.max_epoch'\. Did you mean 'trainer\.max_epochs'\?"),
    "key-of-the-card": (["data.patchsize=[8,8,8]"], r"Unknown setting 'data\.patchsize'\. Did you mean 'data\.patch_size'\?"),
    "key-elsewhere": (["lr=0.1"], r"Unknown setting 'lr'\. Did you mean 'optimizer\.lr'"),
    "key-in-the-wrong-group": (["optimizer.patch_size=[8,8,8]"], r"Unknown setting 'optimizer\.patch_size'\. Did you mean 'data\.patch_size'"),
    "key-of-another-choice": (["model=unet", "model.filters=[4,8]"], r"Unknown setting 'model\.filters'"),
    "key-unlike-any": (["qqqq=1"], r"Unknown setting 'qqqq'\. Settings: data, .*seed"),
    "key-with-plus": (["+optimizer.lrr=0.1"], r"optimizer\.lrr: torch\.optim\.Adam has no such argument\. Did you mean 'lr'"),
    "key-with-plus-at-the-top": (["+sede=1"], r"Unknown setting 'sede'\. Did you mean 'seed'"),
    "key-with-two-plus": (["++sede=1"], r"Unknown setting 'sede'\. Did you mean 'seed'"),
    "key-with-plus-of-the-card": (["+data.patchsize=[8,8,8]"], r"Unknown setting 'data\.patchsize'\. Did you mean 'data\.patch_size'"),
    "key-with-plus-of-no-group": (["+modle.channels=[4,8]"], r"Unknown setting 'modle\.channels'\. Did you mean 'model\.channels'"),
    "key-of-a-transform": (
        ["data=camvid", "data.pipeline.RandomScale.scale_limits=1"],
        r"Unknown setting 'data\.pipeline\.RandomScale\.scale_limits'\. Did you mean 'data\.pipeline\.RandomScale\.scale_limit'",
    ),
    "key-left-out": (
        ["data=camvid", "~data.pipeline.ColorJiter"],
        r"Unknown setting 'data\.pipeline\.ColorJiter'\. Did you mean 'data\.pipeline\.ColorJitter'",
    ),
    "choice-loss": (["loss=slvs"], r"No loss 'slvs'\. Did you mean 'svls'\?"),
    "choice-model": (["model=unett"], r"No model 'unett'\. Did you mean 'unet'"),
    "choice-network-encoder": (["model=unet_resnet19"], r"^No model 'unet_resnet19'\. Did you mean 'unet_resnet18'.{,200}$"),
    "choice-network-architecture": (["model=deeplabv4_resnet50"], r"^No model 'deeplabv4_resnet50'\. Did you mean 'deeplabv3_resnet50'.{,200}$"),
    "choice-network-in-a-sweep": (["-m", "model=unet,unet_resnet19"], r"No model 'unet_resnet19'"),
    "key-of-a-network": (["model=unet_resnet18", "model.options.decoder_chanels=[8]"], r"Did you mean 'model\.options\.decoder_channels'"),
    "choice-data": (["data=hipocampus"], r"No data 'hipocampus'\. Did you mean 'hippocampus'"),
    "choice-experiment": (["experiment=hippocampus_smal"], r"No experiment 'hippocampus_smal'\. Did you mean 'hippocampus_small'"),
    "choice-null": (["model=null"], r"model=null: a choice is one of dynunet, .*unet"),
    "choice-of-a-sweep": (["-m", "loss=svls,nalc"], r"No loss 'nalc'\. Did you mean 'nacl'"),
    "choice-of-terms": (["loss=compound", "+target=svls", "+term=[ce,dlm]"], r"No term 'dlm'\. Did you mean 'dml'"),
    "type-top": (["seed=many"], r"seed: .*many"),
    "type-list": (["predictions=label"], r"predictions: "),
    "type-float": (["inference.overlap=half"], r"inference\.overlap: expected float, but got 'half'"),
    "type-int": (["inference.batch_size=1.5"], r"inference\.batch_size: expected int, but got 1\.5"),
    "type-list-of-float": (["inference.scales=0.5"], r"inference\.scales: expected Sequence\[float\], but got 0\.5"),
    "type-axes": (["inference=whole_image", "inference.flip_axes=[left]"], r"inference\.flip_axes: expected Sequence\[int\], but got \['left'\]"),
    "type-list-of-int": (["model.channels=[16,wide]"], r"model\.channels: expected Sequence\[int\], but got \[16, 'wide'\]"),
    "type-of-one-number-or-a-list": (["model.strides=two"], r"model\.strides: expected .*int.*, but got 'two'"),
    "type-bool": (["model=dynunet", "model.residual=perhaps"], r"model\.residual: expected bool, but got 'perhaps'"),
    "type-card": (["data.batch_size=four"], r"data\.batch_size: .*four"),
    "value-allowed": (["inference.blending=gausian"], r"inference\.blending: expected one of \('gaussian', 'constant'\), but got 'gausian'"),
    "target-unknown": (["model._target_=densecal.models.unett"], r"model\._target_: cannot import 'densecal\.models\.unett'"),
    "target-no-package": (["loss._target_=mine.Loss"], r"loss\._target_: cannot import 'mine\.Loss'"),
    "target-no-class": (["loss._target_=torch.nn"], r"loss\._target_: expected a class or function, but 'torch\.nn' is a module"),
    "malformed-no-value": (["loss"], r"Cannot read 'loss'\. Settings are written key=value"),
    "malformed-brackets": (["model.channels=[1,2"], r"Cannot read 'model\.channels=\[1,2'"),
    "option": (["--los=svls"], r"Unknown option '--los=svls'\. Settings are written key=value"),
    "sweep-without-m": (["loss=svls,nacl"], r"'loss=svls,nacl' has several values\. Add -m"),
    "sweep-second-job": (["-m", "inference.overlap=0.5,half"], r"inference\.overlap: expected float, but got 'half'"),
    "card-missing": (["data=/nowhere/card.yaml"], r"No data set card /nowhere/card\.yaml"),
}


def test_transforms_of_images_are_changed_left_out_and_added_in_order():
    lines = ["data.pipeline.RandomScale.scale_limit=[-0.25,0.25]", "~data.pipeline.ColorJitter", "+data.pipeline.GaussianBlur.p=0.3"]
    pipeline = composed("data=camvid", *lines).data.pipeline
    assert list(pipeline) == ["RandomScale", "RandomCrop", "HorizontalFlip", "GaussianBlur"]
    assert pipeline.RandomScale == {"scale_limit": [-0.25, 0.25], "p": 1.0}
    assert pipeline.GaussianBlur == {"p": 0.3}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_line_is_refused_with_a_hint(arguments, message, folder):
    with pytest.raises(CommandError, match=message) as error:
        prepare_arguments(arguments, "train")
    assert len(str(error.value).splitlines()) == 1
    assert not list(folder.iterdir())


ACCEPTED = {
    "nothing": [],
    "choices": ["loss=svls", "model=dynunet", "optimizer=sgd", "scheduler=poly", "trainer=ddp", "data=hippocampus"],
    "no-experiment": ["~experiment"],
    "int-for-float": ["inference.overlap=0"],
    "list-for-one": ["model.strides=[2,2,2]"],
    "one-for-list": ["model.strides=2"],
    "null": ["experiment_name=null", "data.spacing=null"],
    "interpolation": ["optimizer.weight_decay=${optimizer.lr}"],
    "hydra": ["hydra.sweep.dir=/tmp/somewhere"],
    "sweep": ["-m", "loss=svls,nacl", "seed=0"],
    "sweep-of-networks": ["-m", "model=unet,unet_resnet18,fpn_tu-convnext_tiny.fb_in1k"],
    "network-with-options": ["model=unet_efficientnet-b0", "model.options.decoder_channels=[64,32,16,8,8]", "model.weights=imagenet"],
    "quoted": ["experiment_name='a, b'"],
    "composition": ["loss=compound", "target=svls", "term=[ce,dml]", "loss.terms.dml.weight=0.5"],
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_right_line_comes_back_as_it_was(arguments, folder):
    assert prepare_arguments(arguments, "train") == arguments
    assert not list(folder.iterdir())


@pytest.mark.parametrize("option", ["--help", "--hydra-help"])
def test_help_is_left_to_hydra(option):
    assert prepare_arguments([option], "train") == [option]


def test_argument_that_the_config_does_not_list_is_added():
    """lightning.Trainer has more arguments than a config should repeat."""
    line = ["optimizer.amsgrad=true", "trainer.limit_train_batches=2", "seed=3"]
    assert prepare_arguments(line, "train") == ["++optimizer.amsgrad=true", "++trainer.limit_train_batches=2", "seed=3"]
    config = composed(*line)
    assert config.optimizer.amsgrad is True
    assert config.trainer.limit_train_batches == 2
    assert build(config.optimizer, "optimizer")([torch.nn.Parameter(torch.ones(1))]).defaults["amsgrad"] is True


def test_added_argument_has_its_type_checked():
    with pytest.raises(CommandError, match=r"optimizer\.amsgrad: expected bool, but got 'perhaps'"):
        prepare_arguments(["optimizer.amsgrad=perhaps"], "train")


def test_setting_of_the_chosen_config_counts():
    """The same key is right or wrong with the choice beside it."""
    assert composed("model=dynunet", "model.filters=[4,8]").model.filters == [4, 8]
    with pytest.raises(CommandError, match=r"Unknown setting 'model\.channels'"):
        prepare_arguments(["model=dynunet", "model.channels=[4,8]"], "train")


def test_every_job_of_a_sweep_is_checked():
    """``sigma`` is a setting of one of the two losses."""
    assert prepare_arguments(["loss=svls", "loss.sigma=2.0"], "train") == ["loss=svls", "loss.sigma=2.0"]
    with pytest.raises(CommandError, match=r"Unknown setting 'loss\.sigma'"):
        prepare_arguments(["-m", "loss=svls,ce", "loss.sigma=2.0"], "train")


def test_every_card_is_a_choice():
    for name in card_names():
        assert composed(f"data={name}").data.classes == load_card(name).classes


CARD = {"classes": ["background", "lesion"], "patch_size": [16, 16, 16], "epochs": 7}


def test_card_of_the_users_own(folder):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(CARD))
    assert prepare_arguments([f"data={path}", "seed=1"], "train") == ["data=mine", "seed=1"]
    config = composed(f"data={path}", "data.epochs=9")
    assert (config.data.name, config.data.epochs, config.data.classes) == ("mine", 9, ["background", "lesion"])
    with pytest.raises(CommandError, match=r"Did you mean 'data\.epochs'"):
        prepare_arguments([f"data={path}", "data.epoch=9"], "train")


def test_wrong_card_of_the_users_own_is_refused(folder):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(CARD | {"patchsize": [8, 8, 8]}))
    with pytest.raises(CommandError, match=r"mine\.yaml: patchsize is not a key of a data set card\. Did you mean 'patch_size'") as error:
        prepare_arguments([f"data={path}"], "train")
    assert len(str(error.value).splitlines()) == 1


# A user's own class.

OWN = """
from torch import nn


class Loss(nn.Module):
    def __init__(self, weight: float = 1.0, num_classes: int = 2):
        super().__init__()
        if weight < 0:
            raise ValueError("weight is negative.\\nSecond line.")
        self.weight, self.num_classes = weight, num_classes


class Open(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("users_own", None)


@pytest.fixture
def own_configs(own_module, tmp_path) -> Path:
    """A folder for ``--config-dir`` with a loss of its own."""
    group = tmp_path / "configs" / "loss"
    group.mkdir(parents=True)
    (group / "own.yaml").write_text("_target_: users_own.Loss\nweight: 2.0\n")
    (group / "open.yaml").write_text("_target_: users_own.Open\n")
    (group / "mistyped.yaml").write_text("_target_: users_own.Loss\nwieght: 2.0\n")
    return group.parent


def test_own_target_on_the_command_line(own_module):
    line = ["loss=ce", "loss._target_=users_own.Open"]
    assert prepare_arguments(line, "train") == line
    assert type(build(composed(*line).loss, "loss")).__name__ == "Open"


def test_own_target_does_not_take_settings_of_the_old_one(own_module):
    """The config of ``ce`` sets what this class does not have."""
    with pytest.raises(CommandError, match=r"loss\.\w+: users_own\.Loss has no such argument\. .*Valid: num_classes, weight"):
        prepare_arguments(["loss=ce", "loss._target_=users_own.Loss"], "train")


def test_own_config_group(own_configs):
    line = ["--config-dir", str(own_configs), "loss=own", "loss.weight=3"]
    assert prepare_arguments(line, "train") == line
    with pytest.raises(CommandError, match=r"Unknown setting 'loss\.wieght'\. Did you mean 'loss\.weight'"):
        prepare_arguments([*line[:3], "loss.wieght=3"], "train")
    with pytest.raises(CommandError, match=r"loss\.weight: expected float, but got 'heavy'"):
        prepare_arguments([*line[:3], "loss.weight=heavy"], "train")
    with pytest.raises(CommandError, match=r"loss\.wieght: users_own\.Loss has no such argument\. Did you mean 'weight'"):
        prepare_arguments([*line[:2], "loss=mistyped"], "train")
    with pytest.raises(CommandError, match=r"No loss 'owm'\. Did you mean 'own'"):
        prepare_arguments([*line[:2], "loss=owm"], "train")


def test_own_schedule_in_place_of_none():
    line = ["+scheduler._target_=torch.optim.lr_scheduler.StepLR", "+scheduler._partial_=true", "+scheduler.step_size=3"]
    assert prepare_arguments(line, "train") == line
    schedule = build(composed(*line).scheduler, "scheduler")(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    assert schedule.step_size == 3


def test_own_term_beside_the_others(own_module):
    line = ["loss=compound", "target=one_hot", "term=[ce]", "+loss.terms.own.weight=0.1", "+loss.terms.own.term._target_=users_own.Loss"]
    assert prepare_arguments(line, "train") == line
    with pytest.raises(CommandError, match=r"loss\.terms\.own\.term\.wieght: users_own\.Loss has no such argument\. Did you mean 'weight'"):
        prepare_arguments([*line, "+loss.terms.own.term.wieght=1"], "train")


def test_own_class_with_open_arguments_takes_any(own_configs):
    line = ["--config-dir", str(own_configs), "loss=open", "+loss.anything=1"]
    assert prepare_arguments(line, "train") == line


# Building.


def node(**content: Any) -> DictConfig:
    made = OmegaConf.create(content)
    assert isinstance(made, DictConfig)
    return made


def test_accepted_keeps_what_the_constructor_takes(own_module):
    assert accepted("users_own.Loss", num_classes=3, ignore_index=255) == {"num_classes": 3}
    assert accepted("torch.nn.CrossEntropyLoss", ignore_index=255, num_classes=3) == {"ignore_index": 255}


def test_build_hands_over_what_is_known(own_module):
    loss = build(node(_target_="users_own.Loss", weight=2.0), "loss", num_classes=5, ignore_index=255)
    assert (loss.weight, loss.num_classes) == (2.0, 5)


def test_build_composes_targets_and_terms():
    loss = build(composed("loss=compound", "target=svls", "term=[ce,dml]", "loss.terms.dml.weight=0.5").loss, "loss", ignore_index=7, num_classes=3)
    assert isinstance(loss, CompoundLoss)
    assert loss.weights == {"ce": 1.0, "dml": 0.5}


def test_build_hands_over_what_is_known_to_parts_that_do_not_say():
    name = "online_label_smoothing"
    loss = build(composed("loss=compound", f"term=[{name}]").loss, "loss", ignore_index=7, num_classes=5)
    assert loss.parts[name].table.shape == (5, 5)
    loss = build(composed("loss=compound", f"term=[{name}]", f"loss.terms.{name}.term.num_classes=4").loss, "loss", ignore_index=7, num_classes=5)
    assert loss.parts[name].table.shape == (4, 4)


def test_build_tells_a_term_the_number_of_classes():
    """It cannot do without; what has a default of its own is left alone."""
    composition = composed("loss=compound", "target=one_hot", "term=[ce,crac]", "loss.terms.crac.weight=${loss.terms.ce.weight}").loss
    loss = build(composition, "loss", ignore_index=7, num_classes=3)
    assert loss.parts["crac"].multiplier.shape == (2, 3)
    assert loss.weights == {"ce": 1.0, "crac": 1.0}
    assert "num_classes" not in composition.terms.crac.term
    given = composed("loss=compound", "target=one_hot", "term=[crac]", "loss.terms.crac.term.num_classes=5").loss
    assert build(given, "loss", num_classes=3).parts["crac"].num_classes == 5


LINEAR = "{_target_:densecal.schedules.Linear,start:0.1,end:0.2}"


@pytest.mark.parametrize(
    ("line", "name", "schedule"),
    [
        (["loss=maxsup"], "maxsup", Linear(0.1, 0.2)),
        (["loss=maxsup", "loss.weight.end=0.3"], "maxsup", Linear(0.1, 0.3)),
        (["loss=maxsup", "loss.weight=0.2"], "maxsup", None),
        (["loss=maxsup", "~loss.weight", "+loss.weight={_target_:densecal.schedules.TwoStage,first:0,second:0.1}"], "maxsup", TwoStage(0, 0.1)),
        (["loss=nacl", f"loss.weight={LINEAR}"], "neighbour", Linear(0.1, 0.2)),
        (["loss=compound", "target=one_hot", "term=[ce,dml]", f"loss.terms.dml.weight={LINEAR}"], "dml", Linear(0.1, 0.2)),
    ],
    ids=["config", "part-of-it", "number-instead", "another", "instead-of-a-number", "in-a-composition"],
)
def test_weight_is_a_number_or_a_schedule(line, name, schedule):
    loss = build(composed(*line).loss, "loss", ignore_index=7)
    assert loss.levels[name].schedule == schedule
    assert float(loss.weights[name]) == pytest.approx(0.2 if schedule is None else schedule(0, 1))


def test_smoothing_is_a_number_or_a_schedule():
    loss = build(composed("loss=label_smoothing", "loss.smoothing={_target_:densecal.schedules.TwoStage,first:0.1,second:0.0}").loss, "loss")
    assert loss.target.level.schedule == TwoStage(0.1, 0.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.weight=heavy", r"loss\.weight: expected float \| densecal\.schedules\.Schedule, but got 'heavy'"),
        (
            "loss.weight={_target_:densecal.schedules.Linear,start:0.1,stop:0.2}",
            r"loss\.weight\.stop: densecal\.schedules\.Linear has no such argument",
        ),
        ("loss.weight={_target_:densecal.schedules.Linear,start:0.1,end:high}", r"loss\.weight\.end: expected float, but got 'high'"),
    ],
)
def test_wrong_schedule_is_refused(setting, message):
    with pytest.raises(CommandError, match=message):
        prepare_arguments(["loss=nacl", setting], "train")


def test_build_gives_plain_lists(own_module):
    """Networks look into them; an OmegaConf list is none."""
    options = build(node(_target_="users_own.Open", sides=[1, 2], inner={"a": [3]}), "loss").options
    assert type(options["sides"]) is list
    assert type(options["inner"]["a"]) is list


def test_build_names_the_setting_that_is_refused(own_module):
    with pytest.raises(CommandError, match=r"^loss: .*weight is negative\.$") as error:
        build(node(_target_="users_own.Loss", weight=-1.0), "loss")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(CommandError, match=r"^inference: .*`overlap` in \[0, 1\), but got 1\.5"):
        build(composed("inference.overlap=1.5").inference, "inference", patch_size=[8, 8, 8])
    with pytest.raises(CommandError, match=r"^inference: .*`flip_axes` .*\(0, 1\), but got \(2,\)\.$"):
        build(composed("inference=whole_image", "inference.flip_axes=[2]").inference, "inference", patch_size=[8, 8], spatial_dims=2)


# The command.


class Body:
    """A command's body that keeps what it was given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.configs: list[DictConfig] = []
        self.given: list[tuple[dict[str, str], list[str]]] = []
        self.lines: list[list[str]] = []
        self.error = error

    def __call__(self, config: DictConfig) -> None:
        self.configs.append(config)
        self.given.append(given_settings())
        self.lines.append(sys.argv[1:])
        if self.error is not None:
            raise self.error


def run(monkeypatch, body: Body, *arguments: str, config_name: str = "train") -> int | str | None:
    """The command's exit status, or text where it ends with one (which is status 1)."""
    monkeypatch.setattr(sys, "argv", ["densecal-train", *arguments])
    try:
        command(config_name, body)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_command_gives_the_body_its_config(monkeypatch, folder):
    body = Body()
    assert run(monkeypatch, body, "loss=svls", "seed=4", "optimizer.amsgrad=true") == 0
    (config,) = body.configs
    assert config.seed == 4
    assert config.optimizer.amsgrad is True
    assert config.loss._target_.endswith("SVLSLoss")
    assert "hydra" not in config
    assert not list(folder.iterdir())
    assert Path.cwd() == folder


def test_command_runs_every_job_of_a_sweep(monkeypatch, folder):
    body = Body()
    assert run(monkeypatch, body, "-m", "loss=svls,ce", "seed=0,1", f"hydra.sweep.dir={folder / 'sweep'}") == 0
    jobs = [(config.loss._target_.rpartition(".")[2], config.seed) for config in body.configs]
    assert jobs == [("SVLSLoss", 0), ("SVLSLoss", 1), ("CrossEntropyLoss", 0), ("CrossEntropyLoss", 1)]
    assert [choices for choices, _ in body.given] == [{"loss": loss} for loss in ("svls", "svls", "ce", "ce")]


def test_given_settings_are_choices_and_keys(monkeypatch):
    body = Body()
    assert run(monkeypatch, body, "loss=svls", "data=hippocampus", "data.epochs=3", "optimizer.amsgrad=true", "seed=1") == 0
    ((choices, keys),) = body.given
    assert choices == {"loss": "svls", "data": "hippocampus"}
    assert sorted(keys) == ["data.epochs", "optimizer.amsgrad", "seed"]


def test_given_settings_of_an_empty_line(monkeypatch):
    body = Body()
    assert run(monkeypatch, body) == 0
    assert body.given == [({}, [])]


def test_further_processes_can_repeat_the_line(monkeypatch, folder, own_configs):
    """Each job's own line, with a user's card by its file and the folder of a user's configs."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(CARD))
    body = Body()
    assert run(monkeypatch, body, "-m", "--config-dir", str(own_configs), f"data={path}", "loss=own,ce", f"hydra.sweep.dir={folder / 'sweep'}") == 0
    assert len(body.lines) == 2
    for line, loss in zip(body.lines, ("own", "ce"), strict=True):
        assert line[:2] == ["--config-dir", str(own_configs)]
        assert sorted(line[2:]) == sorted([f"data={path}", f"loss={loss}"])
        again = Body()
        assert run(monkeypatch, again, *line) == 0
        assert again.configs[0].loss == body.configs[("own", "ce").index(loss)].loss
        assert again.configs[0].data.name == "mine"


@pytest.mark.parametrize("arguments", [["sede=1"], ["loss=slvs"], ["seed=many"], ["--nonsense"], ["data=/nowhere.yaml"]], ids=lambda a: a[0])
def test_wrong_line_ends_the_command_in_one_line(arguments, monkeypatch, folder):
    body = Body()
    text = run(monkeypatch, body, *arguments)
    assert isinstance(text, str)  # Python prints it and exits with status 1
    assert re.fullmatch(r"error: .+", text)
    assert not body.configs
    assert not list(folder.iterdir())


def test_refusal_of_the_body_is_one_line(monkeypatch, capsys, folder):
    assert run(monkeypatch, Body(CommandError("no room for the data."))) == "error: no room for the data."
    assert "Traceback" not in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_missing_settings_are_named_before_the_body_runs(monkeypatch):
    body = Body()
    text = run(monkeypatch, body, "input=a.nii.gz", config_name="predict")
    assert isinstance(text, str)
    assert re.match(r"error: Missing: output, run\. Give each as output=\.\.\.; --help", text)
    assert not body.configs


def test_value_may_be_anything_where_the_key_is_required(monkeypatch):
    body = Body()
    assert run(monkeypatch, body, "run=runs/a", "input=b.nii.gz", "output=c", config_name="predict") == 0
    assert (body.configs[0].run, body.configs[0].input, body.configs[0].output) == ("runs/a", "b.nii.gz", "c")


def test_defect_of_the_body_shows_where_it_is(monkeypatch, capfd):
    """An error of ours is no typing mistake: it keeps its traceback and its status."""
    monkeypatch.setitem(os.environ, "HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, Body(ZeroDivisionError("a defect")))
    monkeypatch.delitem(os.environ, "HYDRA_FULL_ERROR")
    assert run(monkeypatch, Body(ZeroDivisionError("a defect"))) == 1
    assert "a defect" in capfd.readouterr().err


def test_help_lists_the_settings(monkeypatch, capsys):
    assert run(monkeypatch, Body(), "--help") == 0
    assert "monitor_mode: auto" in capsys.readouterr().out


REGIONS = LabelSchema(("car",), 11, None, activation="sigmoid", regions=((8,),))
CLASSES = LabelSchema(("road", "car"), 11, None)


@pytest.mark.parametrize(
    "line",
    [
        ["loss=svls"],
        ["loss=svls", "loss.activation=sigmoid"],
        ["loss=compound", "target=svls", "term=[ce,dml]"],
        ["loss=compound", "target=teacher", "term=kl"],
        ["loss=compound", "target=random_rater", "term=ce"],
        ["loss=distillation"],
        ["loss=aslp"],
    ],
    ids=["preset", "said", "parts", "wrapper", "raters", "teachers", "images"],
)
def test_a_loss_is_told_what_makes_probabilities(line):
    loss = build_loss(composed(*line).loss, "loss", REGIONS, case_ids=UserList(["a"]))
    assert {module.activation for module in loss.modules() if isinstance(module, Target)} == {"sigmoid"}
    assert loss.ignore_index == 11


@pytest.mark.parametrize(
    ("line", "schema", "message"),
    [
        (["loss=ce", "loss.activation=softmax"], REGIONS, "loss.activation: expected sigmoid, which is what the data set says, but got softmax"),
        (["loss=ce", "loss.activation=sigmoid"], CLASSES, "loss.activation: expected softmax, which is what the data set says, but got sigmoid"),
        (["loss=compound", "target=svls", "+loss.target.activation=sigmoid"], CLASSES, "loss.target.activation: expected softmax"),
        (["loss=compound", "term=crac", "+loss.terms.crac.term.num_classes=3"], CLASSES, "loss.terms.crac.term.num_classes: expected 2"),
        (["loss=ce", "loss.ignore_index=255"], CLASSES, "loss.ignore_index: expected 11"),
        (["loss=online_label_smoothing"], REGIONS, "loss: Expected `num_classes` of at least 2, but got 1. A single region"),
    ],
    ids=["softmax", "sigmoid", "target", "num_classes", "ignore_index", "classes-only"],
)
def test_a_loss_that_says_otherwise_is_one_line(line, schema, message):
    with pytest.raises(CommandError, match=re.escape(message)):
        build_loss(composed(*line).loss, "loss", schema)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_regions_of_saved_predictions_are_given_as_a_mapping(command):
    register_settings()
    arguments = prepare_arguments(["predictions=P", "labels=L", "regions={whole: [1, 2], core: [2]}"], command)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        assert hydra.compose(command, arguments).regions == {"whole": [1, 2], "core": [2]}


def test_regions_are_given_as_a_mapping():
    assert composed("data=camvid", "data.regions={car: [car], ground: [road, 4]}").data.regions == {"car": ["car"], "ground": ["road", 4]}
    with pytest.raises(CommandError, match="RandomCrup"):
        composed("data=camvid", "data.pipeline={RandomCrup: {p: 1}}")
