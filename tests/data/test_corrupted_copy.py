"""A copy of a data set with errors: read by the same card, different in nothing but the pixels that its list tells of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pictures import make_scenes, save_label
from PIL import Image

from densecal.data.card import DataCard, load_card, override_card
from densecal.data.corrupted_copy import RECORD, read_known_errors, write_corrupted_copy
from densecal.data.images.files import read_label
from densecal.data.images.rewrite import read_classes, rewrite_classes
from densecal.data.label_noise import corrupt_label
from densecal.data.layouts import Companion, find_cases
from densecal.data.medium import medium_of
from densecal.data.validate import find_problems
from densecal.data.volumes.labels import rewrite_classes as rewrite_volume


def copy(card: DataCard, output: Path, **options):
    root = Path(card.root)
    settings = {"errors": [("dilation", 1.0), ("erosion", 2.0)], "count": 3, "seed": 0} | options
    return write_corrupted_copy(root, card, find_cases(root, card), output, **settings)


@pytest.mark.parametrize("link", [True, False], ids=["linked", "copied"])
def test_copy_of_volumes_is_read_by_its_card(make_set, tmp_path, link):
    card = make_set(6)
    known = copy(card, tmp_path / "noisy", link=link)
    there = override_card(card, {"root": str(tmp_path / "noisy")})
    cases, originals = find_cases(tmp_path / "noisy", there), find_cases(Path(card.root), card)
    assert find_problems(cases, there) == []
    assert [case.id for case in cases] == [case.id for case in originals]
    listed = read_known_errors(tmp_path / "noisy" / RECORD)
    assert list(listed) == [one.case_id for one in known] == sorted(listed)
    assert sorted(one.kind for one in known) == ["dilation", "dilation", "erosion"]
    for case, original in zip(cases, originals, strict=True):
        before, after = nib.load(original.label), nib.load(case.label)
        assert original.image[0].read_bytes() == case.image[0].read_bytes()
        assert case.image[0].is_symlink() == link
        if case.id not in listed:
            assert case.label.read_bytes() == original.label.read_bytes()
            continue
        one = listed[case.id]
        assert after.header == before.header
        assert after.get_data_dtype() == np.uint8
        expected = corrupt_label(before.get_fdata(), one.kind, one.severity, num_classes=3, seed=one.seed, spacing=(1, 1, 2))
        assert np.array_equal(after.get_fdata(), expected)
        assert one.changed == (expected != before.get_fdata()).sum() > 0
        assert 0 < one.dice < 1


def test_choice_follows_from_the_seed_and_the_names(make_set, tmp_path):
    card = make_set(6)
    first, again, other = (copy(card, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first == again != other
    some = copy(card, tmp_path / "d", among=["s002", "s003"], count=2)
    assert [one.case_id for one in some] == ["s002", "s003"]


def test_copy_of_images_keeps_lists_palettes_and_void(tmp_path):
    card = override_card(load_card(make_scenes(tmp_path / "set")), {"root": str(tmp_path / "set")})
    known = copy(card, tmp_path / "noisy", errors=[("shift", 5.0)], count=9)
    assert len(known) == 9
    there = override_card(card, {"root": str(tmp_path / "noisy")})
    cases = find_cases(tmp_path / "noisy", there)
    assert [case.id for case in cases] == [case.id for case in find_cases(tmp_path / "set", card)]
    assert find_problems(cases, there) == []
    for case in cases:
        before, after = (Image.open(tmp_path / name / "labels" / case.label.name) for name in ("set", "noisy"))
        assert after.mode == "P"
        assert after.getpalette() == before.getpalette()
        assert np.array_equal(np.asarray(after) == 255, np.asarray(before) == 255)
        assert (np.asarray(after) != np.asarray(before)).any()


def test_companions_of_a_case_come_along(make_set, tmp_path):
    card = make_set(2)
    root = Path(card.root)
    (root / "raters").mkdir()
    (root / "raters" / "s001.nii.gz").write_bytes(b"a second opinion")
    cases = find_cases(root, card)
    cases[0] = replace(cases[0], companions=(Companion("rater_labels", (root / "raters" / "s001.nii.gz",)),))
    write_corrupted_copy(root, card, cases, tmp_path / "noisy", errors=[("dilation", 1.0)], count=1, seed=0)
    assert (tmp_path / "noisy" / "raters" / "s001.nii.gz").read_bytes() == b"a second opinion"


def painted(tmp_path: Path, form: str) -> tuple[Path, DataCard]:
    """A label of two classes in one of the forms that files have."""
    label = np.zeros((6, 8), np.uint8)
    label[1:3, 2:5] = 1
    settings: dict[str, object] = {"patch_size": [8, 8], "background": None, "ignore_index": 255}
    path = tmp_path / f"{form}.png"
    if form == "palette":
        save_label(path, label)
    elif form == "bit":
        Image.fromarray(label.astype(bool)).save(path)
        settings |= {"label_values": [0, 255], "ignore_index": -100}
    elif form == "ranges":
        Image.fromarray(np.where(label == 1, 200, 3).astype(np.uint8)).save(path)
        settings |= {"label_values": [[7, "0-6"], "128-255"], "ignore_index": -100}
    elif form == "16bit":
        Image.fromarray(np.where(label == 1, 40000, 0).astype(np.uint16)).save(path)
        settings["label_values"] = [0, 40000]
    elif form == "grey-in-colours":
        Image.fromarray(np.repeat(label[..., None], 3, axis=2)).save(path)
    elif form in ("colours", "opacity", "palette-colours"):
        colors = np.array([[10, 20, 30], [200, 0, 9]], np.uint8)
        settings |= {"label_encoding": "color", "palette": colors.tolist()}
        pixels = colors[label]
        if form == "opacity":
            pixels = np.concatenate([pixels, np.full((6, 8, 1), 77, np.uint8)], axis=2)
        if form == "palette-colours":
            save_label(path, 1 - label, colors[::-1].tolist())
        else:
            Image.fromarray(pixels).save(path)
    else:
        path = path.with_suffix(f".{form}")
        (np.save if form == "npy" else np.savez)(path, label)
    return path, DataCard("painted", ["rest", "thing"], **settings)


@pytest.mark.parametrize("form", ["palette", "bit", "ranges", "16bit", "grey-in-colours", "colours", "opacity", "palette-colours", "npy", "npz"])
def test_rewritten_image_label_differs_where_classes_do(tmp_path, form):
    path, card = painted(tmp_path, form)
    label_map = read_classes(path, card)
    assert (label_map == 1).sum() == 6
    wanted = np.roll(label_map, 1, axis=0)
    copied = rewrite_classes(path, tmp_path / "copy" / path.name, wanted, card)
    assert np.array_equal(read_classes(copied, card), wanted)
    before, after = read_label(path).values, read_label(copied).values
    same = wanted == label_map
    assert before.dtype == after.dtype
    assert np.array_equal(before[same], after[same])
    if path.suffix == ".png":
        assert Image.open(copied).mode == Image.open(path).mode
        assert Image.open(copied).getpalette() == Image.open(path).getpalette()
    if form == "opacity":
        assert (np.asarray(Image.open(copied))[..., 3] == 77).all()


def test_scaled_volume_is_stored_plainly(tmp_path):
    values = np.zeros((4, 5, 6), np.int16)
    values[1:3, 1:3, 1:3] = 100
    image = nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(0.01, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    wanted = np.full((4, 5, 6), 1)
    copied = nib.load(rewrite_volume(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", wanted))
    assert np.array_equal(copied.get_fdata(), wanted)
    assert np.array_equal(copied.affine, image.affine)


def test_copy_errors_leave_nothing_behind(make_set, tmp_path):
    card = make_set(4)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for output, options, message in (
        (full, {}, "full is not empty"),
        (Path(card.root) / "noisy", {}, "lie in one another"),
        (tmp_path, {}, "lie in one another"),
        (tmp_path / "new", {"count": 5}, r"Expected 5 label maps that such errors change \(dilation 1, erosion 2\), but found 4 among 4"),
        (tmp_path / "new", {"errors": [("dilation", 0.1)]}, "but found 0 among 4. Raise the severity"),
        (tmp_path / "new", {"errors": [("missing", 2.0)]}, "Expected `severity` of missing"),
    ):
        with pytest.raises(ValueError, match=message):
            copy(card, output, **options)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="shares of classes"):
        copy(make_set(2, folder="soft", soft=True), tmp_path / "new")


def test_copy_names_a_damaged_label(make_set, tmp_path):
    card = make_set(3)
    (Path(card.root) / "labelsTr" / "s002.nii.gz").write_bytes(b"no label")
    with pytest.raises(ValueError, match=r"s002.nii.gz: cannot be read .* densecal-check looks at every file"):
        copy(card, tmp_path / "noisy", count=3)
    assert not (tmp_path / "noisy").exists()


def test_labels_that_cannot_be_written(tmp_path):
    card = DataCard("wide", ["a", "b"], patch_size=[8, 8], background=None, label_values=[0, 300])
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="its uint8 cannot hold 300"):
        rewrite_classes(tmp_path / "a.png", tmp_path / "b.png", np.ones((4, 4), np.int64), card)
    with pytest.raises(ValueError, match=r"labels in .gif files cannot be written"):
        rewrite_classes(tmp_path / "a.gif", tmp_path / "b.gif", np.ones((4, 4), np.int64), card)
    assert medium_of(card).read_label(tmp_path / "a.png", card)[1] == ()


def test_read_known_errors_refuses_another_table(tmp_path):
    (tmp_path / "a.csv").write_text("case_id,kind\ns1,shift\n")
    with pytest.raises(ValueError, match=r"a.csv: is no corruptions.csv of densecal-corrupt"):
        read_known_errors(tmp_path / "a.csv")


def test_regions_change_nothing(make_set, tmp_path):
    """Errors are made in the classes of the files."""
    card = make_set(4)
    of_classes = copy(card, tmp_path / "classes")
    assert copy(override_card(card, {"regions": {"whole": [1, 2]}}), tmp_path / "regions") == of_classes
    for one in of_classes:
        (path,) = (tmp_path / "classes").rglob(f"labels*/{one.case_id}.nii.gz")
        again = tmp_path / "regions" / path.relative_to(tmp_path / "classes")
        assert np.array_equal(nib.load(again).get_fdata(), nib.load(path).get_fdata())
