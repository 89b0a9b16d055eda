"""Trees as the official releases lay them out, read back through the cards that densecal brings."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import SHAPE, mask, photo, save, voc_palette
from PIL import Image, ImageDraw
from scipy.io import savemat
from volumes import save as save_volume

from densecal.data.card import DataCard, list_cards, load_card, override_card
from densecal.data.dataset import CaseDataset
from densecal.data.layouts import find_cases
from densecal.data.split import split_cases
from densecal.data.validate import find_problems, survey
from densecal.resources import cards_dir

Masks = dict[str, np.ndarray]


def read_back(root: Path, card: DataCard) -> dict[str, Masks]:
    """Label maps of each split by case id, through everything that training and testing does with a file."""
    cases = find_cases(root, card)
    assert find_problems(cases, card) == []
    items = {split: list(map(CaseDataset(side, card, train=False).__getitem__, range(len(side)))) for split, side in split_cases(cases, card).items()}
    for item in (item for side in items.values() for item in side):
        assert item["image"].shape == (card.image_channels, *item["label"].shape[1:])
    return {split: {item["case_id"]: item["label"][0].numpy() for item in side} for split, side in items.items()}


def assert_same(found: Masks, expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, label in expected.items():
        np.testing.assert_array_equal(found[name], label, err_msg=name)


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# PASCAL VOC and the Semantic Boundaries Dataset


def voc_mask(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """All 21 classes with a band of 255 around two of them."""
    label = mask([*range(21), 255], seed, shape)
    label[:, 7] = label[11] = 255
    return label


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, dict[str, Masks]]:
    """VOC2012 with three images to train, two to test and one without a mask."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    masks = {"train": {f"2007_00003{n}": voc_mask(n, (24 + n, 40 - n)) for n in (2, 3, 9)}, "val": {f"2007_0000{n}": voc_mask(n) for n in (42, 61)}}
    for names in masks.values():
        for name, label in names.items():
            save(root / "JPEGImages" / f"{name}.jpg", photo(1, label.shape))
            save(root / "SegmentationClass" / f"{name}.png", label, palette=voc_palette())
    save(root / "JPEGImages" / "2008_000001.jpg", photo(2))
    lists = root / "ImageSets" / "Segmentation"
    for split, names in {**masks, "trainval": [*masks["train"], *masks["val"]]}.items():
        write_lines(lists / f"{split}.txt", *names)
    return root, masks


def test_pascal_voc(voc: tuple[Path, dict[str, Masks]]) -> None:
    root, masks = voc
    found = read_back(root, load_card("voc"))
    assert_same(found["train"], masks["train"])
    assert_same(found["test"], masks["val"])
    assert found["val"] == {}


def test_pascal_voc_palette_is_the_official_one() -> None:
    for name in ("pascal_voc", "pascal_voc_aug"):
        assert load_card(name).palette == voc_palette()[:21].tolist()


def sbd_mask(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros(label.shape, np.uint8)]] * 20
    savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": label, "CategoriesPresent": np.unique(label[label > 0])}}, do_compression=True)


@pytest.mark.parametrize("place", ["../../benchmark_RELEASE/dataset", "../VOCaug/dataset"])
def test_pascal_voc_aug_takes_each_label_where_it_is(voc: tuple[Path, dict[str, Masks]], place: str) -> None:
    """VOC's own label before the converted one before SBD's; and the list of what to train on leaves VOC's val out."""
    root, masks = voc
    sbd = root / place
    only_sbd, converted = mask(range(21), 5), mask(range(21), 6)
    for name in ("2008_000002", "2008_000003"):
        save(root / "JPEGImages" / f"{name}.jpg", photo(3))
    sbd_mask(sbd / "cls" / "2008_000002.mat", only_sbd)
    sbd_mask(sbd / "cls" / "2008_000003.mat", np.zeros_like(converted))
    sbd_mask(sbd / "cls" / "2007_000032.mat", np.zeros_like(masks["train"]["2007_000032"]))
    save(root / "SegmentationClassAug" / "2008_000003.png", converted)  # grey, without colours
    write_lines(sbd / "train.txt", "2008_000002", "2007_000042", "2007_000032")
    write_lines(sbd / "val.txt", "2008_000003", "2007_000061")
    trainaug = runpy.run_path(str(cards_dir() / "pascal_voc_trainaug.py"))["trainaug"]
    assert trainaug(root, sbd).read_text().split() == ["2007_000032", "2007_000033", "2007_000039", "2008_000002", "2008_000003"]
    found = read_back(root, load_card("voc_aug"))
    assert_same(found["train"], {**masks["train"], "2008_000002": only_sbd, "2008_000003": converted})
    assert_same(found["test"], masks["val"])


