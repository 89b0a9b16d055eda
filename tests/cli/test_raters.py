"""Training on several raters: each fusion from the command line, a killed run, evaluation of a run and of saved probabilities."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import run_command
from omegaconf import OmegaConf
from panels import make_panel

from densecal.data.dataset import CaseDataset
from densecal.data.layouts import find_cases
from densecal.metrics import qubiq_dice

FUSIONS = {
    "mean": ["loss=dml"],
    "majority": ["loss=ce"],
    "random": ["loss=ce"],
    "all": ["loss=compound", "term=ce", "target=rater_mean"],
    "drawn": ["loss=compound", "term=ce", "target=random_rater"],
}


def train(root: Path, output: Path, *more: str, die_in: str | None = None, printed: bool = False) -> int:
    settings = [f"data={root / 'panel.yaml'}", f"output_dir={output}", "trainer.accelerator=cpu", "trainer.max_epochs=2", "predictions=[probs]"]
    channels = "model.channels=[4,8]"
    return run_command("train", [*settings, channels, *more], output.with_suffix(".log"), die_in, epoch=1, printed=printed)


def finished(output: Path) -> Path:
    (record,) = output.glob("*/*/run.json")
    return record.parent


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """Images, one of them without one of its raters."""
    root = tmp_path_factory.mktemp("panel")
    card = make_panel(root, "images", cases=8, missing=((3, 1),), missing_raters=True)
    content = {key: value for key, value in OmegaConf.to_container(OmegaConf.structured(card)).items() if key not in ("augmentation", "pipeline")}
    (root / "panel.yaml").write_text(yaml.safe_dump(content))
    return root, card


@pytest.fixture(scope="module")
def run(panel) -> Path:
    """A run whose patches have a rater drawn."""
    root, _ = panel
    assert train(root, root / "runs", "data.rater_fusion=random", printed=True) == 0, (root / "runs.log").read_text()
    return finished(root / "runs")


@pytest.mark.parametrize("name", ["mean", "all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("majority", "drawn"))])
def test_every_fusion_trains_and_is_tested_on_the_mean(panel, tmp_path, name):
    root, _ = panel
    fusion = "all" if name == "drawn" else name
    assert train(root, tmp_path / "runs", f"data.rater_fusion={fusion}", *FUSIONS[name], "trainer.max_epochs=1") == 0, (
        tmp_path / "runs.log"
    ).read_text()
    summary = json.loads((finished(tmp_path / "runs") / "summary.json").read_text())
    assert {"qubiq_dice", "soft_dice", "soft_iou"} <= summary["mean"].keys()
    assert summary["run"]["reference"].startswith("mean of the raters")
    assert summary["run"]["raters in training"] == fusion


@pytest.mark.slow
def test_volumes_train_on_all_raters(tmp_path):
    card = make_panel(tmp_path, "volumes", cases=6, rater_fusion="all")
    content = {key: value for key, value in OmegaConf.to_container(OmegaConf.structured(card)).items() if key not in ("augmentation", "pipeline")}
    (tmp_path / "panel.yaml").write_text(yaml.safe_dump(content))
    more = ["trainer.max_epochs=1", *FUSIONS["all"]]
    assert train(tmp_path, tmp_path / "runs", *more) == 0, (tmp_path / "runs.log").read_text()
    assert "qubiq_dice" in json.loads((finished(tmp_path / "runs") / "summary.json").read_text())["mean"]


def test_a_target_of_raters_without_them_is_one_line(panel, tmp_path):
    root, _ = panel
    assert train(root, tmp_path / "runs", *FUSIONS["all"]) == 1
    assert "error: loss: Expected the side input 'rater_labels'" in (tmp_path / "runs.log").read_text().replace("\n", " ")


def test_a_killed_run_draws_the_same_raters(panel, run, tmp_path):
    root, _ = panel
    output = tmp_path / "runs"
    assert train(root, output, "data.rater_fusion=random", die_in="training") == -signal.SIGKILL
    assert train(root, output, "data.rater_fusion=random", "resume=latest") == 0, output.with_suffix(".log").read_text()
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, finished(output)))
    assert first["cases"] == second["cases"]
    assert first["pooled"] == second["pooled"]


def test_a_run_is_scored_against_the_share_of_raters(panel, run):
    root, card = panel
    summary = json.loads((run / "summary.json").read_text())
    cases = find_cases(root, card)
    dataset = CaseDataset(cases, card, train=False)
    place = {case.id: n for n, case in enumerate(cases)}
    total = gap = 0.0
    for row in summary["cases"]:
        probs = torch.from_numpy(np.load(run / "predictions" / f"{row['case_id']}_probs.npz")["probs"])
        shares = dataset[place[row["case_id"]]]["label"]
        assert row["qubiq_dice"] == pytest.approx(qubiq_dice(probs[None], shares[None])[0, 1].item())
        valid = shares.sum(0) > 0
        total += int(valid.sum())
        gap += float(-(shares * probs.clamp(min=1e-12).log()).sum(0)[valid].sum())
    assert summary["pooled"]["all"]["num_voxels"] == total
    assert summary["pooled"]["all"]["nll"] == pytest.approx(gap / total, rel=1e-5)
    page = (run / "report.html").read_text()
    assert "QUBIQ Dice" in page
    assert ">Agreement<" in page
    assert "confidence, agreement 0.50" in page


def test_evaluating_the_run_and_its_saved_probabilities_agree(panel, run, tmp_path):
    root, card = panel
    log = tmp_path / "log.txt"
    scores = {}
    shares = tmp_path / "shares"
    shares.mkdir()
    cases = find_cases(root, card)
    for case, item in zip(cases, CaseDataset(cases, card, train=False), strict=False):
        np.save(shares / f"{case.id}.npy", item["label"].numpy())
    test = json.loads((run / "splits.json").read_text())["test"]
    sources = {
        "run": [f"run={run}"],
        "card": [f"predictions={run / 'predictions'}", f"data={root / 'panel.yaml'}", "data.rater_fusion=majority"],
        "folder": [f"predictions={run / 'predictions'}", f"labels={shares}", "strict=false", "ignore_index=9"],
    }
    for name, source in sources.items():
        assert run_command("evaluate", [*source, f"output={tmp_path / name}", "device=cpu"], log) == 0, log.read_text()
        scores[name] = json.loads((tmp_path / name / "summary.json").read_text())
        assert [row["case_id"] for row in scores[name]["cases"]] == test
    for name in ("card", "folder"):
        for key in ("qubiq_dice", "soft_dice", "soft_iou", "dice"):
            assert scores[name]["mean"][key] == pytest.approx(scores["run"]["mean"][key], abs=1e-6)
        for key in ("ece_top_label", "nll"):
            assert scores[name]["pooled"]["all"][key] == pytest.approx(scores["run"]["pooled"]["all"][key], abs=1e-6)
    assert "reference" not in scores["folder"]["run"]
    assert scores["card"]["run"]["reference"] == scores["run"]["run"]["reference"]
