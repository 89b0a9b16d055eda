"""What a config that came with somebody's run may name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_command
from conftest import ROOT
from omegaconf import OmegaConf
from teachers import write_teacher
from volumes import blob, save

from densecal.instantiation import UntrustedConfig, check_trusted
from densecal.tasks import OnlineTeachers

KNOWN = [
    "densecal.models.unet",
    "densecal.losses.presets.SVLSLoss",
    "densecal.tasks.CachedTeachers",
    "torch.nn.Conv2d",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.OneCycleLR",
    "monai.networks.nets.UNet",
    "monai.losses.DiceLoss",
    "segmentation_models_pytorch.Unet",
    "lightning.Trainer",
]
UNKNOWN = [
    "os.system",
    "subprocess.run",
    "builtins.exec",
    "torch.load",
    "torch.hub.load",
    "torch.nn.init.torch.load",  # a good beginning
    "torch.nn.functional.conv2d",  # no class
    "torchx.nn.Conv2d",
    "densecal.inference.predictor.hydra.utils.call",
    "densecal.inference.predictor.Predictor.from_run",  # which could be told to trust
    "densecal.files.write_atomically",
    "densecal.models",
    "segmentation_models_pytorch.from_pretrained",
    "monai.networks.utils.torch.load",
    "lightning.pytorch.Trainer.fit",
    "users_own.Network",
    None,
]


@pytest.mark.parametrize("target", KNOWN)
def test_networks_losses_and_optimizers_are_known(target):
    check_trusted({"model": {"_target_": target}}, "run")


@pytest.mark.parametrize("target", UNKNOWN, ids=str)
def test_anything_else_is_refused(target):
    with pytest.raises(UntrustedConfig, match=rf"^there: its config names {target!r} as model, which is no network.*trust_config=true"):
        check_trusted({"model": {"_target_": target}}, "there")


def test_every_config_of_densecal_s_is_known():
    for path in (ROOT / "configs").rglob("*.yaml"):
        if path.parent.name == "posthoc":  # a run's config names no calibrator
            continue
        check_trusted(yaml.safe_load(path.read_text()), path)


def test_what_is_hidden_is_found():
    for node in ([[{"_target_": "os.system"}]], {"a": {"_target_": "torch.nn.Conv2d", "bias": {"_target_": "os.system"}}}):
        with pytest.raises(UntrustedConfig, match=r"names 'os\.system' as x\."):
            check_trusted({"x": node}, "there")
    with pytest.raises(UntrustedConfig, match=r"names 'os\.system' as x"):
        check_trusted(OmegaConf.create({"part": "system", "x": {"_target_": "os.${part}"}}), "there")
    with pytest.raises(UntrustedConfig, match="OnlineTeachers"):  # a config cannot trust others
        check_trusted({"model": {"_target_": "densecal.tasks.OnlineTeachers", "teachers": ["x.ckpt"], "trust_config": True}}, "there")


@pytest.fixture
def planted(tmp_path) -> Path:
    """A checkpoint whose network is a function that leaves a file."""
    path = write_teacher(tmp_path / "model.ckpt")
    content = torch.load(path, weights_only=True)
    content["densecal"]["config"]["model"] = {"_target_": "torch.save", "obj": 0, "f": str(tmp_path / "ran")}
    torch.save(content, path)
    return path


def test_downloaded_checkpoint_runs_nothing(planted, tmp_path):
    image, _ = blob((8, 9, 8), seed=0)
    save(tmp_path / "scan.nii.gz", image)
    log = tmp_path / "log.txt"
    command = [f"run={planted}", f"input={tmp_path / 'scan.nii.gz'}", f"output={tmp_path / 'out'}"]
    assert run_command("predict", command, log) == 1
    assert log.read_text().startswith(f"error: {planted}: its config names 'torch.save' as model, which is no network")
    assert len(log.read_text().splitlines()) == 1
    with pytest.raises(UntrustedConfig):
        OnlineTeachers([str(planted)], card=None)
    assert not (tmp_path / "ran").exists()
    run_command("predict", [*command, "trust_config=true"], log)
    assert (tmp_path / "ran").exists()  # or else this test could not fail


def test_downloaded_run_directory_runs_nothing(planted, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    planted.rename(run / "checkpoints" / "last.ckpt")
    (run / "run.json").write_text(json.dumps({"started": "2026-01-01T00:00:00+00:00", "choices": {}}))
    content = {"trust_config": True, "optimizer": {"_target_": "torch.save", "obj": 0, "f": str(tmp_path / "ran")}}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    log = tmp_path / "log.txt"
    assert run_command("train", [f"resume={run}"], log) == 1
    assert log.read_text().startswith(f"error: {run}/config.yaml: its config names 'torch.save' as optimizer, which is no network")
    assert not (tmp_path / "ran").exists()
