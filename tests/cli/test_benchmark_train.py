"""``densecal-benchmark train``: steps of a network with each loss, as ratios to cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densecal.cli import benchmark, benchmark_losses

SMALL = ["train", "--shape", "1,3,8,8,8", "--channels", "2,4", "--repeats", "2", "--threads", "1", "--device", "cpu"]


@pytest.mark.parametrize(("shape", "precision"), [("1,3,8,8,8", "bfloat16"), ("2,3,8,16", "float32")], ids=["3d-bfloat16", "2d-float32"])
def test_a_row_for_each_loss_and_the_baseline_is_one(tmp_path: Path, capsys, shape, precision):
    benchmark.main([*SMALL, "--shape", shape, "--precision", precision, "--out", str(tmp_path)])
    assert (tmp_path / "train.md").read_text().strip() == capsys.readouterr().out.strip()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[0]["library"] == "PyTorch"
    assert rows[0]["ratio"] == [1.0, 1.0, 1.0]
    ours = {row["measure"] for row in rows if row["library"].startswith("densecal")}
    assert ours == {"cross-entropy", "SVLS", "NACL", "MbLS", "Dice + CE", "CE + Dice on SVLS"}
    assert all(row["note"] == "" and 0 < row["step"][0] <= row["step"][2] for row in rows)
    assert (tmp_path / "train-1.png").stat().st_size > 0


def test_a_loss_that_differs_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(
        "densecal.cli.benchmark_train.disagreement", lambda contender, *_: "" if contender is benchmark_losses.BASELINE else " differs"
    )
    with pytest.raises(SystemExit) as error:
        benchmark.main([*SMALL, "--only", "SVLS"])
    assert error.value.code == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,3,8,9,8"], "multiples of 2"),
        (["--shape", "1,3,8"], "two or three spatial dims"),
        (["--shape", "1,3,8,x"], "numbers with commas"),
        (["--repeats", "0"], "at least one repeat"),
    ],
    ids=["odd", "1d", "text", "repeats"],
)
def test_bad_arguments(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, *options])
    assert message in capsys.readouterr().err
