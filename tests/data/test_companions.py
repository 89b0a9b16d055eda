"""Companions of a label are cropped, turned and resampled with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pictures import CARD, VOID, make_scenes, save_label
from PIL import Image
from volumes import AFFINE, blob, save

from densecal.data.card import DataCard, load_card
from densecal.data.dataset import CaseDataset
from densecal.data.layouts import Case, Companion, find_cases
from densecal.data.validate import find_problems

PIPELINE = {
    "RandomScale": {"scale_limit": [-0.5, 1.0], "p": 1.0},
    "RandomCrop": {"pad_if_needed": True},
    "Rotate": {"limit": [-40, 40], "p": 0.7, "border_mode": 0},
    "HorizontalFlip": {"p": 0.5},
    "ColorJitter": {"p": 1.0},
}


@pytest.fixture
def volume(tmp_path: Path) -> tuple[Case, DataCard]:
    """A volume whose companions are its label, twice, and the one-hot of it."""
    image, label = blob((18, 16, 11), seed=1)
    label[0] = 9
    files = [save(tmp_path / f"{name}.nii.gz", values) for name, values in (("image", image), ("label", label), ("other", label))]
    one_hot = np.stack([label == c for c in range(3)], axis=-1).astype(np.float32)
    shares = save(tmp_path / "shares.nii.gz", one_hot)
    companions = (Companion("rater_labels", (files[1], files[2])), Companion("teacher_probs", (shares,), shares=True))
    card = DataCard(name="v", classes=["a", "b", "c"], ignore_index=9, patch_size=[14, 20, 8], foreground_fraction=0.5, cache=False)
    return Case("v", (files[0],), files[1], "v", companions=companions), card


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Case, DataCard]:
    """The same of an image; the shares are saved as predictions are."""
    card = replace(load_card(make_scenes(tmp_path)), pipeline=PIPELINE)
    case = find_cases(tmp_path, card)[0]
    assert case.label is not None
    label = np.asarray(Image.open(case.label))
    one_hot = np.stack([label == c for c in range(3)]).astype(np.float32)
    np.savez(tmp_path / "shares.npz", probs=one_hot)
    companions = (Companion("rater_labels", (case.label, case.label)), Companion("teacher_probs", (tmp_path / "shares.npz",), shares=True))
    return replace(case, companions=companions), card


@pytest.mark.parametrize("kind", ["volume", "scene"])
def test_patches_keep_companions_and_label_together(kind, request):
    case, card = request.getfixturevalue(kind)
    assert not find_problems([case], card)
    dataset = CaseDataset([case], card, train=True)
    inside = 0
    for seed in range(12):
        item = dataset[0, seed]
        label, raters, shares = item["label"].long(), item["rater_labels"].long(), item["teacher_probs"]
        assert raters.shape == (2, *card.patch_size)
        assert shares.shape == (3, *card.patch_size)
        assert shares.dtype == torch.float32
        assert torch.equal(raters, label.expand_as(raters))
        valid = label[0] != card.ignore_index
        inside += int((~valid).sum())
        true = shares.gather(0, label.where(valid, 0))[0][valid]
        # The nearest voxel has the label, and linear interpolation gives it at least an eighth.
        assert true.min() >= (1 / 8 if kind == "volume" else 1)
        assert true.mean() > 0.9
    assert inside, "no patch reached beyond the case, so padding was not tried"


@pytest.mark.parametrize("kind", ["volume", "scene"])
def test_companions_do_not_change_what_is_drawn(kind, request):
    case, card = request.getfixturevalue(kind)
    with_them, without = CaseDataset([case], card, train=True), CaseDataset([replace(case, companions=())], card, train=True)
    for seed in range(4):
        for name in ("image", "label"):
            assert torch.equal(with_them[0, seed][name], without[0, seed][name])


@pytest.mark.parametrize("kind", ["volume", "scene"])
def test_whole_cases_have_companions_as_stored(kind, request):
    case, card = request.getfixturevalue(kind)
    item = CaseDataset([case], card, train=False)[0]
    valid = item["label"] != card.ignore_index
    assert torch.equal(item["rater_labels"].long(), item["label"].long().expand_as(item["rater_labels"]))
    one_hot = torch.nn.functional.one_hot(item["label"][0].long().where(valid[0], 0), 3).movedim(-1, 0)
    assert torch.equal(item["teacher_probs"], torch.where(valid, one_hot, 0).float())


def test_resampling_takes_companions_along(volume):
    case, card = volume
    card = replace(card, spacing=[1.5, 1.0, 1.5], orientation="LPS")
    item = CaseDataset([case], card, train=False)[0]
    assert torch.equal(item["rater_labels"], item["label"].expand_as(item["rater_labels"]))
    assert item["teacher_probs"].shape == (3, *item["label"].shape[1:])
    valid = item["label"][0] != card.ignore_index
    agree = item["teacher_probs"].argmax(0)[valid] == item["label"][0][valid]
    assert agree.float().mean() > 0.9


def test_shares_go_on_beyond_a_volume(volume):
    case, card = volume
    card = replace(card, patch_size=[30, 30, 30], foreground_fraction=None, augment=False)
    item = CaseDataset([case], card, train=True)[0, 0]
    assert torch.equal(item["teacher_probs"][:, :, :, 0], item["teacher_probs"][:, :, :, 5])
    assert (item["label"][0, :, :, 0] == card.ignore_index).all()


def test_whole_numbers_are_shares_of_their_largest(tmp_path):
    from densecal.data.images.files import read_shares

    np.savez_compressed(tmp_path / "s.npz", probs=np.array([0, 51, 255], np.uint8).reshape(3, 1, 1))
    assert read_shares(tmp_path / "s.npz").ravel().tolist() == pytest.approx([0, 0.2, 1])


def test_bad_companions_are_named(volume, scene, tmp_path):
    case, card = volume
    bad = save(tmp_path / "bad.nii.gz", np.full((18, 16, 11), 7, np.uint8))
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] = 4
    far = save(tmp_path / "far.nii.gz", np.zeros((18, 16, 11), np.uint8), elsewhere)
    too_much = tmp_path / "much.nii.gz"
    nib.save(nib.Nifti1Image(np.full((18, 16, 11, 3), 2, np.float32), AFFINE), too_much)
    companions = (Companion("rater_labels", (bad, far, tmp_path / "none.nii.gz")), Companion("teacher_probs", (too_much,), shares=True))
    found = [str(problem) for problem in find_problems([replace(case, companions=companions)], card)]
    assert len(found) == 4
    for text, (name, words) in zip(
        found,
        [("bad", "outside the card's classes"), ("far", "lies elsewhere"), ("none", "is missing"), ("much", "in [0, 1], but got 2")],
        strict=True,
    ):
        assert name in text
        assert words in text

    case, card = scene
    small = save_label(tmp_path / "small.png", np.full((5, 6), VOID, np.uint8))
    found = [str(p) for p in find_problems([replace(case, companions=(Companion("rater_labels", (small,)),))], card)]
    assert len(found) == 1
    assert "small.png: is 5 x 6" in found[0]


def test_classes_beside_soft_labels_are_refused(tmp_path):
    card = DataCard(**(CARD | {"soft_labels": True, "ignore_index": -100, "case_lists": None, "split_names": {}, "palette": []}))
    shares = np.zeros((8, 8, 3), np.float32)
    shares[..., 0] = 1
    np.save(tmp_path / "l.npy", shares)
    label = save_label(tmp_path / "other.png", np.zeros((8, 8), np.uint8))
    case = Case(
        "c", (save_label(tmp_path / "i.png", np.zeros((8, 8), np.uint8)),), tmp_path / "l.npy", "c", companions=(Companion("rater_labels", (label,)),)
    )
    with pytest.raises(RuntimeError, match=r"other\.png: cannot be loaded .*rater_labels holds classes"):
        CaseDataset([case], card, train=False)[0]
