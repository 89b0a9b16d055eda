"""``densecal-benchmark losses``: a table and its files, and an error where contenders differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from densecal.cli import benchmark, benchmark_losses
from densecal.losses import CrossEntropyLoss

SMALL = ["losses", "--shape", "1,3,9,10", "--repeats", "1", "--threads", "1", "--device", "cpu"]


def test_rows_come_with_values_that_agree(tmp_path: Path, capsys):
    benchmark.main([*SMALL, "--only", "SVLS", "--out", str(tmp_path), "--labels", "blocks", "--dtype", "float32", "bfloat16"])
    out = capsys.readouterr().out
    assert "## 1 x 3 x 9 x 10, bfloat16, blocks" in out
    assert "% of the pixels have a neighbour of another class" in out
    assert (tmp_path / "losses.md").read_text().strip() == out.strip()
    rows = [row for line in (tmp_path / "losses.jsonl").read_text().splitlines() if (row := json.loads(line))["dtype"] == "float32"]
    measures = {row["measure"] for row in rows}
    assert measures == {"cross-entropy", "SVLS", "Jaccard on SVLS", "CE + Dice on SVLS"}
    assert rows[0]["ratio"] == 1.0
    assert all(row["note"] == "" and row["both"][1] > 0 for row in rows)
    svls = [row["value"] for row in rows if row["measure"] == "SVLS"]
    assert len(svls) == 2
    assert svls[0] == pytest.approx(svls[1], rel=1e-5)


def test_profile_names_the_operations_of_ours(monkeypatch, capsys):
    contenders = [c for c in benchmark_losses.CONTENDERS if c.measure == "cross-entropy"]
    monkeypatch.setattr(benchmark_losses, "CONTENDERS", tuple(contenders))
    benchmark.main([*SMALL, "--profile"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert line.startswith("- cross-entropy, densecal, torch: ")
    shares = [int(share) for share in re.findall(r" (\d+)%", line)]
    assert 3 <= len(shares) <= 10
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 105  # rounded
    assert "aten::" in line


@pytest.mark.parametrize("shape", [(1, 3, 9, 10), (1, 2, 6, 7, 8)], ids=["2d", "3d"])
def test_all_contenders_agree(shape):
    """Values and gradients, ours against MONAI's, segmentation-models-pytorch's and PyTorch's."""
    for name in ("monai", "segmentation_models_pytorch"):
        pytest.importorskip(name)
    for contender in benchmark_losses.CONTENDERS:
        if contender.library != "densecal, triton":
            assert benchmark_losses.disagreement(contender, shape, "cpu") == "", contender


def test_a_contender_that_differs_is_an_error(monkeypatch, capsys):
    baseline = benchmark_losses.BASELINE
    wrong = replace(baseline, make=lambda num_classes, spatial_dims: CrossEntropyLoss(class_weights=[1.0, 2.0, 3.0]), library="other")
    ours = tuple(c for c in benchmark_losses.CONTENDERS if c.measure == "cross-entropy")
    monkeypatch.setattr(benchmark_losses, "CONTENDERS", (*ours, wrong))
    with pytest.raises(SystemExit) as error:
        benchmark.main(SMALL)
    assert error.value.code == 1
    assert "differs on a small input" in capsys.readouterr().out


def test_label_maps():
    regions = benchmark_losses.label_map((1, 5, 192, 192), "regions")
    assert regions.shape == (1, 192, 192)
    assert regions.unique().numel() > 1
    assert 0.01 < benchmark_losses.boundary_share(regions) < 0.06
    blocks = benchmark_losses.label_map((1, 5, 20, 16), "blocks")
    assert blocks.shape == (1, 20, 16)
    assert (blocks[0, :8, :8] == blocks[0, 0, 0]).all()
    assert benchmark_losses.boundary_share(torch.tensor([[0, 0, 1, 1]])) == 0.5


@pytest.mark.parametrize("shape", ["1,3", "a,b,c", "1,1,4"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["losses", "--shape", "1,2,4", shape])
    assert error.value.code == 2
    assert "shape" in capsys.readouterr().err


@pytest.mark.slow
def test_gpu_check_runs_without_a_gpu(tmp_path):
    """Everything but what needs one: tests skip themselves, benchmarks run on the CPU."""
    environment = {
        "GPU_CHECK_SHAPES": "1,3,9,10",
        "GPU_CHECK_METRIC_SHAPES": "1,3,9,10",
        "GPU_CHECK_TARGET_SHAPES": "1,3,9,10",
        "GPU_CHECK_TRAIN_SHAPE": "1,3,16,16",
        "GPU_CHECK_REPEATS": "1",
        "GPU_CHECK_DEVICE": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    result = subprocess.run([ROOT / "tools/gpu_check.sh", tmp_path], env={**os.environ, **environment}, capture_output=True, text=True)
    for name in ("losses", "metrics", "targets"):
        assert "| library |" in (tmp_path / f"{name}.md").read_text()
    assert "cross-entropy" in (tmp_path / "losses.txt").read_text()
    assert "passed" in result.stdout or "skipped" in result.stdout
    assert not (tmp_path / "skipped.txt").exists()
