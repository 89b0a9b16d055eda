"""Several raters per case: where their files lie, what becomes of them, what the check says of them."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_targets as reference
import torch
from panels import RATERS, make_panel
from pictures import save_image, save_label
from PIL import Image
from torch.utils.data import DataLoader
from volumes import AFFINE, save

from densecal.cli.check_data import main
from densecal.data import PredictionFolder, SegmentationData
from densecal.data.card import RATER_FUSIONS, DataCard
from densecal.data.card_labels import CardLabels
from densecal.data.dataset import CaseDataset
from densecal.data.layouts import find_cases
from densecal.data.raters import draw, fuse, majority_of_raters, mean_of_raters, pairwise_dice, staple_of_raters
from densecal.data.validate import find_problems
from densecal.data.volumes.nifti import read_nifti
from densecal.targets import RaterMeanTarget

each_kind = pytest.mark.parametrize("kind", ["images", "volumes"])
needs_simpleitk = pytest.mark.skipif(importlib.util.find_spec("SimpleITK") is None, reason="no SimpleITK")


def stored(case: Any) -> torch.Tensor:
    """The raters' label maps of a case as their files hold them, ``(R, *spatial)``."""
    read = [np.asarray(Image.open(f)) if f.suffix == ".png" else np.asarray(read_nifti(f).dataobj) for f in case.raters]
    return torch.from_numpy(np.stack(read).astype(np.int64))


def votes(raters: torch.Tensor, ignore: int = 9) -> dict[tuple[int, ...], list[int]]:
    """Pixel by pixel the classes that were chosen."""
    pixels = itertools.product(*map(range, raters.shape[1:]))
    return {pixel: [c for c in raters[(slice(None), *pixel)].tolist() if c != ignore] for pixel in pixels}


# Fusion


@pytest.mark.parametrize("spatial", [(5, 7), (3, 5, 4)], ids=["2d", "3d"])
def test_fusions_equal_loops(spatial: tuple[int, ...]) -> None:
    raters = torch.randint(0, 4, (5, *spatial), generator=torch.Generator().manual_seed(0))
    raters = torch.where(raters == 3, 9, raters)
    raters[:, 0] = 9  # nobody
    mean = mean_of_raters(raters, 3, ignore_index=9)
    torch.testing.assert_close(mean, reference.rater_mean(torch.where(raters == 9, -100, raters).unsqueeze(0), 3)[0].float())
    majority = majority_of_raters(raters, 3, ignore_index=9)[0]
    for pixel, chosen in votes(raters).items():
        expected = min(range(3), key=lambda c: (-chosen.count(c), c)) if chosen else 9
        assert majority[pixel] == expected


def test_every_fusion_of_the_card_is_there() -> None:
    raters = torch.tensor([[[0, 1], [1, 9]], [[0, 1], [0, 9]]])
    shapes = {name: tuple(fuse(raters, 2, name, ignore_index=9).shape) for name in RATER_FUSIONS if name != "staple"}
    assert shapes == {"mean": (2, 2, 2), "majority": (1, 2, 2), "random": (2, 2, 2), "all": (1, 2, 2)}


