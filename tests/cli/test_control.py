"""``densecal-calibrate control={region: share}``: thresholds beside the calibrators."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import DictConfig

from densecal.cli.calibrate import calibrate
from densecal.cli.configuration import CommandError, prepare_arguments
from densecal.cli.settings import register_settings
from densecal.posthoc import FalseNegativeControl

CASES = [f"c{n}" for n in range(8)]


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(3, 12, 10)`` and labels of a case; the last case has no class 2."""
    generator = torch.Generator().manual_seed(number)
    label = torch.randint(0, 2 if number == len(CASES) - 1 else 3, (12, 10), generator=generator)
    logits = 2 * torch.nn.functional.one_hot(label, 3).movedim(-1, 0) + torch.randn(3, 12, 10, generator=generator)
    return logits.softmax(0).numpy(), label.numpy().astype(np.uint8)


@pytest.fixture
def saved(tmp_path) -> Path:
    for number, case_id in enumerate(CASES):
        for folder, values in zip(("predictions", "labels"), draw(number), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / folder / f"{case_id}.npy", values)
    return tmp_path


def composed(folder: Path, *arguments: str) -> DictConfig:
    register_settings()
    given = [f"predictions={folder / 'predictions'}", f"labels={folder / 'labels'}", f"output={folder / 'out'}", "classes=[rest,left,right]"]
    checked = prepare_arguments([*given, "replicates=0", "device=cpu", *arguments], "calibrate")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return hydra.compose("calibrate", checked)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    probs, label = draw(number)
    return torch.from_numpy(probs).unsqueeze(0), torch.from_numpy(label.astype(np.int64)).unsqueeze(0)


def test_threshold_is_that_of_all_cases_and_looked_at_on_each_left_out(saved, capsys):
    """In as many folds as cases, each is looked at with the threshold of all others."""
    calibrate(composed(saved, "control={right: 0.3, left: 0.4}", f"num_folds={len(CASES)}"))
    record = json.loads((saved / "out" / "control.json").read_text())
    assert list(record["regions"]) == ["right", "left"]
    assert (record["split"], record["num_folds"], record["fitted_on"]) == ("labelled", len(CASES), CASES)
    found = record["regions"]["right"]
    assert found["threshold"] == pytest.approx(FalseNegativeControl(2, alpha=0.3).fit(map(batch, range(8))).threshold)
    assert (found["alpha"], found["num_cases"]) == (0.3, 7)
    rates, ratios = [], []
    for number in range(7):
        threshold = FalseNegativeControl(2, alpha=0.3).fit(batch(n) for n in range(8) if n != number).threshold
        probs, label = draw(number)
        rates.append(float((probs[2][label == 2] < threshold).mean()))
        ratios.append(float((probs[2] >= threshold).sum() / (label == 2).sum()))
    assert list(found["cases"]) == CASES[:7]  # the last does not have it
    assert [case["false_negative_rate"] for case in found["cases"].values()] == pytest.approx(rates)
    assert found["false_negative_rate"] == pytest.approx(np.mean(rates))
    assert found["size_ratio"] == pytest.approx(np.mean(ratios))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("right: ")]
    assert f"{found['threshold']:.4g} misses at most 0.3" in line
    assert f"on 7 cases held out {np.mean(rates):.4f}" in line


def test_without_control_nothing_is_written(saved):
    calibrate(composed(saved))
    assert {path.name for path in (saved / "out").iterdir()} == {"temperature.safetensors", "temperature.json"}


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("{rigth: 0.1}", r"control: no class or region 'rigth'\. Did you mean 'right'"),
        ("{right: 1.5}", r"control\.right: Expected `alpha` in \(0, 1\), but got 1\.5"),
    ],
    ids=["name", "share"],
)
def test_mistaken_control_writes_nothing(control, message, saved):
    with pytest.raises(CommandError, match=message):
        calibrate(composed(saved, f"control={control}"))
    assert not (saved / "out").exists()
