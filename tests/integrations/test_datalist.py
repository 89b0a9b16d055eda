"""Data sets with a card as MONAI datalists with folds."""

import json
from dataclasses import replace

import pytest
import yaml
from volumes import blob, save

from densecal.data import find_cases, load_card, override_card
from densecal.data.split import split_cases
from densecal.integrations.datalist import fold_datalist

datafold_read = pytest.importorskip("monai.auto3dseg").datafold_read

CARD = {"classes": ["background", "left", "right"], "patch_size": [8, 8, 8], "subject_pattern": r"s(\d+)", "subject_size": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve volumes of six persons."""
    root = tmp_path_factory.mktemp("pairs")
    for number in range(1, 13):
        image, label = blob((4, 4, 4), seed=number)
        save(root / "images" / f"s{number}.nii.gz", image)
        save(root / "labels" / f"s{number}.nii.gz", label)
    (root / "pairs.yaml").write_text(yaml.safe_dump(CARD))
    return root


def test_folds_are_those_of_the_command_line(pairs):
    card = load_card(pairs / "pairs.yaml")
    datalist = fold_datalist(pairs / "pairs.yaml", pairs, num_folds=3)
    for fold in range(3):
        split = split_cases(find_cases(pairs, card), override_card(card, {"num_folds": 3, "fold": fold}))
        listed = [entry["image"] for entry in datalist["training"] if entry["fold"] == fold]
        assert listed == [f"images/{case.id}.nii.gz" for case in split["test"]]
    assert datalist["labels"] == {"0": "background", "1": "left", "2": "right"}


def test_monai_reads_it_and_nobody_is_on_both_sides(pairs, tmp_path):
    datalist = fold_datalist(pairs / "pairs.yaml", pairs, num_folds=3)
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    for source in (datalist, str(tmp_path / "datalist.json")):
        training, validation = datafold_read(source, str(pairs), fold=1)
        assert (len(training), len(validation)) == (8, 4)
        people = [{(int(entry["image"].split("/s")[-1].split(".")[0]) + 1) // 2 for entry in side} for side in (training, validation)]
        assert not people[0] & people[1]
        assert all(entry["label"] == entry["image"].replace("images", "labels") for entry in training + validation)


def test_an_image_of_several_files_is_a_list(pairs, monkeypatch):
    """No layout finds such a case yet, but a case may have them."""
    cases = [
        replace(case, image=(case.image[0], pairs / "second" / case.image[0].name)) for case in find_cases(pairs, load_card(pairs / "pairs.yaml"))
    ]
    monkeypatch.setattr("densecal.integrations.datalist.find_cases", lambda root, card: cases)
    first = fold_datalist(pairs / "pairs.yaml", pairs, num_folds=2)["training"][0]
    assert first["image"] == ["images/s1.nii.gz", "second/s1.nii.gz"]


def test_errors_are_those_of_the_data(pairs):
    with pytest.raises(ValueError, match="Expected at least 7 subjects for `num_folds`, but the data set pairs has 6"):
        fold_datalist(pairs / "pairs.yaml", pairs, num_folds=7)
    with pytest.raises(ValueError, match="Expected `num_folds` to be 2 or more"):
        fold_datalist(pairs / "pairs.yaml", pairs, num_folds=1)
    with pytest.raises(FileNotFoundError, match=r"No folder .*nowhere for the data set pairs"):
        fold_datalist(pairs / "pairs.yaml", pairs / "nowhere")
