"""``densecal-benchmark metrics``: a table, and an error where libraries disagree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from densecal.cli import benchmark

SMALL = ["metrics", "--shape", "1,3,16,20", "--images", "2", "--repeats", "2", "--threads", "1"]


@pytest.fixture
def contenders(monkeypatch):
    """Ours and torchmetrics', memory left out: each measurement of it takes a process."""
    chosen = tuple(c for c in benchmark.CONTENDERS if c.measure == benchmark.TOP_LABEL and c.library in ("densecal", "torchmetrics"))
    monkeypatch.setattr(benchmark, "CONTENDERS", chosen)
    monkeypatch.setattr(benchmark, "_peak_memory", lambda *_: 0.0)
    return chosen


def test_benchmark_prints_a_row_for_each_library(contenders, capsys):
    benchmark.main(SMALL)
    header, ours, theirs = capsys.readouterr().out.splitlines()[-3:]
    assert header.split()[:2] == ["measure", "library"]
    assert "densecal" in ours
    assert "1.0x" in ours
    assert "torchmetrics" in theirs
    assert "differs" not in ours + theirs


def test_benchmark_fails_where_numbers_differ(contenders, monkeypatch, capsys):
    import torchmetrics.classification

    other = replace(contenders[1], make=lambda c: torchmetrics.classification.MulticlassCalibrationError(num_classes=c, n_bins=3))
    monkeypatch.setattr(benchmark, "CONTENDERS", (contenders[0], other))
    with pytest.raises(SystemExit) as error:
        benchmark.main(SMALL)
    assert error.value.code == 1
    assert "differs on a small image" in capsys.readouterr().out


def test_torchmetrics_moves_away_because_it_adds_in_single_precision():
    """What docs/benchmarks/metrics.md says: its own bins and formula give its number in single precision, and ours in double precision."""
    from torchmetrics.classification import MulticlassCalibrationError

    ((probs, label),) = benchmark._images((1, 19, 512, 1024), 1, "cpu")
    theirs = MulticlassCalibrationError(num_classes=19, n_bins=15)(probs, label).item()
    ours = benchmark.CONTENDERS[0].make(19)(probs, label).item()
    confidence, right = probs.amax(1).flatten(), (probs.argmax(1) == label).flatten()
    bins = torch.bucketize(confidence, torch.linspace(0, 1, 16), right=True) - 1

    def error(dtype):
        n, c, a = (torch.zeros(16, dtype=dtype).scatter_add_(0, bins, x.to(dtype)) for x in (torch.ones_like(confidence), confidence, right))
        return ((c - a).abs().sum() / n.sum()).item()

    assert error(torch.float32) == pytest.approx(theirs, abs=1e-6)
    assert error(torch.float64) == pytest.approx(ours, abs=1e-6)
    assert abs(theirs - ours) > 1e-5


@pytest.mark.parametrize("shape", ["1,3", "a,b,c", "1,0,4"])
def test_benchmark_refuses_a_shape_that_is_none(shape, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["metrics", "--shape", shape])
    assert error.value.code == 2
    assert "shape" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark_measures_all_libraries(capsys):
    benchmark.main(SMALL)
    out = capsys.readouterr().out
    assert out.count("MiB") == len(benchmark.CONTENDERS)
    assert "nan MiB" not in out
