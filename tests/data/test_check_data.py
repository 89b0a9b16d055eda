from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from volumes import blob, save

from densecal.cli.check_data import main
from densecal.data.card import DataCard


def card_file(card: DataCard, path: Path) -> Path:
    keys = ("classes", "layout", "subject_pattern", "subject_size")
    path.write_text(yaml.safe_dump({key: getattr(card, key) for key in keys}))
    return path


def test_check_summarises_a_sound_set(make_set: Callable[..., DataCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = make_set(8)
    main([f"data={card_file(card, tmp_path / 'mine.yaml')}", f"data.root={card.root}", "data.val_fraction=0.3"])
    out = capsys.readouterr().out
    assert "cases    8 of 4 subjects" in out
    assert "spacing  1 x 1 x 2 mm" in out
    assert "shape    9 x 12 x 10 (min), 10 x 13 x 11 (median), 11 x 14 x 12 (max) voxels" in out
    assert "train 4 of 2 subjects, val 2 of 1 subjects, test 2 of 1 subjects" in out
    assert "no problems" in out


def test_check_prints_problems_and_exits_1(make_set: Callable[..., DataCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = make_set(8)
    label = Path(card.root or "") / "labelsTr" / "s004.nii.gz"
    label.unlink()
    with pytest.raises(SystemExit) as error:
        main([str(card_file(card, tmp_path / "mine.yaml")), "--root", str(card.root)])
    assert error.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("/")] == [f"{label}: is missing. Restore the file, or leave the case out."]
    assert "1 problem(s)" in lines[-1]


def test_check_lists_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    assert "task04_hippocampus / hippocampus:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hipocampus"], "Did you mean 'hippocampus'"),
        ([], "Name one data set card"),
        (["mni152", "data.rot=/x"], "data.rot is not a key of a data set card. Did you mean 'root'"),
        (["mni152", "loss=svls"], "Settings here begin with `data.`"),
        (["hippocampus", "--root", "/nowhere"], "No folder /nowhere"),
    ],
)
def test_check_explains_a_wrong_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_check_tells_the_shares_of_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        image, label = blob((6, 6, 6), seed=n)
        save(tmp_path / "images" / f"b{n}.nii.gz", image)
        save(tmp_path / "labels" / f"b{n}.nii.gz", label)
    (tmp_path / "card.yaml").write_text("classes: [rest, left, right, gone]\npatch_size: [4, 4, 4]\n")
    regions = "data.regions={both: [left, right], lost: [gone]}"
    main([f"data={tmp_path / 'card.yaml'}", f"data.root={tmp_path}", regions])
    lines = capsys.readouterr().out.splitlines()
    assert "  regions  both 7.41 %, lost 0.00 %" in lines  # 2 x 8 of 216 voxels
    assert "  absent   lost: no voxel of its classes in any label" in lines
