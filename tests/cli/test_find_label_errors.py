"""``densecal-find-label-errors``: from runs and from anybody's probabilities, and one line for each mistake."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import yaml
from blob_run import CARD
from conftest import ROOT
from omegaconf import OmegaConf
from volumes import blob, save

from densecal.cli.configuration import build, prepare_arguments
from densecal.cli.find_label_errors import main
from densecal.cli.settings import register_settings

pytest.importorskip("cleanlab")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Probabilities of a good model beside labels, of which one has lost a structure."""
    root = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    for n in range(6):
        image, truth = blob((8, 9, 10), seed=n)
        logits = rng.normal(0, 0.7, (3, 8, 9, 10)) + 4 * np.eye(3)[truth].transpose(3, 0, 1, 2)
        probs = np.exp(logits) / np.exp(logits).sum(0)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", np.where(truth == 2, 0, truth).astype(np.uint8) if n == 3 else truth)
        (root / "probs").mkdir(exist_ok=True)
        np.save(root / "probs" / f"b{n}.npy", probs.astype(np.float32))
    (root / "corruptions.csv").write_text("case_id,kind,severity,seed,changed,dice\nb3,missing,0.5,0,27,0.5\n")
    return root


@pytest.fixture
def find(tmp_path, monkeypatch, capsys):
    """Run the command into a folder of its own; return what it printed and its table."""

    def command(*arguments: str) -> tuple[str, list[dict[str, str]]]:
        monkeypatch.setattr(sys, "argv", ["densecal-find-label-errors", f"output={tmp_path / 'out'}", "device=cpu", *map(str, arguments)])
        main()
        with (tmp_path / "out" / "label_errors.csv").open() as file:
            return capsys.readouterr().out, list(csv.DictReader(file))

    return command


def test_saved_probabilities(find, saved, tmp_path):
    folders = (f"predictions={saved / 'probs'}", f"labels={saved / 'labels'}", f"images={saved / 'images'}")
    text, rows = find(*folders, "classes=[background,left,right]", f"known={saved / 'corruptions.csv'}", "top=2")
    assert len(rows) == 6
    assert (rows[0]["case_id"], rows[0]["region_given"], rows[0]["region_suggested"]) == ("b3", "background", "right")
    assert text.startswith("1. b3  margin 0.")
    assert "1 known error in 6 cases: precision at 1 1.000, average precision 1.000 (by chance 0.167)" in text
    assert "missing 0.5: rank 1" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 8
    assert "cannot be told from the files" in page


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of untrained networks; the first has seen b0 to b3, the second b2 to b5."""
    root = tmp_path_factory.mktemp("blobs")
    for n in range(6):
        image, label = blob((8, 9, 8), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump(CARD))
    register_settings()
    line = prepare_arguments(
        [f"data={root / 'blobs.yaml'}", f"data.root={root}", "model.channels=[4,8]", "inference=whole_image", "inference.multiple=2"], "train"
    )
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        config = hydra.compose("train", line)
    content = OmegaConf.to_container(config, resolve=True)
    model = build(config.model, "model", in_channels=1, num_classes=3, spatial_dims=3)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    folders = []
    for name, train, test in (("first", (0, 1), (4, 5)), ("second", (4, 5), (0, 1))):
        folder = root / "runs" / "folds" / name
        (folder / "checkpoints").mkdir(parents=True)
        torch.save({"densecal": {"config": content}, "state_dict": weights}, folder / "checkpoints" / "best.ckpt")
        splits = {"train": train, "val": (2, 3), "test": test}
        (folder / "splits.json").write_text(json.dumps({side: [f"b{n}" for n in numbers] for side, numbers in splits.items()}))
        (folder / "run.json").write_text("{}")
        (folder / "summary.json").write_text("{}")
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
        folders.append(folder)
    return folders


def test_runs_score_what_they_held_out(find, runs, tmp_path):
    first, second = runs
    held_out = ["b0", "b1", "b4", "b5"]
    third = first.with_name("third")
    third.mkdir()
    (third / "run.json").write_text("{}")
    _, rows = find(f"runs={first.parent}", "score=dice", "top=1")
    assert sorted(row["case_id"] for row in rows) == held_out
    values = [float(row["dice"]) for row in rows]
    assert values == sorted(values) == [float(row["score"]) for row in rows]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Left out: the run {third} is not finished." in page
    assert "2 of 6 cases were not looked at, because every run has seen them: b2, b3." in page
    root = first.parents[2]
    shutil.copytree(root / "labels", tmp_path / "copy" / "labels")
    shutil.copytree(root / "images", tmp_path / "copy" / "images")
    (tmp_path / "copy" / "labels" / f"{held_out[0]}.nii.gz").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=f"1 problem, and nothing was written.*(\n).*{held_out[0]}.nii.gz"):
        find(f"runs=[{first},{second}]", f"root={tmp_path / 'copy'}")
    _, rows = find(f"runs=[{first},{second}]", f"root={tmp_path / 'copy'}", "strict=false")
    assert sorted(row["case_id"] for row in rows) == held_out[1:]


def test_regions_are_refused_before_anything_is_predicted(find, runs, saved, tmp_path):
    of_regions = shutil.copytree(runs[0], tmp_path / "run")
    path = of_regions / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["densecal"]["config"]["data"]["regions"] = {"left": ["left"], "right": ["right"], "both": [1, 2]}
    torch.save(content, path)
    probs = shutil.copytree(saved / "probs", tmp_path / "probs")
    (probs / "dataset.json").write_text('{"labels": {"background": 0, "left": 1, "right": 2, "both": [1, 2]}}')
    for given in ([f"runs={of_regions}"], [f"predictions={probs}", f"labels={saved / 'labels'}"]):
        with pytest.raises(SystemExit, match=r"classes that exclude each other, but got those of the regions \['left', 'right', 'both'\]"):
            find(*given)
    assert not (tmp_path / "out").exists()


def test_runs_that_are_not_finished(find, tmp_path):
    (tmp_path / "folds" / "a").mkdir(parents=True)
    (tmp_path / "folds" / "a" / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"runs: none of the 1 runs is finished. Go on with one by resume=.*folds/a"):
        find(f"runs={tmp_path / 'folds'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give trained runs as runs=DIR, or saved probabilities as predictions=DIR labels=DIR"),
        (["runs=a", "predictions=b"], "one of the two"),
        (["runs=nowhere"], "No run in nowhere. Give run directories"),
        (["runs=a", "labels=b"], "labels: runs bring their own data set"),
        (["predictions=nowhere"], "labels: give the folder of labels"),
        (["predictions=nowhere", "labels=nowhere"], "predictions: no folder nowhere"),
        (["runs=a", "score=worst"], "score: no score 'worst'"),
        (["runs=a", "top=-1"], "top: expected 0 or more"),
        (["runs=a", "checkpoint=first"], "checkpoint: expected one of"),
        (["runs=a", "known=nowhere.csv"], "nowhere.csv: is no corruptions.csv"),
    ],
)
def test_a_mistake_is_one_line(find, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        find(*arguments)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_without_cleanlab_the_extra_is_named(find, monkeypatch):
    monkeypatch.setattr("densecal.cli.find_label_errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"cleanlab is not installed: pip install 'densecal\[train,noise\]'"):
        find("runs=a")
