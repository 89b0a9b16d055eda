"""Every config of the commands composes, names only what its constructor takes, and builds; the fixed protocol is what it says."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import lightning as L
import numpy as np
import pytest
import torch
from conftest import ROOT
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from monai.data import MetaTensor
from monai.networks.nets import UNet
from omegaconf import DictConfig, OmegaConf
from torch import nn
from volumes import blob, save

from densecal.cli import train
from densecal.cli.configuration import build, prepare_arguments
from densecal.cli.settings import PredictSettings, SoftLabelSettings, TrainSettings, register_settings
from densecal.cli.training import _build_loss
from densecal.data import DataCard, SegmentationData
from densecal.data.volumes.transforms import ForegroundVoxelsd, prepare_transforms, train_transforms
from densecal.inference import SlidingWindow, WholeImage
from densecal.labels import LabelSchema
from densecal.registry import MODELS
from densecal.tasks import SegmentationTask

GROUPS = ("model", "distillation", "inference", "optimizer", "scheduler", "trainer", "perturbation", "experiment")
FILES = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
CHOICES = [(group, name) for group, name in FILES if group != "experiment"]
EXPERIMENTS = [name for group, name in FILES if group == "experiment"]

KNOWN = {
    "model": {"in_channels": 1, "num_classes": 3, "spatial_dims": 3},
    "inference": {"patch_size": [8, 8, 8], "spatial_dims": 3},
    "perturbation": {"label_target": None, "activation": "softmax", "ignore_index": -100, "case_ids": []},
    "distillation": {"card": None, "trust_config": False},
}
"""What the task knows, and a config does not repeat."""


@functools.cache
def composed(*overrides: str, config_name: str = "train") -> DictConfig:
    register_settings()
    arguments = prepare_arguments(overrides, config_name)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return hydra.compose(config_name, arguments)


def test_every_config_is_tested():
    """``loss``, ``posthoc``, ``target``, ``term`` and ``study`` have their own, and so has the MONAI bundle, whose files end in .yml: no command's help offers them."""
    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "loss", "posthoc", "target", "term", "study", "monai_bundle"}
    assert not list((ROOT / "configs" / "monai_bundle").rglob("*.yaml"))
    assert all(any(group == tested for tested, _ in FILES) for group in GROUPS)
    assert {name for group, name in FILES if group == "model"} == set(MODELS.list())


