"""``densecal-corrupt``: settings, what is printed, and one line for each mistake."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from pictures import make_scenes

from densecal.cli.corrupt_labels import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set")


@pytest.fixture
def run(scenes, tmp_path, monkeypatch):
    def command(*arguments: str) -> None:
        settings = [f"data={scenes}", f"data.root={scenes.parent}", f"output={tmp_path / 'noisy'}"]
        monkeypatch.setattr(sys, "argv", ["densecal-corrupt", *settings, *arguments])
        main()

    return command


def test_corrupts_a_share_of_a_split_by_several_kinds(run, tmp_path, capsys):
    run("kind=[shift,flip]", "severity=[3,1.0]", "share=0.5", "split=train")
    with (tmp_path / "noisy" / "corruptions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["kind"] for row in rows) == ["flip", "shift"]
    assert {row["case_id"] for row in rows} <= {"s0", "s1", "s2", "s3"}
    text = capsys.readouterr().out
    assert text.startswith("shift 3: 1 case, Dice with the original 0.")
    assert "2 of 9 label maps with an error, listed in corruptions.csv" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kind=shft"], "kind: no kind of error 'shft'. Did you mean 'shift'?"),
        (["severity=[1,2]"], "severity: expected one number, or one for each of ['dilation'], but got [1, 2]."),
        (["severity=much"], "severity: expected a number, or a list with one for each kind, but got 'much'."),
        (["kind=missing", "severity=2"], "severity: Expected `severity` of missing to be a probability, at most 1, but got 2."),
        (["share=0"], "share: expected a number above 0 and at most 1, but got 0"),
        (["split=training"], "split: expected one of"),
        (["kind=[flip,flip]"], "kind: expected each kind once"),
        (["data.root=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "noisy").exists()