# Cityscapes

CITYSCAPES_IDS = """unlabeled 0, ego vehicle 1, rectification border 2, out of roi 3, static 4, dynamic 5, ground 6, road 7, sidewalk 8, parking 9, rail track 10,
building 11, wall 12, fence 13, guard rail 14, bridge 15, tunnel 16, pole 17, polegroup 18, traffic light 19, traffic sign 20, vegetation 21, terrain 22, sky 23,
person 24, rider 25, car 26, truck 27, bus 28, caravan 29, trailer 30, train 31, motorcycle 32, bicycle 33, license plate -1"""
IDS = {name: int(number) for name, number in (entry.strip().rsplit(" ", 1) for entry in CITYSCAPES_IDS.replace("\n", " ").split(","))}


def draw_polygons(path: Path, number_of: Mapping[str, int]) -> np.ndarray:
    """Rasterise as json2labelImg.py does: one over the other, groups as their members, nothing for what has no number."""
    content = json.loads(path.read_text())
    image = Image.new("L", (content["imgWidth"], content["imgHeight"]), number_of["unlabeled"])
    for entry in content["objects"]:
        name = entry["label"] if entry["label"] in IDS else entry["label"].removesuffix("group")
        if number_of[name] >= 0 and not entry.get("deleted"):
            ImageDraw.Draw(image).polygon([tuple(point) for point in entry["polygon"]], fill=number_of[name])
    return np.asarray(image)


def polygons(seed: int, names: list[str]) -> dict[str, Any]:
    """One triangle for each name, somewhere, the later ones over the earlier."""
    corners = np.random.default_rng(seed).integers(0, SHAPE[::-1], (len(names), 3, 2))
    return {
        "imgHeight": SHAPE[0],
        "imgWidth": SHAPE[1],
        "objects": [{"label": n, "polygon": c.tolist()} for n, c in zip(names, corners, strict=True)],
    }


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    card = load_card("cityscapes")
    train_ids = {name: card.classes.index(name) if name in card.classes else -1 if number < 0 else 255 for name, number in IDS.items()}
    names = [*(name for name in IDS if name != "unlabeled"), "cargroup", "persongroup"]
    for seed, (split, city) in enumerate(
        [("train", "aachen"), ("train", "bochum"), ("train_extra", "erlangen"), ("val", "frankfurt"), ("test", "berlin")]
    ):
        stem = f"{split}/{city}/{city}_000000_00001{seed}"
        image = photo(seed)
        save(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", image)
        for kind in ["gtCoarse"] if split == "train_extra" else ["gtFine", "gtCoarse"] if split != "test" else ["gtFine"]:
            listing = tmp_path / kind / f"{stem}_{kind}_polygons.json"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text(json.dumps(polygons(seed, names if kind == "gtFine" else ["road", "sky", "ego vehicle"])))
            save(tmp_path / kind / f"{stem}_{kind}_labelIds.png", draw_polygons(listing, IDS if split != "test" else dict.fromkeys(IDS, 0)))
            save(tmp_path / kind / f"{stem}_{kind}_labelTrainIds.png", draw_polygons(listing, train_ids))
            save(tmp_path / kind / f"{stem}_{kind}_instanceIds.png", draw_polygons(listing, IDS).astype(np.uint16) * 1000)
            shown = draw_polygons(listing, train_ids)
            colors = np.array([*card.palette, *[[0, 0, 0]] * 237], np.uint8)[shown]
            save(tmp_path / kind / f"{stem}_{kind}_color.png", np.dstack([colors, np.full(SHAPE, 255, np.uint8)]))
    stem = "train_extra/troisdorf/troisdorf_000000_000073"  # black in the release, too
    save(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", np.zeros((*SHAPE, 3), np.uint8))
    save(tmp_path / "gtCoarse" / f"{stem}_gtCoarse_labelIds.png", np.zeros(SHAPE, np.uint8))
    return tmp_path


FINE = "gtFine/{split}/*/{id}_gtFine"


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ([], False),
        ([f'label_files=["{FINE}_labelTrainIds.png"]', "label_values=[]", "ignore_values=[]"], False),
        ([f'label_files=["{FINE}_color.png"]', "label_encoding=color", "ignore_colors=[[0,0,0]]", "label_values=[]", "ignore_values=[]"], False),
        ([f'label_files=["{FINE}_labelIds.png","{FINE.replace("Fine", "Coarse")}_labelIds.png"]', "split_names.train=[train,train_extra]"], True),
    ],
    ids=["labelIds", "labelTrainIds", "color", "coarse"],
)
def test_cityscapes_is_what_its_polygons_show(cityscapes: Path, changes: list[str], extra: bool) -> None:
    card = override_card(load_card("cityscapes"), changes)
    number_of = {name: card.classes.index(name) if name in card.classes else 255 for name in IDS} | {"license plate": -1}

    def expected(case_id: str, split: str, kind: str = "gtFine") -> np.ndarray:
        return draw_polygons(cityscapes / kind / split / case_id.split("_")[0] / f"{case_id}_{kind}_polygons.json", number_of)

    found = read_back(cityscapes, card)
    train = {name: expected(name, "train") for name in ("aachen_000000_000010", "bochum_000000_000011")}
    if extra:
        train["erlangen_000000_000012"] = expected("erlangen_000000_000012", "train_extra", "gtCoarse")
    assert_same(found["train"], train)
    assert_same(found["test"], {"frankfurt_000000_000013": expected("frankfurt_000000_000013", "val")})
    assert found["val"] == {}
    assert {255} < set(np.unique(found["train"]["aachen_000000_000010"])) <= {*range(19), 255}