@needs_simpleitk
@pytest.mark.parametrize("spatial", [(12, 12), (6, 8, 8)], ids=["2d", "3d"])
def test_staple_trusts_those_who_agree(spatial: tuple[int, ...]) -> None:
    truth = torch.zeros(spatial, dtype=torch.long)
    truth[tuple(slice(2, n // 2 + 2) for n in spatial)] = 1
    wild = (torch.rand(spatial, generator=torch.Generator().manual_seed(0)) < 0.4).long()
    raters = torch.stack([truth, wild, truth.clone(), wild.roll(1, 0), truth.clone()])
    raters[:, 0] = 9
    fused = staple_of_raters(raters, 2, ignore_index=9)[0]
    assert torch.equal(fused, torch.where(raters[0] == 9, 9, truth))
    assert torch.equal(staple_of_raters(raters[:1], 2, ignore_index=9)[0], raters[0])


@needs_simpleitk
def test_staple_of_two_who_contradict_each_other_has_a_class_everywhere() -> None:
    raters = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).long()
    assert set(staple_of_raters(raters, 2, ignore_index=9).unique().tolist()) <= {0, 1}


def test_staple_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ("images", "volumes"):
        with pytest.raises(ValueError, match=r"rater_fusion: staple needs SimpleITK. Install it with `pip install 'densecal\[raters\]'`"):
            SegmentationData(make_panel(tmp_path / kind, kind, cases=4, rater_fusion="staple"), progress=False)


def test_pairwise_dice_equals_loops() -> None:
    raters = torch.randint(0, 4, (4, 6, 5), generator=torch.Generator().manual_seed(1))
    raters = torch.where(raters == 3, 9, raters)
    pairs = []
    for a, b in itertools.combinations(raters, 2):
        dice = []
        for c in (1, 2):
            both = [(x == c, y == c) for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True) if 9 not in (x, y)]
            dice.append(2 * sum(x and y for x, y in both) / sum(x + y for x, y in both))
        pairs.append(sum(dice) / 2)
    assert pairwise_dice(raters, 3, background=0, ignore_index=9) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(pairwise_dice(raters[:1], 3, background=0, ignore_index=9))
    assert math.isnan(pairwise_dice(torch.zeros(2, 3).long(), 3, background=0, ignore_index=9))


# Layout


@each_kind
def test_cases_have_the_files_of_their_raters(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=3)
    cases = find_cases(tmp_path, card)
    assert [case.id for case in cases] == ["s1", "s2", "s3"]
    ending = ".png" if kind == "images" else ".nii.gz"
    for case in cases:
        assert case.raters == tuple(tmp_path / case.id / f"mask_{rater}{ending}" for rater in RATERS)
        assert case.label == case.raters[0]
        assert case.files == (case.image[0], *case.raters)
        assert not case.companions
    two = find_cases(tmp_path, replace(card, raters=["cleo", "anna"]))
    assert two[0].raters == (tmp_path / "s1" / f"mask_cleo{ending}", tmp_path / "s1" / f"mask_anna{ending}")


def test_raters_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["1", "2", "10", "x1", "x02", "x10"]
    for name in names:
        save_image(tmp_path / "masks" / name / "a.png", np.zeros((4, 4), np.uint8))
    save_image(tmp_path / "images" / "a.png", np.zeros((4, 4), np.uint8))
    (case,) = find_cases(tmp_path, DataCard("x", ["a", "b"], rater_files=["masks/{rater}/{id}.png"], patch_size=[4, 4]))
    assert [file.parent.name for file in case.raters] == names


def test_of_several_patterns_the_first_that_finds_a_file_of_a_rater_counts(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png", np.zeros((4, 4), np.uint8))
    for folder, rater in (("new", "r1"), ("old", "r1"), ("old", "r2")):
        save_image(tmp_path / folder / rater / "a.png", np.zeros((4, 4), np.uint8))
    card = DataCard("x", ["a", "b"], rater_files=["new/{rater}/{id}.png", "old/{rater}/{id}.png"], patch_size=[4, 4])
    (case,) = find_cases(tmp_path, card)
    assert [file.relative_to(tmp_path).as_posix() for file in case.raters] == ["new/r1/a.png", "old/r2/a.png"]


@each_kind
def test_missing_raters_are_named_or_allowed(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=3, missing=((2, 1),))
    (problem,) = find_problems(find_cases(tmp_path, card), card)
    assert problem.case_id == "s2"
    assert "mask_ben" in problem.file.name
    assert "is missing" in str(problem)
    assert "or set `missing_raters: true` in the card if not every rater rated every case" in str(problem)
    card = replace(card, missing_raters=True, rater_fusion="all")
    cases = find_cases(tmp_path, card)
    assert not find_problems(cases, card)
    assert [len(case.raters) for case in cases] == [3, 2, 3]
    assert [[file is not None for file in case.companions[0].files] for case in cases] == [[True] * 3, [True, False, True], [True] * 3]


def test_a_case_without_any_rater_is_a_problem(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "images", cases=2, missing=((2, 0), (2, 1), (2, 2)), missing_raters=True)
    found = find_problems(find_cases(tmp_path, card), card)
    assert {problem.case_id for problem in found} == {"s2"}
    assert all("is missing" in str(problem) for problem in found)


def test_a_rater_that_is_not_there_is_named(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "images", cases=2, raters=["anna", "bem"])
    with pytest.raises(ValueError, match=r"`raters` of the card panel names 'bem', .* Did you mean 'ben'\?"):
        find_cases(tmp_path, card)


def test_two_files_of_one_rater_are_a_problem(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "images", cases=1)
    save_image(tmp_path / "s1" / "mask_anna.tif", np.zeros((41, 51), np.uint8))
    found = [str(problem) for problem in find_problems(find_cases(tmp_path, card), card)]
    assert any("is a second label of the case 's1'" in text and "mask_anna" in text for text in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rater_files": [], "rater_fusion": "random"}, "`rater_fusion` random needs `rater_files`"),
        ({"rater_files": [], "raters": ["a"]}, "`raters` needs `rater_files`"),
        ({"rater_files": [], "missing_raters": True}, "`missing_raters` needs `rater_files`"),
        ({"rater_fusion": "median"}, "Expected `rater_fusion` to be one of"),
        ({"rater_files": ["masks/{id}.png"]}, r"Expected `rater_files` to hold {rater}"),
        ({"rater_files": ["masks/{rater}.png"]}, r"Expected `image_files` and `rater_files` to hold {id}"),
        ({"soft_labels": True}, "Expected `rater_files` or `soft_labels`, but got both"),
        ({"label_files": ["l/{id}.png"]}, "Expected `rater_files` or `label_files`, but got both"),
        ({"layout": "decathlon", "patch_size": [8, 8, 8]}, "`rater_files` needs `layout` paired"),
    ],
)
def test_cards_say_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCard(**({"name": "x", "classes": ["a", "b"], "rater_files": ["{rater}/{id}.png"], "patch_size": [8, 8]} | changes))


# Loading


@each_kind
@pytest.mark.parametrize("fusion", [name for name in RATER_FUSIONS if name != "staple"])
def test_whole_cases_are_the_mean_whatever_the_fusion(kind: str, fusion: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=2, missing=((2, 0),), missing_raters=True, rater_fusion=fusion)
    cases = find_cases(tmp_path, card)
    dataset = CaseDataset(cases, card, train=False)
    for n, case in enumerate(cases):
        label = dataset[n]["label"]
        assert torch.equal(label, mean_of_raters(stored(case), len(card.classes), ignore_index=9))
        assert label.dtype == torch.float32


@each_kind
@pytest.mark.parametrize("fusion", RATER_FUSIONS)
def test_training_labels_are_what_the_fusion_says(kind: str, fusion: str, tmp_path: Path) -> None:
    if fusion == "staple":
        pytest.importorskip("SimpleITK")
    size = [43, 52] if kind == "images" else [14, 13, 10]  # the whole case and some padding
    card = make_panel(tmp_path, kind, cases=1, rater_fusion=fusion, augment=False, patch_size=size)
    (case,) = find_cases(tmp_path, card)
    raters = stored(case)
    item = CaseDataset([case], card, train=True)[0, 5]
    label = item["label"]
    expected = raters[draw(5, 3)].unsqueeze(0) if fusion == "random" else fuse(raters, len(card.classes), fusion, ignore_index=9)
    inside = (item["image"] != 0).any(0)  # padding is exactly 0
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in torch.nonzero(inside).T)
    assert torch.equal(label[(slice(None), *box)].to(expected.dtype), expected)
    if fusion == "all":
        assert torch.equal(item["rater_labels"][(slice(None), *box)].long(), raters)
        assert set(item["rater_labels"].unique().tolist()) <= {0, 1, 2, 9}
    else:
        assert "rater_labels" not in item