@pytest.mark.parametrize(
    ("group", "name"),
    FILES,
    ids=[f"{group}-{name}" for group, name in FILES],
)
def test_config_composes_without_anything_missing(group, name):
    config = composed(f"{group}={name}")
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{group}-{name}" for group, name in CHOICES])
def test_config_lists_arguments_of_its_constructor(group, name):
    node = composed(f"{group}={name}")[group]
    if node is None:
        assert (group, name) == ("scheduler", "none")
        return
    target = hydra.utils.get_object(node["_target_"])
    given = {key for key in node if not key.startswith("_")}
    takes = set(inspect.signature(target).parameters)
    assert given <= takes
    if target.__module__.startswith("densecal"):  # of one's own, every argument that a user may set
        assert given == takes - set(KNOWN.get(group, {}))


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "perturbation"])
def test_perturbation_config_goes_around_the_target_of_a_loss(name):
    """Every number is the constructor's default; what the config holds of rules and schedules, too."""
    config = composed(f"perturbation={name}", "loss=svls")
    splits = {"train": [SimpleNamespace(id=case) for case in ("a", "b")], "val": [SimpleNamespace(id="c")]}
    loss = _build_loss(config, SimpleNamespace(splits=splits, schema=LabelSchema(("background", "left", "right"), ignore_index=7)))
    assert type(loss.target.label_target).__name__ == "SVLSTarget"
    assert (loss.ignore_index, loss.target.label_target.ignore_index) == (7, 7)
    assert getattr(loss.target, "case_ids", ("a", "b")) == ("a", "b")
    parameters = inspect.signature(type(loss.target)).parameters
    for key, value in config.perturbation.items():
        if isinstance(value, DictConfig):
            made = hydra.utils.instantiate(value)
            assert set(value) - {"_target_"} == set(inspect.signature(type(made)).parameters)
            assert made == type(made)() if parameters[key].default is None else made == parameters[key].default
        elif not key.startswith("_") and (name, key) not in {("loss_smoothing", "beta"), ("confidence_smoothing", "beta")}:
            assert value == parameters[key].default, key


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "model"])
def test_model_config_builds_a_network(name):
    size = (64, 32) if name == "smp" else (64, 32, 32)
    model = build(composed(f"model={name}").model, "model", **KNOWN["model"] | {"spatial_dims": len(size)}).eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, *size))
    assert logits.shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("override", "holds"),
    [
        ("model.channels=[4,8,24]", lambda model: {4, 8, 24} <= {m.out_channels for m in model.modules() if isinstance(m, nn.Conv3d)}),
        ("model.norm=batch", lambda model: any(isinstance(m, nn.BatchNorm3d) for m in model.modules())),
        ("model.dropout=0.4", lambda model: {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.4}),
        ("model.strides=[2,1,2]", lambda model: sum(m.stride == (2, 2, 2) for m in model.modules() if isinstance(m, nn.Conv3d)) == 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_model_settings_reach_the_network(override, holds):
    assert not holds(build(composed().model, "model", **KNOWN["model"]))
    assert holds(build(composed(override).model, "model", **KNOWN["model"]))


def test_network_pair_is_smp_with_the_options_of_its_architecture():
    pair, spelled_out = composed("model=pan_tu-resnet10t.c3_in1k").model, composed("model=smp").model
    assert OmegaConf.to_container(pair) == OmegaConf.to_container(spelled_out) | {
        "architecture": "pan",
        "encoder": "tu-resnet10t.c3_in1k",
        "options": {"encoder_output_stride": 16, "decoder_channels": 32, "decoder_interpolation": "bilinear"},
    }


@pytest.mark.parametrize("pair", ["unet_efficientnet-b0", "fpn_mit_b0", "segformer_timm-tf_efficientnet_lite0"])
def test_network_pair_builds_a_network(pair):
    network = build(composed(f"model={pair}", "model.auxiliary_head=true").model, "model", **KNOWN["model"] | {"spatial_dims": 2})
    assert [output.shape for output in network(torch.zeros(2, 1, 64, 32))] == [(2, 3, 64, 32)] * 2


def test_network_pair_may_be_the_choice_of_an_experiment(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: unet_resnet18\nmodel:\n  weights: imagenet\n"
    )
    register_settings()
    arguments = prepare_arguments(["--config-dir", str(tmp_path), "experiment=mine", "model.options.decoder_channels=[64,32,16,8,8]"], "train")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        config = hydra.compose("train", [*arguments[2:], f"hydra.searchpath=[file://{tmp_path}]"])
    assert (config.model.encoder, config.model.weights, config.model.options.decoder_channels[0]) == ("resnet18", "imagenet", 64)


def test_inference_config_builds_a_window():
    window = build(composed("inference.overlap=0.25", "inference.blending=constant").inference, "inference", patch_size=[8, 8, 4])
    assert isinstance(window, SlidingWindow)
    assert (window.patch_size, window.overlap, window.blending) == ((8, 8, 4), 0.25, "constant")
    assert (window.flip_axes, window.scales) == ((), (1.0,))


def test_inference_config_of_whole_images_builds():
    settings = ["inference=whole_image", "inference.multiple=[16,8]", "inference.flip_axes=[1]", "inference.scales=[0.5,1,1.5]"]
    window = build(composed(*settings).inference, "inference", patch_size=[8, 8], spatial_dims=2)
    assert isinstance(window, WholeImage)
    assert (window.spatial_dims, window.multiple, window.flip_axes, window.scales) == (2, (16, 8), (1,), (0.5, 1, 1.5))


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "optimizer"])
def test_optimizer_config_takes_a_step(name):
    weight = nn.Parameter(torch.ones(1))
    optimizer = build(composed(f"optimizer={name}", "optimizer.lr=0.125").optimizer, "optimizer")([weight])
    assert type(optimizer).__name__.lower() == name
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]
    weight.square().sum().backward()
    optimizer.step()
    assert weight.item() < 1