def test_cityscapes_card_names_every_label_once() -> None:
    meaning = load_card("cityscapes").class_of_number()
    assert {name: meaning[number] for name, number in IDS.items() if meaning[number] >= 0} == {
        n: c for c, n in enumerate(load_card("cityscapes").classes)
    }
    assert set(meaning) == {*IDS.values(), 255}


# The others


def test_deepglobe_binarises_channels(tmp_path: Path) -> None:
    card = override_card(load_card("deepglobe"), ["test_fraction=0.25", "val_fraction=0.25"])
    colors = np.array([*card.palette, [0, 0, 0]], np.uint8)  # unknown is last
    masks = {str(number): mask(range(7), number) for number in (119, 2334, 6399, 998002)}
    for name, label in masks.items():
        save(tmp_path / "train" / f"{name}_sat.jpg", photo(1))
        shade = np.random.default_rng(0).integers(0, 128, (*SHAPE, 3)).astype(np.uint8)  # below 128 is 0, from 128 on 255
        save(tmp_path / "train" / f"{name}_mask.png", np.where(colors[label] == 255, 255 - shade, shade))
        save(tmp_path / "valid" / f"{name}9_sat.jpg", photo(1))  # without a mask
    found = read_back(tmp_path, card)
    assert [len(found[split]) for split in ("train", "val", "test")] == [2, 1, 1]
    expected = {name: np.where(label == 6, card.ignore_index, label.astype(int)) for name, label in masks.items()}
    assert_same({**found["train"], **found["val"], **found["test"]}, expected)


