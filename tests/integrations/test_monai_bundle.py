"""The MONAI bundle by MONAI's own commands: it trains, evaluates and predicts on small volumes, and its numbers are those of its files."""

import csv
import json
import logging
import re
import runpy
import shlex
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn
from volumes import blob, save

from densecal.data import PredictionFolder
from densecal.losses import CRaCLoss, NACLLoss, SVLSLoss
from densecal.metrics import DiceScore, ExpectedCalibrationError

pytest.importorskip("monai")
pytest.importorskip("ignite")
pytest.importorskip("fire")

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss

BUNDLE = ROOT / "configs" / "monai_bundle"
PAGE = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
SMALL = {"num_workers": 0, "patch_size": [8, 8, 8], "network_def#channels": [4, 8], "network_def#strides": [2], "device": "$torch.device('cpu')"}
"""What makes any of its workflows quick."""
TRAIN = {**SMALL, "datalist#num_folds": 2, "max_epochs": 8, "val_interval": 4, "batch_size": 2, "learning_rate": 0.01}


SCAN = "hippocampus_003.nii.gz"
"""A volume of the fold left out."""


def commands(page):
    """The command lines of a page's code blocks, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = (line for language, block in blocks if not language for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines]


def run_monai(arguments, monkeypatch, **options):
    """``python -m monai.bundle``, in this process."""
    monkeypatch.setattr(sys, "argv", ["monai.bundle", *arguments, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    runpy.run_module("monai.bundle", run_name="__main__")


@pytest.fixture(autouse=True)
def kept_handlers():
    """Ignite's and MONAI's loggers keep the stream of the test that made them."""
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("ignite", "monai")):
            logging.getLogger(name).handlers.clear()


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory):
    """A Decathlon folder of four persons with two volumes each, half of them in other axes."""
    root = tmp_path_factory.mktemp("data") / "Task04_Hippocampus"
    for number in range(1, 9):
        image, label = blob((10, 9, 11), seed=number)
        affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if number % 2 else np.diag([1.0, 1.0, 2.0, 1.0])
        save(root / "imagesTr" / f"hippocampus_{number:03}.nii.gz", image, affine)
        save(root / "labelsTr" / f"hippocampus_{number:03}.nii.gz", label, affine)
    entries = [{key: f"./{key}sTr/hippocampus_{number:03}.nii.gz" for key in ("image", "label")} for number in range(1, 9)]
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (root / "dataset.json").write_text(json.dumps({"name": "Hippocampus", "labels": labels, "training": entries}))
    return root


@pytest.fixture(scope="module")
def trained(decathlon, tmp_path_factory):
    """The bundle after the page's commands, in the order of the page."""
    folder = tmp_path_factory.mktemp("bundle") / "monai_bundle"
    shutil.copytree(BUNDLE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DENSECAL_DATA", str(decathlon.parent))
        runs = [words[3:] for words in commands(PAGE) if words[:4] == ["python", "-m", "monai.bundle", "run"] and "calibrated.yaml" not in words[-1]]
        assert len(runs) == 3
        for arguments in runs:
            arguments = [str(decathlon / "imagesTr" / SCAN) if word == "scan.nii.gz" else word for word in arguments]
            run_monai(arguments, patch, **(TRAIN if "train" in arguments[2] else SMALL))
    return folder


def test_training_leaves_checkpoints(trained):
    assert {path.name for path in (trained / "models").iterdir()} == {"model.pt", "last.pt"}
    last = torch.load(trained / "models" / "last.pt", weights_only=True)
    assert set(last) == {"model", "optimizer", "loss"}


def test_evaluation_has_the_numbers_of_its_files(trained, decathlon):
    """What the handlers measured is what the saved probabilities give beside the labels, on the grids of the files."""
    cases = PredictionFolder(trained / "eval" / "predictions", decathlon / "labelsTr")
    assert [problem.kind for problem in cases.problems()] == ["missing"] * 4  # the other fold
    ece, dice = ExpectedCalibrationError(num_bins=15), DiceScore(3)
    for case_id in cases.case_ids:
        case = cases[case_id]
        for metric in (ece, dice):
            metric.update(case.probs.unsqueeze(0), case.label.unsqueeze(0))
    with open(trained / "eval" / "metrics.csv") as file:
        found = {name: float(value) for name, value in csv.reader(file)}
    assert found["val_ece"] == pytest.approx(ece.compute().item(), abs=1e-5)
    assert found["val_dice"] == pytest.approx(dice.compute().item(), abs=1e-5)
    assert found["val_dice"] > 0.3
    with open(trained / "eval" / "val_ece_raw.csv") as file:
        assert [row["filename"].rsplit("/", 1)[-1].split(".")[0] for row in csv.DictReader(file)] == sorted(cases.case_ids)


def test_inference_is_on_the_grid_of_the_file(trained, decathlon):
    (path,) = (trained / "predictions").iterdir()
    image, probs = nib.load(decathlon / "imagesTr" / SCAN), nib.load(path)
    assert path.name == "hippocampus_003_probs.nii.gz"
    assert probs.shape == (*image.shape, 3)
    np.testing.assert_allclose(probs.affine, image.affine)
    assert probs.get_data_dtype() == np.float32
    np.testing.assert_allclose(probs.get_fdata().sum(-1), 1, atol=1e-5)
    evaluated = nib.load(trained / "eval" / "predictions" / path.name).get_fdata()
    np.testing.assert_allclose(probs.get_fdata(), evaluated, atol=1e-6)


def parsed(decathlon, **options):
    parser = ConfigParser(ConfigParser.load_config_files([str(BUNDLE / "configs" / "train.yml")]))
    for name, value in {**TRAIN, "dataset_dir": str(decathlon), **options}.items():
        parser[name] = value
    return parser


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ({"_target_": "densecal.losses.NACLLoss"}, NACLLoss),
        ({"_target_": "densecal.losses.CRaCLoss", "num_classes": 3}, CRaCLoss),
        ({"_target_": "DeepSupervisionLoss", "loss": {"_target_": "densecal.losses.SVLSLoss"}}, DeepSupervisionLoss),
        ({"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}, nn.Module),
    ],
    ids=["nacl", "crac", "deep-supervision", "monais-own"],
)
def test_another_loss(decathlon, tmp_path, loss, kind):
    parser = parsed(decathlon, loss=loss, max_epochs=1, val_interval=1, bundle_root=str(tmp_path))
    if loss["_target_"] == "DiceCELoss":
        parser["train#random_transforms#2#value"] = 0  # MONAI's losses know no label to leave out
    trainer = parser.get_parsed_content("train#trainer")
    assert isinstance(trainer.loss_function, kind)
    trainer.run()
    assert 0 < trainer.state.output[0]["loss"] < 10


def test_another_loss_from_the_page(decathlon):
    """The options that the page writes out make these losses."""
    written = re.findall(r"`--loss \"(\{.*?\})\"`", PAGE)
    made = [parsed(decathlon, loss=yaml.safe_load(text)).get_parsed_content("loss") for text in written]
    assert [type(loss) for loss in made] == [NACLLoss, DeepSupervisionLoss]
    assert isinstance(made[1].loss, SVLSLoss)


def test_folds_of_an_auto3dseg_datalist(decathlon, tmp_path):
    entries = [
        {"image": f"imagesTr/hippocampus_{n:03}.nii.gz", "label": f"labelsTr/hippocampus_{n:03}.nii.gz", "fold": fold}
        for n, fold in [(1, 0), (2, 0), (5, 1)]
    ]
    (tmp_path / "folds.json").write_text(json.dumps({"training": entries}))
    training, validation = parsed(decathlon, datalist=str(tmp_path / "folds.json"), fold=1).get_parsed_content("cases")
    assert [len(training), len(validation)] == [2, 1]
    assert validation[0]["image"] == str(decathlon / "imagesTr" / "hippocampus_005.nii.gz")


def test_nobody_is_on_both_sides(decathlon):
    training, validation = parsed(decathlon).get_parsed_content("cases")
    people = [{(int(case["image"][-10:-7]) + 1) // 2 for case in side} for side in (training, validation)]
    assert len(people[0]) == len(people[1]) == 2
    assert not people[0] & people[1]


def test_padding_teaches_nothing(decathlon):
    """A patch larger than the volume: beyond it the labels are no class, and the loss is that of the volume alone."""
    parser = parsed(decathlon, patch_size=[16, 16, 16])
    sample = parser.get_parsed_content("train#dataset")[0]
    assert isinstance(sample["label"], MetaTensor)
    label = sample["label"].as_tensor()
    assert label.shape == (1, 16, 16, 16)
    assert (label >= 0).sum() == 10 * 9 * 11
    logits = torch.randn(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parser.get_parsed_content("loss")(logits, label.unsqueeze(0)).backward()
    beyond = (label < 0).expand(3, -1, -1, -1)
    assert not logits.grad[0][beyond].any()
    assert logits.grad[0][~beyond].all()


@pytest.mark.parametrize(
    ("kind", "files"), [("train", ["train"]), ("train", ["train", "evaluate"]), ("infer", ["inference"])], ids=["train", "evaluate", "inference"]
)
def test_properties_of_a_bundle_are_there(kind, files, decathlon):
    options = {"dataset_dir": str(decathlon)} | ({"datalist#num_folds": 2} if kind == "train" else {"images": str(decathlon / "imagesTr" / "*")})
    files = [str(BUNDLE / "configs" / f"{name}.yml") for name in files]
    workflow = ConfigWorkflow(files, meta_file=str(BUNDLE / "configs" / "metadata.json"), workflow_type=kind, logging_file=False, **options)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_network_is_as_the_metadata_says(monkeypatch):
    (check,) = [words for words in commands(PAGE) if "verify_net_in_out" in words]
    monkeypatch.chdir(BUNDLE)
    run_monai(check[3:], monkeypatch, device="cpu")
    with pytest.raises(ValueError, match="output channel number `3` doesn't match: `5`"):
        run_monai(check[3:], monkeypatch, device="cpu", **{"_meta_#network_data_format#outputs#pred#num_channels": 5})


def test_training_and_inference_agree():
    """The network and what it is fed are written in both files."""
    train, inference = (ConfigParser.load_config_file(str(BUNDLE / "configs" / f"{name}.yml")) for name in ("train", "inference"))
    for name in ("network_def", "num_classes", "patch_size", "device", "amp"):
        assert train[name] == inference[name], name
    assert train["validate"]["inferer"] == inference["inferer"]
    prepared = [{**step, "keys": "image"} for step in train["train"]["deterministic_transforms"]]
    assert prepared == inference["preprocessing"]["transforms"]


def test_metadata_names_what_is_needed():
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    needed = {
        "version",
        "changelog",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    }
    assert needed <= set(metadata)
    classes = ConfigParser.load_config_file(str(BUNDLE / "configs" / "train.yml"))["num_classes"]
    assert len(metadata["network_data_format"]["outputs"]["pred"]["channel_def"]) == classes


def test_two_lines_behind_a_bundle_of_monais_form(decathlon, tmp_path, monkeypatch):
    """The page's two lines, read behind a bundle whose postprocessing leaves 0 and 1 as those of the model zoo do."""
    (lines,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(lines.splitlines()) == 2
    zoo = ConfigParser.load_config_file(str(BUNDLE / "configs" / "train.yml"))
    zoo["loss"] = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "include_background": False}
    zoo["train"]["random_transforms"][2]["value"] = 0
    zoo["train"]["handlers"] = zoo["train"]["handlers"][:1]
    zoo["validate"]["handlers"] = []
    discrete = {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": 3}
    zoo["validate"]["postprocessing"] = {"_target_": "Compose", "transforms": [zoo["validate"]["postprocessing"], discrete]}
    zoo["validate"]["key_metric"] = {
        "val_mean_dice": {"_target_": "MeanDice", "include_background": False, "output_transform": "$monai.handlers.from_engine(['pred', 'label'])"}
    }
    zoo["validate"]["additional_metrics"] = {
        "val_accuracy": {"_target_": "ignite.metrics.Accuracy", "output_transform": "$monai.handlers.from_engine(['pred', 'label'])"}
    }
    (tmp_path / "train.json").write_text(json.dumps(zoo))
    (tmp_path / "calibrated.yaml").write_text(lines)
    parser = ConfigParser(ConfigParser.load_config_files([str(tmp_path / "train.json"), str(tmp_path / "calibrated.yaml")]))
    for name, value in {**TRAIN, "dataset_dir": str(decathlon)}.items():
        parser[name] = value
    trainer = parser.get_parsed_content("train#trainer")
    evaluator = parser.get_parsed_content("validate#evaluator")
    trainer.run()
    assert isinstance(trainer.loss_function, SVLSLoss)
    assert set(evaluator.state.metrics) == {"val_mean_dice", "val_accuracy", "val_ece"}
    ece, network = ExpectedCalibrationError(), evaluator.network.eval()
    with torch.no_grad():
        for case in evaluator.data_loader:
            ece.update(evaluator.inferer(case["image"].as_tensor(), network).softmax(1), case["label"])
    assert evaluator.state.metrics["val_ece"] == pytest.approx(ece.compute().item(), rel=1e-5)