@each_kind
def test_a_drawn_rater_follows_from_the_seed_alone(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=2, rater_fusion="random")
    cases = find_cases(tmp_path, card)
    first, again = CaseDataset(cases, card, train=True), CaseDataset(cases, card, train=True)
    again.fill_cache()
    keys = [(n, seed) for n in range(2) for seed in range(6)]
    items = {key: first[key]["label"] for key in keys}
    for key in reversed(keys):
        assert torch.equal(again[key]["label"], items[key])
    assert {draw(seed, 3) for seed in range(6)} == {0, 1, 2}


@each_kind
def test_a_drawn_rater_does_not_change_what_else_is_drawn(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=1, rater_fusion="random")
    cases = find_cases(tmp_path, card)
    for seed in range(3):
        drawn = CaseDataset(cases, card, train=True)[0, seed]
        alone = CaseDataset(find_cases(tmp_path, replace(card, raters=[RATERS[draw(seed, 3)]])), replace(card, rater_fusion="majority"), train=True)[
            0, seed
        ]
        if kind == "images":  # patches of volumes are centred on the foreground, which is that of all raters
            assert torch.equal(drawn["image"], alone["image"])
            assert torch.equal(drawn["label"], alone["label"])
        assert drawn["label"].shape == alone["label"].shape