def pets(root: Path) -> Masks:
    trimaps = {}
    for n, name in enumerate(["Abyssinian_100", "Abyssinian_34", "beagle_1", "great_pyrenees_7", "Bengal_5"]):
        trimaps[name] = mask([1, 2, 3], n)
        # Some files of the set are GIF or PNG under the name of a JPEG.
        save(root / "images" / f"{name}.jpg", photo(n), format={"Abyssinian_34": "GIF", "Bengal_5": "PNG"}.get(name, "JPEG"))
        save(root / "annotations" / "trimaps" / f"{name}.png", trimaps[name])
        write_lines(root / "annotations" / "trimaps" / f"._{name}.png", "Mac OS X")
    write_lines(root / "images" / "Abyssinian_100.mat", "")
    head = ("#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids", "#SPECIES: 1:Cat 2:Dog")
    write_lines(root / "annotations" / "list.txt", *head, *(f"{name} 1 1 1" for name in trimaps))
    write_lines(root / "annotations" / "trainval.txt", *head, *(f"{name} 1 1 1" for name in list(trimaps)[:3]))
    write_lines(root / "annotations" / "test.txt", *(f"{name} 2 2 1" for name in list(trimaps)[3:]))
    return trimaps


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [
        ([], {1: 1, 2: 0, 3: -100}),
        (["classes=[background,pet,outline]", "label_values=[2,1,3]", "ignore_values=[]"], {1: 1, 2: 0, 3: 2}),
        (["label_values=[2,[1,3]]", "ignore_values=[]"], {1: 1, 2: 0, 3: 1}),
    ],
    ids=["ignored", "class", "joined"],
)
def test_oxford_pets(tmp_path: Path, changes: list[str], meaning: dict[int, int]) -> None:
    trimaps = {name: np.vectorize(meaning.get)(trimap) for name, trimap in pets(tmp_path).items()}
    found = read_back(tmp_path, override_card(load_card("pets"), changes))
    assert [len(found[split]) for split in ("train", "val", "test")] == [2, 1, 2]
    assert set(found["test"]) == {"great_pyrenees_7", "Bengal_5"}
    assert_same({**found["train"], **found["val"], **found["test"]}, trimaps)


def smooth_mask(seed: int) -> np.ndarray:
    return mask([0, 255, 1, 254, 127, 128, 60, 200], seed)


def test_salient_objects_read_grey_edges_by_halves(tmp_path: Path) -> None:
    masks = {f"sun_{n}": smooth_mask(n) for n in range(4)}
    for name in masks:
        save(tmp_path / "Image" / f"{name}.jpg", photo(0))
    save(tmp_path / "GT" / "sun_0.png", masks["sun_0"])
    save(tmp_path / "GT" / "sun_1.png", np.dstack([masks["sun_1"]] * 3))  # grey as colours
    save(tmp_path / "GT" / "sun_2.png", np.dstack([masks["sun_2"], np.full(SHAPE, 255, np.uint8)]))  # with transparency
    save(tmp_path / "GT" / "sun_3.png", masks["sun_3"] > 127)  # one bit per pixel
    found = read_back(tmp_path, load_card("salient_objects"))
    assert_same({**found["train"], **found["val"], **found["test"]}, {name: (label > 127).astype(int) for name, label in masks.items()})


def test_salient_objects_keep_grey_as_shares(tmp_path: Path) -> None:
    label = smooth_mask(0)
    for n in range(3):
        save(tmp_path / "images" / f"{n}.jpg", photo(0))
        save(tmp_path / "ground_truth_mask" / f"{n}.png", label)
    folders = ['image_files="images/{id}.jpg"', 'label_files=["ground_truth_mask/{id}.png"]']
    card = override_card(load_card("salient_objects"), [*folders, "label_values=[]", "soft_labels=true"])
    target = CaseDataset(find_cases(tmp_path, card), card, train=False)[0]["label"].numpy()
    np.testing.assert_allclose(target, np.stack([1 - label / 255, label / 255]), atol=1e-6)


def test_duts(tmp_path: Path) -> None:
    masks: dict[str, Masks] = {
        "TR": {f"ILSVRC2012_test_0000000{n}": smooth_mask(n) for n in range(3)},
        "TE": {"sun_aaajuldidvlcyzhv": smooth_mask(7)},
    }
    for part, names in masks.items():
        for name, label in names.items():
            save(tmp_path / f"DUTS-{part}" / f"DUTS-{part}-Image" / f"{name}.jpg", photo(0))
            save(tmp_path / f"DUTS-{part}" / f"DUTS-{part}-Mask" / f"{name}.png", label)
    found = read_back(tmp_path, load_card("duts"))
    assert (len(found["train"]), len(found["val"])) == (2, 1)
    assert_same({**found["train"], **found["val"]}, {name: (label > 127).astype(int) for name, label in masks["TR"].items()})
    assert_same(found["test"], {name: (label > 127).astype(int) for name, label in masks["TE"].items()})


