"""Losses in nnU-Net's trainers, with a stand-in for nnU-Net that does what its trainer does in the same order; ``examples/nnunet_hippocampus.py`` runs the real one."""

import importlib.util
import inspect
import runpy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from densecal.cli.configuration import CommandError
from densecal.integrations.nnunet import DensecalTrainer, NNUNetLoss, lookup_folder, trainer_class, trainer_settings
from densecal.labels import LabelSchema
from densecal.losses import CrossEntropyLoss, DiceCELoss, SVLSLoss
from densecal.losses.deep_supervision import downsample_nearest

pytest.importorskip("hydra")

LOSSES = sorted(path.stem for path in (ROOT / "configs" / "loss").glob("*.yaml"))
CLASSES = {"background": 0, "anterior": 1, "posterior": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
KEYS = ("a", "b", "c", "d")


class Network(nn.Module):
    """Two outputs, the second at half the resolution."""

    def __init__(self, channels):
        super().__init__()
        self.layer = nn.Conv2d(1, channels, 1)

    def forward(self, image):
        output = self.layer(image)
        return [output, nn.functional.avg_pool2d(output, 2)]


class Logger:
    def __init__(self):
        self.values = {}

    def log(self, key, value, epoch):
        self.values.setdefault(key, []).append(value)

    def get_value(self, key, step):
        return self.values[key][step]


class nnUNetTrainer:
    """The parts of nnU-Net's trainer that a loss meets."""

    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        self.my_init_kwargs = {}
        for k in inspect.signature(self.__init__).parameters:
            self.my_init_kwargs[k] = locals()[k]
        labels = dataset_json["labels"]
        regions = [value for name, value in labels.items() if name != "ignore" and value != 0]
        self.label_manager = SimpleNamespace(
            has_regions=any(isinstance(value, list) for value in labels.values()),
            ignore_label=labels.get("ignore"),
            has_ignore_label="ignore" in labels,
        )
        self.heads = len(regions) if self.label_manager.has_regions else len(set(labels) - {"ignore"})
        self.configuration_manager = SimpleNamespace(patch_size=[4, 4], spacing=[1.0, 2.0])
        self.output_folder_base, self.dataset_json, self.device, self.fold = plans["folder"], dataset_json, device, fold
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1000, 250, 50
        self.current_epoch, self.local_rank, self.was_initialized = 0, 0, False
        self.loss, self.logger, self.lines = None, Logger(), []

    def initialize(self):
        self.network = Network(self.heads)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
        self.loss = self._build_loss()
        self.was_initialized = True

    def do_split(self):
        return list(KEYS[:2]), list(KEYS[2:])

    def _build_loss(self):
        return SimpleNamespace(weight_factors=(1.0, 0.0))

    def print_to_log_file(self, *args, **kwargs):
        self.lines.append(" ".join(str(arg) for arg in args))

    def on_train_start(self):
        pass

    def on_train_epoch_start(self):
        self.network.train()

    def train_step(self, batch):
        self.optimizer.zero_grad()
        value = self.loss(self.network(batch["data"]), batch["target"])
        value.backward()
        self.optimizer.step()
        return {"loss": value.item()}

    def on_validation_epoch_start(self):
        self.network.eval()

    def validation_step(self, batch):
        return {"loss": self.loss(self.network(batch["data"]), batch["target"]).item()}

    def on_validation_epoch_end(self, val_outputs):
        self.logger.log("val_losses", np.mean([output["loss"] for output in val_outputs]), self.current_epoch)
        self.logger.log("mean_fg_dice", np.float32(0.5), self.current_epoch)

    def save_checkpoint(self, filename):
        state = {"network": self.network.state_dict(), "epoch": self.current_epoch, "init_args": self.my_init_kwargs}
        torch.save(state, filename)

    def load_checkpoint(self, filename):
        if not self.was_initialized:
            self.initialize()
        checkpoint = torch.load(filename, weights_only=False)
        self.network.load_state_dict(checkpoint["network"])
        self.current_epoch, self.my_init_kwargs = checkpoint["epoch"], checkpoint["init_args"]

    def batches(self, keys, number, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(number):
            label = torch.randint(0, 3, (2, 1, 4, 4), generator=generator, dtype=torch.int16)
            if self.label_manager.has_regions:
                ignored = torch.rand(2, 1, 4, 4, generator=generator) < 0.2
                label = torch.cat([label > 0, label == 2, ignored], dim=1)
            target = [label, downsample_nearest(label, (2, 2))]
            yield {"data": torch.randn(2, 1, 4, 4, generator=generator), "target": target, "keys": np.array(keys)}

    def run_training(self):
        if not self.was_initialized:
            self.initialize()
        self.on_train_start()
        for epoch in range(self.current_epoch, self.num_epochs):
            self.on_train_epoch_start()
            for batch in self.batches(KEYS[:2], self.num_iterations_per_epoch, epoch):
                self.train_step(batch)
            with torch.no_grad():
                self.on_validation_epoch_start()
                outputs = [self.validation_step(batch) for batch in self.batches(KEYS[2:], self.num_val_iterations_per_epoch, 100 + epoch)]
                self.on_validation_epoch_end(outputs)
            self.current_epoch += 1


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Make a trainer by its name and settings, as nnUNetv2_train would."""
    known = {"nnUNetTrainer": nnUNetTrainer, "nnUNetTrainerDA5": type("nnUNetTrainerDA5", (nnUNetTrainer,), {})}
    module = ModuleType("nnunetv2.utilities.find_objects")
    module.recursive_find_trainer_class_by_name = known.__getitem__
    for name in ("nnunetv2", "nnunetv2.utilities"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def made(name="nnUNetTrainerDensecal", settings="", labels=CLASSES, fold=0):
        monkeypatch.setenv("DENSECAL_NNUNET", f"epochs=2 iterations=2 val_iterations=1 {settings}")
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return trainer_class(name)({"folder": str(folder)}, "2d", fold, {"labels": labels}, torch.device("cpu"))

    return made


def test_loss_is_the_weighted_sum_over_resolutions():
    label = torch.randint(0, 3, (2, 1, 8, 8, 8))
    outputs = [torch.randn(2, 3, side, side, side) for side in (8, 4, 2)]
    targets = [downsample_nearest(label, (side,) * 3) for side in (8, 4, 2)]
    loss = NNUNetLoss(DiceCELoss(), LabelSchema(tuple(CLASSES)), spatial_dims=3, weights=[0.6, 0.4, 0.0])
    expected = 0.6 * DiceCELoss()(outputs[0], targets[0]) + 0.4 * DiceCELoss()(outputs[1], targets[1])
    outputs[2] *= torch.nan  # of no weight: not looked at
    assert loss(outputs, targets) == pytest.approx(expected.item())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_ignored_voxels_have_no_gradient_and_no_say(activation):
    label = torch.randint(0, 3, (1, 1, 6, 6))
    ignored = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    ignored[..., 2:4, 2:4] = True
    if activation == "softmax":
        schema, target = LabelSchema(tuple(CLASSES), 3), label.masked_fill(ignored, 3)
    else:
        schema = LabelSchema(("whole", "core"), background=None, activation="sigmoid")
        target = torch.cat([label > 0, label == 2, ignored], dim=1)
    inner = SVLSLoss(activation=activation, ignore_index=schema.ignore_index)
    loss = NNUNetLoss(inner, schema, spatial_dims=2, ignore_channel=activation == "sigmoid")
    logits = torch.randn(1, schema.num_classes, 6, 6, requires_grad=True)
    value = loss(logits, target)
    value.backward()
    lost = ignored.expand_as(logits)
    assert (logits.grad[lost] == 0).all()
    assert (logits.grad[~lost] != 0).all()
    if activation == "sigmoid":
        target[:, :2] ^= ignored
        assert loss(logits, target) == value


@pytest.mark.parametrize(
    ("name", "labels"),
    [(name, CLASSES) for name in LOSSES] + [(name, REGIONS) for name in ("svls", "jml", "aslp", "crac", "online_label_smoothing")],
    ids=[f"{name}-classes" for name in LOSSES] + ["svls-regions", "jml-regions", "aslp-regions", "crac-regions", "online_label_smoothing-regions"],
)
def test_every_loss_trains(name, labels, make):
    trainer = make(f"nnUNetTrainerDensecal_{name}", labels=labels)
    if name == "distillation":
        with pytest.raises(CommandError, match="loss: needs 'teacher_logits', which nnU-Net's batches do not hold"):
            trainer.run_training()
    elif name == "online_label_smoothing" and labels is REGIONS:
        with pytest.raises(CommandError, match="loss: Expected a loss with activation=sigmoid, but got softmax in its OneHotTarget"):
            trainer.run_training()
    else:
        trainer.initialize()
        before = trainer.network.layer.weight.detach().clone()
        trainer.run_training()
        assert np.isfinite(trainer.logger.values["val_losses"]).all()
        assert not torch.equal(trainer.network.layer.weight, before)


def test_name_says_the_trainer_to_build_on_and_the_loss(make):
    trainer = make("nnUNetTrainerDA5Densecal_svls-wide", "loss.sigma=3")
    assert [base.__name__ for base in type(trainer).__mro__[:3]] == ["nnUNetTrainerDA5Densecal_svls-wide", "DensecalTrainer", "nnUNetTrainerDA5"]
    trainer.initialize()
    assert isinstance(trainer.loss.loss.loss, SVLSLoss)
    assert trainer.loss.loss.loss.target.sigma == 3
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (2, 2, 1)


def test_a_trainer_keeps_its_length_where_no_setting_gives_one(make, monkeypatch):
    cls = type(make())
    monkeypatch.delenv("DENSECAL_NNUNET")
    trainer = cls({"folder": ""}, "2d", 0, {"labels": CLASSES}, torch.device("cpu"))
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (1000, 250, 50)


def test_names_of_others_are_not_ours():
    with pytest.raises(AttributeError, match="nnUNetTrainer_5epochs"):
        trainer_class("nnUNetTrainer_5epochs")


def test_unknown_loss_in_a_name_is_one_line_with_the_nearest():
    with pytest.raises(ValueError, match=r"^-tr nnUNetTrainerDensecal_slvs: no loss 'slvs'\. Did you mean 'svls'"):
        trainer_class("nnUNetTrainerDensecal_slvs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("loss.sigm=2", r"DENSECAL_NNUNET: Unknown setting 'loss.sigm'\. Did you mean 'loss.sigma'"),
        ("loss=nacl", r"DENSECAL_NNUNET: loss=nacl, but the name of the trainer says svls"),
        ("epochs=0", r"DENSECAL_NNUNET: epochs: expected 1 or more, or null, but got 0"),
        ("epochs=1,2 -m", r"DENSECAL_NNUNET: -m: expected settings, key=value, and no option but --config-dir"),
        ("'epochs=1", r"DENSECAL_NNUNET: No closing quotation"),
    ],
    ids=["typo", "two-losses", "no-epochs", "sweep", "quote"],
)
def test_bad_settings_are_one_line(settings, message, monkeypatch):
    monkeypatch.setenv("DENSECAL_NNUNET", settings)
    with pytest.raises(CommandError, match=message) as error:
        trainer_settings("svls")
    assert "\n" not in str(error.value)


def test_settings_compose_a_loss_from_target_and_terms(make):
    trainer = make("nnUNetTrainerDensecal-mix", "loss=compound target=svls term=[ce,dml] loss.terms.dml.weight=0.75")
    trainer.initialize()
    assert trainer.loss.loss.loss.weights == {"ce": 1.0, "dml": 0.75}


def test_loss_of_ones_own_comes_from_a_folder_of_configs(make, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("_target_: densecal.losses.SVLSLoss\nsigma: 2.5\n")
    trainer = make("nnUNetTrainerDensecal_mine", f"--config-dir {tmp_path}")
    trainer.initialize()
    assert trainer.loss.loss.loss.target.sigma == 2.5


def test_loss_is_told_of_epochs_steps_and_validations(make, monkeypatch):
    told = []
    for hook in ("on_epoch", "on_step", "on_validation", "on_epoch_end"):
        monkeypatch.setattr(CrossEntropyLoss, hook, lambda self, *args, hook=hook: told.append((hook, *args)))
    make("nnUNetTrainerDensecal_ce").run_training()
    names = ["on_epoch", "on_step", "on_step", "on_validation", "on_epoch_end"]
    assert [name for name, *_ in told] == 2 * names
    assert [args for name, *args in told if name == "on_epoch"] == [[0, 2], [1, 2]]
    assert [args for name, *args in told if name == "on_step"] == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert all(set(stats) == {"loss", "dice"} for name, *args in told for stats in args if name == "on_validation")


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_loss_that_follows_it_is_told_the_validation_accuracy(labels, make, monkeypatch):
    trainer = make("nnUNetTrainerDensecal_aslp", labels=labels)
    trainer.initialize()
    told = []
    monkeypatch.setattr(trainer.loss.loss, "on_validation", told.append)
    batch = next(trainer.batches(KEYS[2:], 1, 7))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(batch)])
        logits = trainer.network(batch["data"])[0]
    label = batch["target"][0]
    if labels is CLASSES:
        expected = np.mean([logits[n, :, i, j].argmax() == label[n, 0, i, j] for n in range(2) for i in range(4) for j in range(4)])
    else:
        voxels = [(n, i, j) for n in range(2) for i in range(4) for j in range(4) if not label[n, 2, i, j]]
        expected = np.mean([(logits[n, c, i, j] > 0) == label[n, c, i, j] for n, i, j in voxels for c in range(2)])
    assert told[0]["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_checkpoint_holds_settings_and_what_the_loss_has_learned(make, tmp_path):
    first = make("nnUNetTrainerDensecal_crac")
    first.run_training()
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert "densecal" not in first.my_init_kwargs
    second = make("nnUNetTrainerDensecal_crac")
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    fresh = {name: value.clone() for name, value in second.loss.state_dict().items()}
    assert second.current_epoch == 2
    second.run_training()
    learned = first.loss.state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in learned.items())
    assert all(torch.equal(second.loss.state_dict()[name], value) for name, value in learned.items())
    assert "densecal" not in second.my_init_kwargs


def test_training_does_not_go_on_with_another_loss(make, tmp_path):
    first = make("nnUNetTrainerDensecal_svls")
    first.run_training()
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    second = make("nnUNetTrainerDensecal_svls", "loss.sigma=2")
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))  # to validate with it, the loss does not matter
    (tmp_path / "nnUNetTrainerDensecal_svls" / "densecal.yaml").unlink()
    with pytest.raises(ValueError, match=r"^the checkpoint: was trained with loss\.sigma=1\.0, but DENSECAL_NNUNET says 2\. Give the same settings"):
        second.run_training()


def test_folds_of_a_model_have_the_same_settings(make):
    make("nnUNetTrainerDensecal_svls", fold=0).run_training()
    make("nnUNetTrainerDensecal_svls", fold=1).run_training()
    with pytest.raises(ValueError, match=r"densecal\.yaml: was trained with loss\.sigma=1\.0, but DENSECAL_NNUNET says 2\. "):
        make("nnUNetTrainerDensecal_svls", "loss.sigma=2", fold=2).run_training()
    make("nnUNetTrainerDensecal_svls-wide", "loss.sigma=2", fold=2).run_training()


def test_side_inputs_are_those_of_the_batch(make):
    trainer = make("nnUNetTrainerDensecal_svls", "loss.unit=mm")
    trainer.initialize()
    batch = next(trainer.batches(KEYS[:2], 1, 0))
    assert trainer._side_inputs(batch)["spacing"].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    trainer.run_training()


def test_loss_with_parameters_is_refused(make, tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "learned.yaml").write_text("_target_: torch.nn.Conv2d\nin_channels: 1\nout_channels: 1\nkernel_size: 1\n")
    with pytest.raises(CommandError, match="loss: Conv2d has parameters"):
        make("nnUNetTrainerDensecal_learned", f"--config-dir {tmp_path}").initialize()


def test_folder_that_nnunet_looks_in_holds_the_trainers(make, capsys):
    """As nnU-Net imports it: the module alone, by its path."""
    runpy.run_module("densecal.integrations.nnunet", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(lookup_folder())
    (file,) = lookup_folder().glob("*.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make()
    assert issubclass(module.nnUNetTrainerDensecal_nacl, DensecalTrainer)
    assert not hasattr(module, "nnUNetTrainer")