@each_kind
def test_batches_hold_as_many_raters_as_the_set_has(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=2, missing=((2, 1),), missing_raters=True, rater_fusion="all")
    cases = find_cases(tmp_path, card)
    dataset = CaseDataset(cases, card, train=True)
    batch = next(iter(DataLoader([dataset[0, 1], dataset[1, 1]], batch_size=2)))
    assert batch["rater_labels"].shape == (2, 3, *card.patch_size)
    assert (batch["rater_labels"][1, 1] == 9).all()
    assert (batch["rater_labels"][0, 1] != 9).any()


def test_patches_keep_raters_and_label_together(tmp_path: Path) -> None:
    pipeline = {"RandomScale": {"scale_limit": [-0.5, 1.0], "p": 1.0}, "RandomCrop": {"pad_if_needed": True}, "HorizontalFlip": {"p": 0.5}}
    for kind, changes in (("images", {"pipeline": pipeline}), ("volumes", {})):
        card = make_panel(tmp_path / kind, kind, cases=1, rater_fusion="all", **changes)
        dataset = CaseDataset(find_cases(tmp_path / kind, card), card, train=True)
        for seed in range(6):
            item = dataset[0, seed]
            majority = majority_of_raters(item["rater_labels"].long(), len(card.classes), ignore_index=9)
            assert torch.equal(item["label"].long(), majority)


def test_the_mean_of_volumes_is_resampled_as_shares(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "volumes", cases=1, spacing=[1.0, 1.5, 1.0], orientation="LPS")
    label = CaseDataset(find_cases(tmp_path, card), card, train=False)[0]["label"]
    known = label.sum(0) > 0
    torch.testing.assert_close(label.sum(0)[known], torch.ones(int(known.sum())))
    thirds = (label * 3).round() / 3
    assert (label - thirds).abs().max() > 0.01  # between voxels, shares of three raters are no thirds


def test_headers_that_differ_by_rounding_are_one_grid(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "volumes", cases=1)
    file = tmp_path / "s1" / "mask_ben.nii.gz"
    moved = AFFINE.copy()
    moved[0, 1] = 1e-6
    save(file, np.asarray(read_nifti(file).dataobj), moved)
    assert not find_problems(find_cases(tmp_path, card), card)
    assert CaseDataset(find_cases(tmp_path, card), card, train=False)[0]["label"].shape[0] == 3