def test_camvid_reads_the_lists_of_segnet(tmp_path: Path) -> None:
    masks: dict[str, Masks] = {
        "train": {"0001TP_006690": mask(range(12), 0), "0016E5_08640": mask(range(12), 1)},
        "val": {"0016E5_07959": mask(range(12), 2)},
        "test": {"Seq05VD_f00000": mask(range(12), 3)},
    }
    for split, names in masks.items():
        for name, label in names.items():
            save(tmp_path / split / f"{name}.png", photo(0))
            save(tmp_path / f"{split}annot" / f"{name}.png", label)
        write_lines(tmp_path / f"{split}.txt", *(f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png" for name in names))
    save(tmp_path / "train" / "unlisted.png", photo(0))
    found = read_back(tmp_path, load_card("camvid"))
    for split, names in masks.items():
        assert_same(found[split], names)


CAMVID_SHARES = {  # of the pixels with a class, in percent, and of void of all pixels; counted by others
    "train": ([17.48, 24.38, 0.93, 32.84, 4.58, 10.02, 1.28, 1.24, 6.17, 0.76, 0.31], 3.73),
    "val": ([9.29, 26.52, 0.57, 29.47, 8.83, 16.65, 0.89, 3.10, 1.79, 0.65, 2.25], 1.67),
    "test": ([18.59, 25.69, 1.15, 26.46, 10.46, 11.78, 1.05, 0.82, 3.19, 0.61, 0.22], 3.73),
}


def test_camvid_has_its_documented_shares(camvid: Path) -> None:
    card = load_card("camvid")
    cases = find_cases(camvid, card)
    facts = {fact.case_id: fact for fact in survey(cases, card)}
    assert [fact.problems for fact in facts.values()] == [[]] * 140
    for split, side in split_cases(cases, card).items():
        pixels = sum(facts[case.id].label_voxels for case in side)
        void = sum(facts[case.id].ignored_voxels for case in side)
        shares, share_of_void = CAMVID_SHARES[split]
        np.testing.assert_allclose(100 * pixels / pixels.sum(), shares, atol=0.006)  # the 1.05 of test is 1.0447
        assert 100 * void / (pixels.sum() + void) == pytest.approx(share_of_void, abs=0.005)


# A user's own folders


def own(**changes: Any) -> DataCard:
    return DataCard(**({"name": "mine", "classes": ["wall", "crack"], "image_channels": 3, "patch_size": [16, 16]} | changes))


def test_own_set_with_one_name_in_two_splits(tmp_path: Path) -> None:
    card = own(
        image_files="{split}/{id}.*", label_files=["{split}_masks/{id}.png"], split_names={"train": ["train"], "test": ["val"]}, val_fraction=0.0
    )
    masks = {f"{split}_001": mask([0, 1], seed) for seed, split in enumerate(["train", "val"])}
    for name, label in masks.items():
        split = name.removesuffix("_001")
        save(tmp_path / split / "001.png", photo(0))
        save(tmp_path / f"{split}_masks" / "001.png", label)
    save(tmp_path / "train" / "002.JPG", photo(0), format="JPEG")
    save(tmp_path / "train_masks" / "002.png", masks["train_001"])
    found = read_back(tmp_path, card)
    assert_same(found["train"], {"train_001": masks["train_001"], "002": masks["train_001"]})
    assert_same(found["test"], {"val_001": masks["val_001"]})


@pytest.mark.parametrize(
    ("image_files", "label_files", "files"),
    [
        ("{split}/img/{id}.jpg", "masks/{id}.png", ("{split}/img/{id}.jpg", "masks/{id}.png")),
        ("img/{id}.jpg", "masks_{split}/{id}_mask.png", ("img/{id}.jpg", "masks_{split}/{id}_mask.png")),
        ("{split}/{id}/image.png", "{split}/{id}/mask.png", ("{split}/{id}/image.png", "{split}/{id}/mask.png")),
        ("{split}/{id}/images/{id}.png", "{split}/{id}/{id}_labels.png", ("{split}/{id}/images/{id}.png", "{split}/{id}/{id}_labels.png")),
        ("{split}/**/{id}.png", "labels/**/{id}.bmp", ("{split}/monday/a/{id}.png", "labels/{id}.bmp")),
    ],
    ids=["labels-of-all-splits", "images-of-all-splits", "folder-per-case", "name-twice", "deep"],
)
def test_own_set_by_patterns(tmp_path: Path, image_files: str, label_files: str, files: tuple[str, str]) -> None:
    card = own(image_files=image_files, label_files=[label_files], split_names={"train": ["a"], "val": ["b"], "test": ["c"]})
    masks = {split: {f"{split}_{n}": mask([0, 1], n) for n in range(2)} for split in "abc"}
    for split, names in masks.items():
        for name, label in names.items():
            for pattern, pixels in zip(files, (photo(0), label), strict=True):
                save(tmp_path / pattern.replace("{split}", split).replace("{id}", name), pixels)
    found = read_back(tmp_path, card)
    for side, split in zip(("train", "val", "test"), "abc", strict=True):
        assert_same(found[side], masks[split])


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "{}_rgb.png",
        "img/{}_rgb.png masks/{}.png",
        "/home/me/set/img/{}_rgb.png\t/home/me/set/masks/{}.png",
        "img/{}_rgb.png,masks/{}.png",
        "img\\{}_rgb.png",
    ],
    ids=["name", "file", "pair", "tab", "comma", "windows"],
)
def test_case_lists_may_name_cases_or_files(tmp_path: Path, line: str) -> None:
    card = own(
        image_files="img/{id}_rgb.png", label_files=["masks/{id}.png"], case_lists="lists/{split}.txt", split_names={"train": ["a"], "test": ["b"]}
    )
    for split, names in {"a": ("one", "two.v2", "three"), "b": ("four",)}.items():
        for name in names:
            save(tmp_path / "img" / f"{name}_rgb.png", photo(0))
            save(tmp_path / "masks" / f"{name}.png", mask([0, 1]))
        write_lines(tmp_path / "lists" / f"{split}.txt", "# image label", "", *(line.replace("{}", name) for name in names))
    split = split_cases(find_cases(tmp_path, card), card)
    assert sorted(case.id for side in ("train", "val") for case in split[side]) == ["one", "three", "two.v2"]
    assert [case.id for case in split["test"]] == ["four"]
    assert find_problems(find_cases(tmp_path, card), card) == []


