"""``densecal-benchmark targets``: a table and its files, and an error where contenders differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from densecal.cli import benchmark, benchmark_targets
from densecal.cli.benchmark_losses import convolved_target
from densecal.targets import svls_target

SMALL = ["targets", "--shape", "1,3,9,10", "--repeats", "1", "--threads", "1", "--device", "cpu"]


def test_rows_come_as_they_are_measured(tmp_path: Path, capsys):
    benchmark.main(
        [*SMALL, "--only", "SVLS", "--out", str(tmp_path), "--labels", "blocks", "--dtype", "float32", "bfloat16", "--label-dtype", "uint8"]
    )
    out = capsys.readouterr().out
    assert "## 1 x 3 x 9 x 10, bfloat16, blocks" in out
    assert (tmp_path / "targets.md").read_text().strip() == out.strip()
    rows = [json.loads(line) for line in (tmp_path / "targets.jsonl").read_text().splitlines()]
    assert [row["measure"] for row in rows] == (["SVLS"] * 3 + ["SVLS, 5 wide"] * 3) * 2
    assert all(row["note"] == "" and row["time"][1] > 0 for row in rows)
    for ours, other in zip(rows[::3], rows[2::3], strict=True):
        assert ours["ratio"] == 1.0
        assert other["ratio"] == pytest.approx(other["time"][1] / ours["time"][1])


@pytest.mark.parametrize("shape", [(1, 4, 11), (2, 3, 9, 10), (1, 2, 6, 7, 8)], ids=["1d", "2d", "3d"])
def test_all_contenders_agree(shape):
    pytest.importorskip("monai")
    for contender in benchmark_targets.CONTENDERS:
        assert benchmark_targets.disagreement(contender, shape, "cpu") == "", contender


def test_contenders_that_differ_are_an_error(monkeypatch, capsys):
    ours = next(c for c in benchmark_targets.CONTENDERS if c.measure == "SVLS")
    makes = {
        "wider": lambda y, c, dtype: convolved_target(y, c, sigma=1.5, dtype=dtype),
        "turned": lambda y, c, dtype: svls_target(y, c).probs.movedim(1, -1),
    }
    wrong = [replace(ours, library=name, make=make) for name, make in makes.items()]
    monkeypatch.setattr(benchmark_targets, "CONTENDERS", (ours, *wrong))
    with pytest.raises(SystemExit) as error:
        benchmark.main(SMALL)
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert out.count("differs on a small input") == 2
    assert out.count("| SVLS | densecal |") == 1


@pytest.mark.parametrize("shape", ["1,3", "a,b,c", "1,1,4"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["targets", "--shape", "1,2,4", shape])
    assert error.value.code == 2
    assert "shape" in capsys.readouterr().err


def test_max_pooling_by_hand():
    found = benchmark_targets.pooled_boundary(torch.tensor([[0, 0, 2, 2]]), 4, smoothing=0.4)
    torch.testing.assert_close(found[0, 0], torch.tensor([1.0, 0.7, 0.1, 0.0]))
