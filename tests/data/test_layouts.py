from __future__ import annotations

import json
from pathlib import Path

import pytest

from densecal.data.card import DataCard
from densecal.data.layouts import decathlon, find_cases, paired

CARD = DataCard(name="x", classes=["a", "b"], subject_pattern=r"_(\d+)", subject_size=2, layout="decathlon")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_decathlon_reads_dataset_json(tmp_path: Path) -> None:
    entries = [
        {"image": "./imagesTr/h_004.nii.gz", "label": "./labelsTr/h_004.nii.gz"},
        {"image": "imagesTr/h_003.nii.gz", "label": "labelsTr/h_003.nii.gz"},
        {"image": "./imagesTr/._h_003.nii.gz", "label": "./labelsTr/._h_003.nii.gz"},
        "./imagesTr/h_007.nii.gz",
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    cases = find_cases(tmp_path, CARD)
    assert [(case.id, case.subject) for case in cases] == [("h_003", "2"), ("h_004", "2"), ("h_007", "4")]
    assert cases[1].image == (tmp_path / "imagesTr" / "h_004.nii.gz",)
    assert cases[1].label == tmp_path / "labelsTr" / "h_004.nii.gz"
    assert cases[2].label is None


def test_decathlon_without_json_lists_the_folders(tmp_path: Path) -> None:
    touch(*(tmp_path / "imagesTr" / name for name in ("h_1.nii.gz", "._h_1.nii.gz", "h_2.nii", "notes.txt")), tmp_path / "labelsTr" / "h_1.nii.gz")
    cases = decathlon(tmp_path, CARD)
    assert [case.id for case in cases] == ["h_1", "h_2"]
    assert cases[1].label == tmp_path / "labelsTr" / "h_2.nii.gz", "the missing label is reported when files are checked"


@pytest.mark.parametrize("content", ["{", "[]", '{"training": [{"label": "x"}]}', '{"train": []}'])
def test_decathlon_malformed_json_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json: expected \"training\" to be a list") as error:
        decathlon(tmp_path, CARD)
    assert "\n" not in str(error.value)


def test_paired_matches_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a_1.nii.gz", tmp_path / "images" / "a_2.nii.gz", tmp_path / "labels" / "a_1.nii", tmp_path / "labels" / "a_3.nii.gz")
    cases = {case.id: case for case in paired(tmp_path, CARD)}
    assert cases["a_1"].label == tmp_path / "labels" / "a_1.nii"
    assert set(cases) == {"a_1", "a_2", "a_3"}, "a label without an image is a case too, so that it is reported"
    assert paired(tmp_path / "nowhere", CARD) == []


def test_find_cases_refuses_an_id_without_subject(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "brain.nii.gz")
    with pytest.raises(ValueError, match="'brain' does not match `subject_pattern`"):
        paired(tmp_path, CARD)


def test_find_cases_hippocampus(hippocampus: Path) -> None:
    from densecal.data.card import load_card

    cases = find_cases(hippocampus, load_card("hippocampus"))
    assert (len(cases), len({case.subject for case in cases})) == (120, 81)