def test_colours_of_raters_are_read_as_labels_are(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png", np.arange(16, dtype=np.uint8).reshape(4, 4))
    red = np.zeros((4, 4, 3), np.uint8)
    red[:2] = (255, 0, 0)
    for name, picture in (("x", red), ("y", np.zeros_like(red)), ("z", red)):
        save_image(tmp_path / name / "a.png", picture)
    colours = {"label_encoding": "color", "palette": [[0, 0, 0], [255, 0, 0]]}
    card = DataCard("c", ["a", "b"], rater_files=["{rater}/{id}.png"], raters=["x", "y", "z"], patch_size=[4, 4], **colours)
    case = find_cases(tmp_path, card)[0]
    shares = CaseDataset([case], card, train=False)[0]["label"][1]
    assert shares[0].tolist() == pytest.approx([2 / 3] * 4)
    assert shares[3].tolist() == [0] * 4


def test_unknown_numbers_of_a_rater_are_named(tmp_path: Path) -> None:
    card = make_panel(tmp_path, "images", cases=1)
    save_label(tmp_path / "s1" / "mask_ben.png", np.full((41, 51), 7, np.uint8))
    (problem,) = find_problems(find_cases(tmp_path, card), card)
    assert "mask_ben.png: has labels outside the card's classes 0 to 1: 7" in str(problem)


# Check and references


@each_kind
def test_check_covers_every_rater(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=3, rater_fusion="all")
    ending = "png" if kind == "images" else "nii.gz"
    bad = tmp_path / "s2" / f"mask_cleo.{ending}"
    if kind == "images":
        save_image(bad, np.zeros((5, 6), np.uint8))
    else:
        save(bad, np.zeros((5, 6, 7), np.uint8))
    (tmp_path / "s3" / f"mask_ben.{ending}").write_bytes(b"nothing")
    found = [str(problem) for problem in find_problems(find_cases(tmp_path, card), card)]
    assert len(found) == 2
    assert "mask_cleo" in found[0]
    assert "5 x 6" in found[0] or "(5, 6, 7)" in found[0]
    assert "mask_ben" in found[1]
    assert "cannot be read" in found[1]


@each_kind
def test_check_reports_agreement(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = make_panel(tmp_path, kind, cases=6, missing=((1, 0),), missing_raters=True)
    settings = {"classes": card.classes, "rater_files": card.rater_files, "image_files": card.image_files, "ignore_index": 9}
    settings |= {"patch_size": card.patch_size, "image_channels": card.image_channels, "missing_raters": True}
    (tmp_path / "panel.yaml").write_text(
        "\n".join(f"{key}: {value!r}" if key != "missing_raters" else "missing_raters: true" for key, value in settings.items())
    )
    main([str(tmp_path / "panel.yaml"), "--root", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    dice = [pairwise_dice(stored(case), len(card.classes), background=0, ignore_index=9) for case in find_cases(tmp_path, card)]
    spelled = f"{np.mean(dice):.4f} ({min(dice):.4f} to {max(dice):.4f})"
    assert f"  raters   2 to 3 per case; Dice of each two {spelled}" in lines
    assert lines[-1] == "  no problems"


@each_kind
def test_class_shares_are_those_of_the_mean(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=4, rater_fusion="random")
    data = SegmentationData(card, progress=False)
    for split in ("train", "test"):
        for case, fact in zip(data.splits[split], data.facts(split), strict=True):
            mean = mean_of_raters(stored(case), len(card.classes), ignore_index=9).flatten(1).double()
            assert fact.label_voxels.tolist() == pytest.approx(mean.sum(1).tolist())
            assert fact.ignored_voxels == int((mean.sum(0) == 0).sum())


@each_kind
def test_saved_predictions_meet_the_mean(kind: str, tmp_path: Path) -> None:
    card = make_panel(tmp_path, kind, cases=2, rater_fusion="majority")
    cases = find_cases(tmp_path, card)
    labels = CardLabels(card, cases, tmp_path)
    for case in cases:
        file = labels.open(labels.files[case.id])
        values = torch.from_numpy(file.read())
        mean = mean_of_raters(stored(case), len(card.classes), ignore_index=9)
        assert torch.equal(values if kind == "images" else values.movedim(-1, 0), mean)


# Regions


def of_regions(raters: torch.Tensor, regions: dict[str, list[int]], ignore: int = 9) -> torch.Tensor:
    """Which regions each rater sees, ``(R, K, *spatial)``."""
    inside = torch.stack([torch.stack([torch.isin(one, torch.tensor(classes)) for classes in regions.values()]) for one in raters])
    return torch.where((raters == ignore).unsqueeze(1), ignore, inside.long())


def region_shares(raters: torch.Tensor, regions: dict[str, list[int]], ignore: int = 9) -> torch.Tensor:
    """Share of the raters with a class who see each region, ``(K, *spatial)``."""
    maps = of_regions(raters, regions, ignore).double()
    counted = (maps != ignore).sum(0)
    return torch.where(counted > 0, torch.where(maps == ignore, 0, maps).sum(0) / counted.clamp(min=1), float(ignore)).float()


REGIONS = {"images": {"car": [1]}, "volumes": {"right": [2], "both": [1, 2]}}


@each_kind
def test_regions_are_made_of_every_rater(kind: str, tmp_path: Path) -> None:
    """A task sees one map per rater and region; the mean of them is what the mean of the raters would have been."""
    size = [43, 52] if kind == "images" else [14, 13, 10]
    card = make_panel(tmp_path, kind, cases=6, rater_fusion="all", augment=False, patch_size=size, regions=REGIONS[kind])
    data = SegmentationData(card, progress=False)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    count = len(REGIONS[kind])
    assert batch["label"].shape == (2, count, *size)
    assert batch["rater_labels"].shape == (2, 3, count, *size)
    target = RaterMeanTarget(activation="sigmoid", ignore_index=9)
    probs = target(batch["label"], count, spatial_dims=len(size), context={"rater_labels": batch["rater_labels"]}).probs
    for case_id, image, raters, mean in zip(batch["case_id"], batch["image"], batch["rater_labels"], probs, strict=True):
        (case,) = (case for case in data.splits["train"] if case.id == case_id)
        inside = (image != 0).any(0)  # padding is exactly 0
        box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in torch.nonzero(inside).T)
        assert torch.equal(raters[(slice(None), slice(None), *box)].long(), of_regions(stored(case), REGIONS[kind]))
        shares = region_shares(stored(case), REGIONS[kind])
        torch.testing.assert_close(mean[(slice(None), *box)], torch.where(shares == 9, 0.0, shares))


@each_kind
def test_regions_are_held_against_the_share_of_the_raters(kind: str, tmp_path: Path) -> None:
    """In validation, of a run and of saved probabilities."""
    card = make_panel(tmp_path, kind, cases=6, rater_fusion="random", regions=REGIONS[kind])
    data = SegmentationData(card, progress=False)
    for batch in data.val_dataloader():
        (case,) = (case for case in data.splits["val"] if case.id == batch["case_id"][0])
        expected = region_shares(stored(case), REGIONS[kind])
        torch.testing.assert_close(data.on_after_batch_transfer(batch, 0)["label"][0], expected)
        labels = CardLabels(card, [case], tmp_path)
        values = torch.from_numpy(labels.open(labels.files[case.id]).read())
        torch.testing.assert_close(values if kind == "images" else values.movedim(-1, 0), expected)
        folder = tmp_path / f"probs_{case.id}"
        folder.mkdir()
        np.savez(folder / f"{case.id}_probs.npz", probs=np.full(expected.shape, 0.5, np.float32))
        torch.testing.assert_close(PredictionFolder(folder, labels)[case.id].label.float(), expected)