STEPS = 10
LENGTH = {"cosine": "T_max", "poly": "total_iters", "onecycle": "total_steps"}


@pytest.mark.parametrize("name", sorted({name for group, name in FILES if group == "scheduler"} - {"none"}))
def test_scheduler_config_ends_near_zero(name):
    """Whatever a schedule does in between, at the end of the training it has come down."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01)
    scheduler = build(composed(f"scheduler={name}", f"scheduler.{LENGTH[name]}={STEPS}").scheduler, "scheduler")(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(STEPS - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] < 0.0015
    assert rates[STEPS // 2 :] == sorted(rates[STEPS // 2 :], reverse=True)


def test_scheduler_none_is_a_constant_rate():
    assert composed("scheduler=none").scheduler is None
    assert composed().scheduler is None


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "trainer"])
def test_trainer_config_builds_a_trainer(name):
    trainer = build(
        composed(f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1").trainer,
        "trainer",
        max_epochs=7,
        logger=False,
        enable_checkpointing=False,
    )
    assert isinstance(trainer, L.Trainer)
    assert trainer.max_epochs == 7
    assert trainer.num_nodes == 1
    assert type(trainer.strategy).__name__ == {"default": "SingleDeviceStrategy", "ddp": "DDPStrategy"}[name]


@pytest.mark.parametrize(("config_name", "settings"), [("train", TrainSettings), ("predict", PredictSettings), ("soft_labels", SoftLabelSettings)])
def test_settings_are_those_of_the_config(config_name, settings):
    """A key in one of them alone would be one that a command does not read, or no user can find."""
    register_settings()
    prepare_arguments([], config_name)
    listed = OmegaConf.load(ROOT / "configs" / f"{config_name}.yaml")
    chosen = {key for entry in listed.pop("defaults") if isinstance(entry, DictConfig) for key in entry}
    declared = set(settings.__annotations__)
    assert set(listed) - {"hydra"} <= declared
    assert declared <= set(listed) | chosen


# Recipes.


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recipe_tells_its_command(name):
    lines = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert any(line.startswith(f"#   tools/train.py experiment={name} ") for line in lines)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recipe_makes_its_card_and_loss(name):
    config = composed(f"experiment={name}")
    assert isinstance(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data)), DataCard)
    build(config.loss, "loss", ignore_index=255, num_classes=3, case_ids=["a"])


@pytest.mark.parametrize(
    "name", ["hippocampus_small", "camvid_small", "camvid_binary_small", "mbls_pascal_voc", "nacl_pascal_voc", "nacl_cityscapes"]
)
def test_recipe_for_comparing_takes_any_loss(name):
    assert composed(f"experiment={name}", "loss=focal").loss == composed("loss=focal").loss


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)


def optimizer_and_schedule(name: str) -> tuple[torch.optim.Optimizer, Any]:
    """Those of a recipe that counts its own steps, for a network of two parts."""
    config = composed(f"experiment={name}")
    task = SegmentationTask(
        TwoParts(),
        nn.CrossEntropyLoss(),
        LabelSchema(["a", "b", "c"]),
        SlidingWindow((8, 8)),
        optimizer=build(config.optimizer, "optimizer"),
        scheduler=build(config.scheduler, "scheduler"),
        encoder_lr_ratio=config.encoder_lr_ratio,
        max_steps=config.trainer.max_steps if config.trainer.max_steps != -1 else 30 * 956,
    )
    task.trainer = L.Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False)
    made = task.configure_optimizers()
    made["optimizer"].step()
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


@pytest.mark.parametrize("name", ["jml_cityscapes", "jml_pascal_voc", "jml_bls_cityscapes", "jml_bls_pascal_voc"])
def test_recipe_of_jml_has_the_published_rates(name):
    """6e-5 times i / 400 up to iteration 400 (at least 1e-6), then times the share of the 40,000 - 400 that is left; ten times that outside the encoder."""
    optimizer, schedule = optimizer_and_schedule(name)
    for i in (0, 100, 200, 400, 20_200, 30_100, 39_999):
        schedule.last_epoch = i - 1
        schedule.step()
        expected = 6e-5 * (max(1 / 60, i / 400) if i < 400 else (40_000 - i) / 39_600)
        head, encoder = (group["lr"] for group in optimizer.param_groups)
        assert encoder == pytest.approx(expected, abs=1e-6)
        assert head == pytest.approx(10 * expected, abs=1e-5)


@pytest.mark.parametrize("name", ["aslp_salient_objects"])
def test_recipe_of_aslp_has_the_published_rates(name):
    """Multiplied by 0.95 ** (e // 10) after each epoch e of 956 steps, counted from 1."""
    optimizer, schedule = optimizer_and_schedule(name)
    expected, rate = [], 2.5e-5
    for epoch in range(1, 31):
        expected += [rate] * 956
        rate *= 0.95 ** (epoch // 10)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == pytest.approx(expected)


# The fixed protocol.


@pytest.fixture(scope="module")
def hippocampi(tmp_path_factory) -> Path:
    """A set in the layout of Task04_Hippocampus: two volumes of each of eight persons, sides of even difference to the patch."""
    root = tmp_path_factory.mktemp("Task04_Hippocampus")
    listing = []
    for n in range(1, 17):
        name = f"hippocampus_{n:03}.nii.gz"
        image, label = blob((36, 50, 34) if n % 2 else (50, 66, 52), seed=n)
        save(root / "imagesTr" / name, 1000 * image, np.eye(4))
        save(root / "labelsTr" / name, label, np.eye(4))
        listing.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (root / "dataset.json").write_text(json.dumps({"training": listing}))
    return root


@pytest.fixture(scope="module")
def protocol(hippocampi, tmp_path_factory) -> dict[str, Any]:
    """Trainer, task and data of ``densecal-train experiment=hippocampus_small``, as they are when training begins."""
    output = tmp_path_factory.mktemp("runs")
    made: dict[str, Any] = {"output": output}

    def fit(trainer, task, datamodule, **_):
        made.update(trainer=trainer, task=task, data=datamodule)
        raise SystemExit

    arguments = ["experiment=hippocampus_small", "loss=svls", f"data.root={hippocampi}", f"output_dir={output}", "trainer.accelerator=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", fit)
        patch.setattr(sys, "argv", ["densecal-train", *arguments, "data.num_workers=0"])
        with pytest.raises(SystemExit) as stopped:
            train.main()
    assert stopped.value.code is None, stopped.value
    made["config"] = OmegaConf.load(next(output.glob("*/*/config.yaml")))
    return made


def test_protocol_names_its_run(protocol):
    assert [path.parent.parent.name for path in protocol["output"].glob("*/*/config.yaml")] == ["hippocampus_small"]


def test_protocol_network(protocol):
    """MONAI's U-Net: 16, 32, 64 and 128 features, strides of 2, instance normalisation, no residual units, no dropout."""
    task: SegmentationTask = protocol["task"]
    expected = UNet(3, 1, 3, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=0, norm="INSTANCE", dropout=0.0)
    assert type(task.model) is UNet
    assert repr(task.model) == repr(expected)
    task.model.eval()
    expected.load_state_dict(task.model.state_dict())
    image = torch.randn(1, 1, 48, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(task.model(image), expected.eval()(image), rtol=0, atol=0)


def test_protocol_optimizer(protocol):
    """Adam with torch's defaults: 0.001, no weight decay; the rate stays."""
    optimizer = protocol["task"].configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults == torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0).defaults
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(p.numel() for p in protocol["task"].parameters())


def test_protocol_length(protocol):
    """60 epochs, no early stopping, the weights of the last epoch."""
    trainer: L.Trainer = protocol["trainer"]
    assert trainer.max_epochs == 60
    assert trainer.max_steps == -1
    assert trainer.limit_train_batches == 1.0
    assert trainer.accumulate_grad_batches == 1
    assert trainer.gradient_clip_val is None
    assert str(trainer.precision) == "32-true"
    assert not [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]
    assert {callback.filename for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)} == {"best", "last"}
    assert protocol["config"].evaluate == "last"


def test_protocol_batches(protocol):
    """4 patches of 48 x 64 x 48, each volume once in an epoch."""
    data: SegmentationData = protocol["data"]
    batches = list(data.train_dataloader())
    train_cases = [case.id for case in data.splits["train"]]
    assert [tuple(batch["image"].shape) for batch in batches[:-1]] == [(4, 1, 48, 64, 48)] * (len(batches) - 1)
    assert sorted(case for batch in batches for case in batch["case_id"]) == sorted(train_cases)
    assert {batch["label"].shape[1:] for batch in batches} == {(1, 48, 64, 48)}


def cropped_or_padded(volume: np.ndarray, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """Voxel by voxel along each axis, about the centre; sides differ by even numbers."""
    for axis, size in enumerate(shape):
        difference = size - volume.shape[axis]
        assert difference % 2 == 0
        places = [position - difference // 2 for position in range(size)]
        slabs = [volume.take(p, axis) if 0 <= p < volume.shape[axis] else np.full_like(volume.take(0, axis), fill) for p in places]
        volume = np.stack(slabs, axis)
    return volume


@pytest.mark.parametrize("number", [1, 2], ids=["padded", "cropped"])
def test_protocol_patches(number, protocol, hippocampi):
    """Z-scored, cropped or padded about the centre to 48 x 64 x 48, the padding without a label, nothing random."""
    image, label = blob((36, 50, 34) if number % 2 else (50, 66, 52), seed=number)
    card: DataCard = protocol["data"].card
    name = f"hippocampus_{number:03}.nii.gz"
    prepared = prepare_transforms(card)({"image": [str(hippocampi / "imagesTr" / name)], "label": str(hippocampi / "labelsTr" / name)})
    patches = []
    for seed in (0, 1):
        transform = train_transforms(card)
        transform.set_random_state(seed)
        patches.append(transform(ForegroundVoxelsd(card)(prepared)))
    assert torch.equal(patches[0]["image"], patches[1]["image"])
    assert torch.equal(patches[0]["label"], patches[1]["label"])
    raw = 1000 * image.astype(np.float64)
    zscore = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(patches[0]["image"][0].numpy(), cropped_or_padded(zscore, (48, 64, 48), 0.0), atol=2e-4)
    expected = cropped_or_padded(label.astype(np.int64), (48, 64, 48), protocol["task"].schema.ignore_index)
    np.testing.assert_array_equal(patches[0]["label"][0].numpy(), expected)


def test_protocol_metrics(protocol):
    """15 bins; the near-structure region reaches 3 voxels along the axes."""
    evaluation = protocol["task"].val_evaluation
    label = torch.zeros(1, 1, 15, 15, 15, dtype=torch.long)
    label[0, 0, 7, 7, 7] = 1
    probs = torch.full((1, 3, 15, 15, 15), 1 / 3)
    evaluation.reset()
    evaluation.update(probs, label, torch.tensor([0]))
    result = evaluation.compute()
    evaluation.reset()
    assert len(result.bins["all"]["top_label"]["count"]) == 15
    assert result.pooled["foreground"]["num_voxels"] == 63  # the ball |x| + |y| + |z| <= 3: 1 + 6 + 18 + 38
    assert protocol["config"].num_bins == 15
    assert protocol["config"].data.foreground_radius == 3


def test_protocol_validates_whole_volumes(protocol):
    assert protocol["task"].window.patch_size == (48, 64, 48)
    batch = next(iter(protocol["data"].val_dataloader()))
    assert tuple(batch["image"].shape[2:]) in {(36, 50, 34), (50, 66, 52)}
    assert not isinstance(batch["image"], MetaTensor)


def test_protocol_is_one_for_every_loss():
    """What is compared is the loss alone."""
    nodes = []
    for loss in ("dice_ce", "svls"):
        config = OmegaConf.to_container(composed("experiment=hippocampus_small", f"loss={loss}"))
        config.pop("loss")
        nodes.append(config)
    assert nodes[0] == nodes[1]