def film(root: Path) -> Masks:
    """Frames 00000 and 00001 of four films, in folders."""
    masks = {}
    for seed, (name, frame) in enumerate((name, frame) for name in ("bear", "car", "dog-run", "swan") for frame in ("00000", "00001")):
        masks[f"{name}_{frame}"] = mask([0, 1], seed)
        save(root / "JPEGImages" / "480p" / name / f"{frame}.jpg", photo(seed))
        save(root / "Annotations" / "480p" / name / f"{frame}.png", masks[f"{name}_{frame}"])
    return masks


FILM = {"image_files": "JPEGImages/480p/{subject}/{id}.jpg", "label_files": ["Annotations/480p/{subject}/{id}.png"]}


def test_own_set_of_films_is_split_by_film(tmp_path: Path) -> None:
    masks = film(tmp_path)
    found = read_back(tmp_path, own(**FILM))
    assert_same({**found["train"], **found["val"], **found["test"]}, masks)
    assert [len(found[split]) for split in ("train", "val", "test")] == [4, 2, 2]
    assert all(len({name.split("_")[0] for name in side}) == len(side) / 2 for side in found.values())
    cases = find_cases(tmp_path, own(**FILM, subject_pattern="(dog|.)"))
    assert {case.id: case.subject for case in cases}["dog-run_00001"] == "dog", "a pattern says more than the folder"


@pytest.mark.parametrize("line", ["/JPEGImages/480p/{}.jpg /Annotations/480p/{}.png", "{}", "{}.jpg"], ids=["paths", "names", "files"])
def test_own_set_of_films_by_lists(tmp_path: Path, line: str) -> None:
    masks = film(tmp_path)
    for split, names in {"train": ["bear", "swan"], "val": ["car"]}.items():
        write_lines(tmp_path / f"{split}.txt", *(line.replace("{}", f"{name}/{frame}") for name in names for frame in ("00000", "00001")))
    found = read_back(tmp_path, own(**FILM, case_lists="{split}.txt", split_names={"train": ["train"], "test": ["val"]}, val_fraction=0.0))
    assert_same(found["train"], {name: label for name, label in masks.items() if name[:4] in ("bear", "swan")})
    assert_same(found["test"], {name: label for name, label in masks.items() if name[:3] == "car"})
    (tmp_path / "val.txt").write_text("car/00007\n")
    card = own(**FILM, case_lists="{split}.txt", split_names={"train": ["train"], "test": ["val"]})
    image, label = find_problems(find_cases(tmp_path, card), card)
    assert str(image).startswith(f"{tmp_path}/JPEGImages/480p/car/00007.jpg: is missing, though line 1 of {tmp_path}/val.txt names it")
    assert str(label).startswith(f"{tmp_path}/Annotations/480p/car/00007.png: is missing, though line 1 of {tmp_path}/val.txt names it")


