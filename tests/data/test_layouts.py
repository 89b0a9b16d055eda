from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from volumes import save

from densecal.data.card import DataCard
from densecal.data.layouts import decathlon, find_cases, nnunet, paired
from densecal.data.validate import find_problems
from densecal.data.volumes.transforms import prepare_transforms

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


def test_nnunet_has_a_file_for_each_channel(tmp_path: Path) -> None:
    names = ("h_0000_0000.nii.gz", "h_0000_0001.nii.gz", "h_3_0000.nii.gz", "h_3_0001.nii.gz")
    touch(*(tmp_path / "imagesTr" / name for name in names), *(tmp_path / "labelsTr" / f"{name}.nii.gz" for name in ("h_0000", "h_3", "h_4")))
    cases = find_cases(tmp_path, replace(CARD, layout="nnunet", image_channels=2, subject_pattern=None, subject_size=1))
    assert [case.id for case in cases] == ["h_0000", "h_3", "h_4"], "a label without an image is a case too, so that it is reported"
    assert [file.name for file in cases[0].image] == list(names[:2])
    assert [file.name for file in cases[2].image] == ["h_4_0000.nii.gz", "h_4_0001.nii.gz"]
    assert cases[1].label == tmp_path / "labelsTr" / "h_3.nii.gz"


def test_nnunet_channels_are_stacked(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for channel in range(2):
        save(tmp_path / "imagesTr" / f"a_{channel:04}.nii.gz", values + 100 * channel)
    save(tmp_path / "labelsTr" / "a.nii.gz", (values > 30).astype(np.uint8))
    card = DataCard("mri", ["rest", "core"], layout="nnunet", image_channels=2, normalisation="none", patch_size=[3, 4, 5])
    (case,) = nnunet(tmp_path, card)
    assert find_problems([case], card) == []
    image = prepare_transforms(card)({"image": [str(file) for file in case.image], "label": str(case.label)})["image"]
    assert image.shape == (2, 3, 4, 5)
    assert (image[1] - image[0] == 100).all()


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
