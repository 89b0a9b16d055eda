"""``densecal-benchmark metrics``: a table and its files, and an error where libraries disagree."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from densecal.cli import benchmark, benchmark_metrics
from densecal.metrics import expected_calibration_error

SMALL = ["metrics", "--shape", "1,3,16,20", "--images", "2", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def contenders(monkeypatch):
    """Memory is left out: each measurement of it takes a process. And so are libraries that take seconds to import."""
    chosen = tuple(c for c in benchmark_metrics.CONTENDERS if c.module in ("densecal", "torch", "torchmetrics"))
    monkeypatch.setattr(benchmark_metrics, "CONTENDERS", chosen)
    monkeypatch.setattr(benchmark_metrics, "_peak_memory", lambda *_: 0.0)
    return chosen


def test_benchmark_prints_and_keeps_a_row_for_each_library(contenders, tmp_path, capsys):
    benchmark.main([*SMALL, "--only", "top-label", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert (tmp_path / "metrics.md").read_text().strip() == out.strip()
    assert out.startswith(f"CPU, 1 thread, torch {torch.__version__}")
    assert "## 2 images of 1 x 3 x 16 x 20, 15 bins" in out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["measure"], row["library"]) for row in rows if row["library"] != "densecal, triton"] == [
        (benchmark_metrics.TOP_LABEL, "densecal, torch"),
        (benchmark_metrics.TOP_LABEL, "torchmetrics"),
        (benchmark_metrics.FROM_LOGITS, "densecal, torch"),
        (benchmark_metrics.FROM_LOGITS, "softmax and torch.bincount"),
        (benchmark_metrics.FROM_LOGITS, "torchmetrics"),
    ]
    assert all(row["note"] == "" and row["times"][1] > 0 for row in rows)
    assert all(row["value"] == pytest.approx(rows[0]["value"], abs=1e-5) for row in rows)
    assert rows[0]["ratio"] == 1.0
    assert (tmp_path / "metrics-1.png").stat().st_size > 0


def test_benchmark_fails_where_numbers_differ_and_does_not_time_them(contenders, monkeypatch, capsys):
    other = replace(next(c for c in contenders if c.library == "softmax and torch.bincount"), make=lambda c: benchmark_metrics.Bincount(3))
    monkeypatch.setattr(benchmark_metrics, "CONTENDERS", (contenders[1], replace(other, measure=contenders[1].measure, from_logits=False)))
    with pytest.raises(SystemExit) as error:
        benchmark.main(SMALL)
    assert error.value.code == 1
    row = capsys.readouterr().out.strip().splitlines()[-1].split(" | ")
    assert "differs on a small image" in row[-1]
    assert row[2] == ""


@pytest.mark.parametrize("shape", [(1, 5, 12, 9), (2, 3, 5, 6, 7)], ids=["2d", "3d"])
def test_all_contenders_agree(shape):
    """Ours against MONAI's, torchmetrics' and what is written by hand."""
    pytest.importorskip("monai")
    images = benchmark_metrics._images(shape, 1, "cpu")
    values = {}
    for contender in benchmark_metrics.CONTENDERS:
        if contender.library != "densecal, triton" and contender.module != "torch_uncertainty":
            value = benchmark_metrics._run(contender, benchmark_metrics._prepared(contender, images), shape[1], "cpu")[1]
            assert value == pytest.approx(values.setdefault(contender.measure, value), abs=1e-5), contender


def test_torchmetrics_moves_away_because_it_adds_in_single_precision():
    """What docs/benchmarks/metrics.md says: its own bins and formula give its number in single precision, and ours in double precision."""
    from torchmetrics.classification import MulticlassCalibrationError

    ((logits, label),) = benchmark_metrics._images((1, 19, 512, 1024), 1, "cpu")
    probs = logits.softmax(1)
    theirs = MulticlassCalibrationError(num_classes=19, n_bins=15)(probs, label).item()
    ours = expected_calibration_error(probs, label).item()
    confidence, right = probs.amax(1).flatten(), (probs.argmax(1) == label).flatten()
    bins = torch.bucketize(confidence, torch.linspace(0, 1, 16), right=True) - 1

    def error(dtype):
        n, c, a = (torch.zeros(16, dtype=dtype).scatter_add_(0, bins, x.to(dtype)) for x in (torch.ones_like(confidence), confidence, right))
        return ((c - a).abs().sum() / n.sum()).item()

    assert error(torch.float32) == pytest.approx(theirs, abs=1e-6)
    assert error(torch.float64) == pytest.approx(ours, abs=1e-6)
    assert abs(theirs - ours) > 1e-5


@pytest.mark.parametrize("shape", ["1,3", "a,b,c", "1,0,4", "1,1,4"])
def test_benchmark_refuses_a_shape_that_is_none(shape, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["metrics", "--shape", shape])
    assert error.value.code == 2
    assert "shape" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_measures_all_libraries(tmp_path, capsys):
    benchmark.main([*SMALL, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len([c for c in benchmark_metrics.CONTENDERS if c.library != "densecal, triton"])
    assert all(row["memory"] == row["memory"] for row in rows)  # none is NaN