def test_case_lists_without_split_and_missing_lists(tmp_path: Path) -> None:
    write_lines(tmp_path / "labelled.txt", "b", "a")
    assert [case.id for case in find_cases(tmp_path, own(case_lists="labelled.txt"))] == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"No list of cases .*train\.txt\. Check data\.root, and `case_lists` and `split_names`"):
        find_cases(tmp_path, own(case_lists="{split}.txt", split_names={"train": ["train"]}))
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt\. .* then `python datasets/pascal_voc_trainaug\.py"):
        find_cases(tmp_path, load_card("voc_aug"))


def test_qubiq_reads_slices_of_several_raters(tmp_path: Path) -> None:
    """Two tasks of six raters, one of whom has not outlined one case, in NIfTI files as the challenge has them."""
    rng = np.random.default_rng(0)
    outlines: dict[str, list[np.ndarray]] = {}
    for split, numbers in (("Training", range(1, 6)), ("Validation", range(6, 8))):
        for n in numbers:
            folder = tmp_path / split / f"case{n:02}"
            save_volume(folder / "image.nii.gz", rng.normal(0, 500, (20, 24)).astype(np.float32))
            for task in (1, 2):
                masks = [(rng.random((20, 24)) < 0.3).astype(np.uint8) for _ in range(6)]
                for rater, values in enumerate(masks, start=1):
                    if (n, rater) != (2, 5):
                        save_volume(folder / f"task0{task}_seg0{rater}.nii.gz", values)
                outlines[f"case{n:02}/{task}"] = [m for rater, m in enumerate(masks, start=1) if (n, rater) != (2, 5)]
    changes = ["classes=[background,prostate]", "missing_raters=true", f"root={tmp_path}", 'rater_files=["{split}/{id}/task02_seg{rater}.nii.gz"]']
    card = override_card(load_card("qubiq"), changes)
    cases = find_cases(tmp_path, card)
    assert not find_problems(cases, card)
    split = split_cases(cases, card)
    assert [len(split[side]) for side in ("train", "val", "test")] == [4, 1, 2]
    dataset = CaseDataset(cases, card, train=False)
    for n, case in enumerate(cases):
        item = dataset[n]
        assert item["image"].shape == (1, 24, 20)
        assert item["image"].abs().max() < 10
        np.testing.assert_allclose(item["label"][1], np.mean(outlines[f"{case.id}/2"], axis=0).T, rtol=1e-6)


def test_val_and_test_may_be_the_same_split(tmp_path: Path) -> None:
    card = own(case_lists="{split}.txt", split_names={"train": ["train"], "val": ["val"], "test": ["val"]})
    write_lines(tmp_path / "train.txt", "a", "b")
    write_lines(tmp_path / "val.txt", "c")
    split = split_cases(find_cases(tmp_path, card), card)
    assert {side: [case.id for case in found] for side, found in split.items()} == {"train": ["a", "b"], "val": ["c"], "test": ["c"]}


@pytest.mark.parametrize("name", [name for name in list_cards() if load_card(name).spatial_dims == 2])
def test_cards_of_images_train(name: str, tmp_path: Path) -> None:
    """Their augmentation is one that albumentations knows and gives patches of the size that is asked for."""
    files = {
        "image_files": "x_{id}.png",
        "label_files": ["x_{id}.bmp"],
        "rater_files": [],
        "case_lists": None,
        "split_names": {side: [] for side in ("train", "val", "test")},
    }
    card = override_card(load_card(name), {**files, "patch_size": [32, 32]})
    numbers = mask([number for number, c in card.class_of_number().items() if c >= 0], shape=(1100, 1100))
    save(tmp_path / "x_1.png", photo(0, (1100, 1100)))
    save(tmp_path / "x_1.bmp", np.array(card.palette, np.uint8)[numbers] if card.label_encoding == "color" else numbers)
    item = CaseDataset(find_cases(tmp_path, card), card, train=True)[0, 1]
    assert item["image"].shape == (card.image_channels, 32, 32)
    assert item["label"].shape == (1, 32, 32)
    assert set(item["label"].unique().tolist()) <= {*range(len(card.classes)), card.ignore_index}
