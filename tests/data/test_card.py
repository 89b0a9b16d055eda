from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from densecal.data.card import _IMAGES_ONLY, DataCard, card_names, list_cards, load_card, override_card, resolve_root
from densecal.resources import cards_dir

MINIMAL = "classes: [background, thing]\n"
IMAGES = MINIMAL + "patch_size: [8, 8]\n"
COLORS = IMAGES + "label_encoding: color\npalette: [[0, 0, 0], [9, 0, 0]]\n"
SPLIT = IMAGES + 'case_lists: "{split}.txt"\n'


@pytest.mark.parametrize("name", list_cards())
def test_load_card_survives_hydra(name: str) -> None:
    card = load_card(name)
    assert OmegaConf.to_object(OmegaConf.structured(card)) == card
    assert card.schema.num_classes == len(card.classes)


@pytest.mark.parametrize("number", [0, 1], ids=["volumes", "images"])
def test_cards_to_start_from_are_valid(number: int, tmp_path: Path) -> None:
    content = re.findall(r"^```yaml\n(.*?)^```", (cards_dir() / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)[number]
    (tmp_path / "start.yaml").write_text(content)
    card = load_card(tmp_path / "start.yaml")
    assert card.spatial_dims == 3 - number
    keys = {key for key in vars(card) if re.search(rf"^(#.*)?\b{key}:", content, flags=re.MULTILINE)}
    assert {"classes", "ignore_index", "patch_size", "licence", "citation", "how_to_get"} <= keys
    assert not number or {*_IMAGES_ONLY, "image_files", "label_files", "case_lists", "split_names", "soft_labels"} <= keys


def test_card_names_include_aliases() -> None:
    assert {"hippocampus", "task04_hippocampus", "mni152"} <= set(card_names())
    assert load_card("hippocampus") == load_card("task04_hippocampus")


def test_load_card_reads_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL + "augmentation: {rotate: 30}\n")
    card = load_card(path)
    assert (card.name, card.augmentation.rotate, card.augmentation.scale) == ("mine", 30.0, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINIMAL + "patch_sise: [8, 8, 8]\n", r"mine\.yaml: patch_sise is not a key.*Did you mean 'patch_size'"),
        (MINIMAL + "augmentation: {rotat: 3}\n", r"mine\.yaml: augmentation\.rotat is not a key.*Did you mean 'rotate'"),
        (MINIMAL + "batch_size: four\n", r"mine\.yaml: batch_size: expected int"),
        (MINIMAL + "spacing: 1 mm\n", r"mine\.yaml: spacing: expected list\[float\]"),
        (MINIMAL + "layout: decathalon\n", r"mine\.yaml: Expected `layout` to be one of"),
        (MINIMAL + "patch_size: [8]\n", r"mine\.yaml: Expected `patch_size` to have 2 numbers for images or 3"),
        (MINIMAL + "ignore_index: 1\n", r"mine\.yaml: Expected `ignore_index` outside the classes"),
        (MINIMAL + "palette: [[0, 0], [1, 1]]\n", r"mine\.yaml: Expected each colour of `palette`"),
        (MINIMAL + "augmentation: {contrast: [1.5, 0.7]}\n", r"mine\.yaml: Expected `augmentation\.contrast` to be \[low, high\]"),
        (MINIMAL + "orientation: RAR\n", r"mine\.yaml: Expected `orientation` to name each axis once"),
        (MINIMAL + "foreground_fraction: 2\n", r"mine\.yaml: Expected `foreground_fraction` in \[0, 1\] or null"),
        (MINIMAL + "subject_pattern: p\\d+\n", r"mine\.yaml: Expected `subject_pattern` to have a group"),
        (MINIMAL + "val_fraction: 0.5\ntest_fraction: 0.5\n", r"`val_fraction` \+ `test_fraction` below 1"),
        (IMAGES + "spacing: [1, 1]\n", r"mine\.yaml: `spacing` is for volumes, but `patch_size` \[8, 8\] says that these are images"),
        (IMAGES + "augmentation: {rotate: 3}\n", r"mine\.yaml: `augmentation` is for volumes"),
        (IMAGES + "orientation: RAS\n", r"mine\.yaml: `orientation` is for volumes"),
        (MINIMAL + "exif: ignore\n", r"mine\.yaml: `exif` is for images, but `patch_size` \[96, 96, 96\] says that these are volumes"),
        (MINIMAL + "pipeline: {HorizontalFlip: {}}\n", r"mine\.yaml: `pipeline` is for images"),
        (MINIMAL + "label_values: [0, 255]\n", r"mine\.yaml: `label_values` is for images"),
        (MINIMAL + "color_tolerance: 3\n", r"mine\.yaml: `color_tolerance` is for images"),
        (MINIMAL + "normalisation: imagenet\n", r"mine\.yaml: Expected `normalisation` to be one of \('zscore', 'zscore_nonzero'"),
        (IMAGES + "normalisation: zscore_nonzero\n", r"mine\.yaml: Expected `normalisation` to be one of \('imagenet'"),
        (IMAGES + "normalisation: imagenet\n", r"mine\.yaml: `normalisation` imagenet is for images of three channels"),
        (IMAGES + "image_channels: 4\n", r"mine\.yaml: Expected `image_channels` to be 1 or 3 for images, but got 4"),
        (IMAGES + "layout: decathlon\n", r"mine\.yaml: Expected `layout` to be 'paired' for images"),
        (MINIMAL + "layout: decathlon\nsplit_names: {train: [a]}\n", r"mine\.yaml: `split_names` needs `layout` paired"),
        (IMAGES + "exif: rotate\n", r"mine\.yaml: Expected `exif` to be one of \('apply', 'ignore'\)"),
        (IMAGES + "label_encoding: colour\n", r"mine\.yaml: Expected `label_encoding` to be one of \('index', 'color'\)"),
        (IMAGES + "label_encoding: color\n", r"mine\.yaml: `label_encoding` color needs `palette`"),
        (IMAGES + "ignore_colors: [[0, 0, 256]]\n", r"mine\.yaml: Expected each colour of `ignore_colors` to be"),
        (IMAGES + "ignore_colors: [[0, 0, 0]]\n", r"mine\.yaml: `ignore_colors` has no effect with `label_encoding` index"),
        (COLORS + "label_values: [0, 1]\n", r"mine\.yaml: `label_values` has no effect with `label_encoding` color"),
        (COLORS + "ignore_colors: [[9, 0, 0]]\n", r"mine\.yaml: The colours \(9, 0, 0\) of thing and \(9, 0, 0\) of no class are 0 apart"),
        (
            COLORS + "color_tolerance: 5\n",
            r"mine\.yaml: The colours \(0, 0, 0\) of background and \(9, 0, 0\) of thing are 9 apart, so `color_tolerance` 5",
        ),
        (COLORS + "soft_labels: true\n", r"mine\.yaml: Expected `soft_labels` or `label_encoding` color, but got both"),
        (IMAGES + "soft_labels: true\nlabel_values: [0, 255]\n", r"mine\.yaml: `label_values` has no effect with `soft_labels`"),
        (IMAGES + "label_values: [0]\n", r"mine\.yaml: Expected `label_values` to have one entry for each of the 2 classes, but got 1"),
        (
            IMAGES + "label_values: [0, 128+]\n",
            r"mine\.yaml: Expected an entry of `label_values` or `ignore_values` to be a number, a range.* got '128\+'",
        ),
        (IMAGES + "label_values: [0, 255-128]\n", r"mine\.yaml: Expected an entry of `label_values`.* got '255-128'"),
        (
            IMAGES + "label_values: [0-128, 128-255]\n",
            r"mine\.yaml: Expected every number to have one meaning, but 128 .* stands for thing and background",
        ),
        (
            IMAGES + "label_values: [0, 255]\nignore_index: 255\n",
            r"mine\.yaml: .* 255 in label files stands for thing and no class \(`ignore_index` or",
        ),
        (IMAGES + "image_files: images/*.png\n", r"mine\.yaml: Expected `image_files` and `label_files` to hold \{id\}.* got 'images/\*\.png'"),
        (IMAGES + 'label_files: ["labels/{subject}/{id}.png"]\n', r"mine\.yaml: Expected \{subject\} in `image_files` and in every pattern"),
        (IMAGES + "label_files: []\n", r"mine\.yaml: Expected `label_files` to hold at least one pattern"),
        (IMAGES + 'case_lists: "{split}.txt"\n', r"mine\.yaml: `case_lists` '\{split\}\.txt' needs `split_names`"),
        (IMAGES + "split_names: {train: [a]}\n", r"mine\.yaml: `split_names` needs \{split\} in `image_files`, `label_files` or `case_lists`"),
        (SPLIT + "split_names: {tarin: [a]}\n", r"mine\.yaml: Expected `split_names` to be one of \('train', 'val', 'test'\)"),
        (SPLIT + "split_names: {test: [a]}\n", r"mine\.yaml: Expected `split_names` to say what to train on"),
        (SPLIT + "split_names: {train: [a, b], test: [b]}\n", r"mine\.yaml: `split_names` trains on 'b' and uses it as test, too"),
        (SPLIT + "split_names: {train: [a]}\nsplits: {train: [x]}\n", r"mine\.yaml: Expected `splits` or `split_names`, but got both"),
        ("description: no classes\n", r"mine\.yaml: classes is missing"),
        (MINIMAL + "folder: [\n", r"mine\.yaml, line \d+: not YAML"),
        ("- a\n- b\n", r"mine\.yaml: expected the keys of a data set card"),
    ],
)
def test_load_card_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_card(path)
    assert "\n" not in str(error.value)


def test_load_card_unknown_name_prints_near_matches() -> None:
    with pytest.raises(ValueError, match=r"No data set card 'hipocampus'\. Did you mean 'hippocampus'"):
        load_card("hipocampus")
    with pytest.raises(FileNotFoundError, match=r"No data set card nowhere\.yaml"):
        load_card("nowhere.yaml")


def test_override_card_leaves_the_card_alone() -> None:
    card = load_card("mni152")
    assert override_card(card, ["epochs=3", "augmentation.rotate=5"]).epochs == 3
    assert override_card(card, {"spacing": [1, 1, 3]}).spacing == [1.0, 1.0, 3.0]
    assert (card.epochs, card.spacing) == (load_card("mni152").epochs, None)
    with pytest.raises(ValueError, match=r"data\.epoch is not a key.*'epochs'"):
        override_card(card, ["epoch=3"])


def test_override_card_takes_back_names_of_splits() -> None:
    card = override_card(load_card("voc"), ["split_names.test=[]", "test_fraction=0.5"])
    assert card.split_names == {"train": ["train"]}, "test is drawn then"


def test_override_card_takes_the_documented_ranges_and_lists() -> None:
    card = override_card(load_card("pets"), ["label_values=[2,[1,3]]", "ignore_values=[]"])
    assert card.class_of_number() == {-100: -1, 2: 0, 1: 1, 3: 1}
    assert override_card(card, ["ignore_values=['4-6', 9]"]).class_of_number().keys() == {-100, 1, 2, 3, 4, 5, 6, 9}


def test_resolve_root_prefers_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECAL_DATA", str(tmp_path))
    (tmp_path / "below").mkdir()
    (tmp_path / "given").mkdir()
    card = DataCard(name="x", classes=["a", "b"], folder="below")
    assert resolve_root(card) == tmp_path / "below"
    assert resolve_root(override_card(card, {"root": str(tmp_path / "given")})) == tmp_path / "given"


def test_resolve_root_says_how_to_give_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = DataCard(name="x", classes=["a", "b"], folder="below", how_to_get="Ask them.")
    monkeypatch.delenv("DENSECAL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"data\.root=DIR, or set DENSECAL_DATA to the folder that holds below\. Ask them\."):
        resolve_root(card)
    monkeypatch.setenv("DENSECAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"No folder {tmp_path / 'below'}"):
        resolve_root(card)


def test_resolve_root_prepares_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECAL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr("densecal.data.prepare.prepare", lambda name, root: made.append((name, root)))
    root = resolve_root(load_card("mni152"))
    assert made == [("mni152", root)]
    assert root == tmp_path / "cache" / "densecal" / "mni152_2mm"


BRAIN = "classes: [rest, core, oedema, enhancing]\n"


def test_regions_are_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "brain.yaml"
    path.write_text(BRAIN + "regions: {whole: [core, oedema, 3], enhancing: [enhancing]}\npatch_size: [8, 8, 8]\n")
    card = load_card(path)
    assert (card.schema.names, card.schema.regions, card.schema.activation) == (("whole", "enhancing"), ((1, 2, 3), (3,)), "sigmoid")
    assert card.structure == (1, 2, 3)
    assert OmegaConf.to_object(OmegaConf.structured(card)) == card
    assert override_card(card, {"regions": {}}).schema.names == ("whole", "enhancing"), "a mapping is merged"
    one = override_card(load_card("camvid"), ["regions={car: [car]}"])
    assert (one.schema.num_classes, one.schema.regions, one.schema.ignore_index, one.structure) == (1, ((8,),), 11, (8,))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (
            "{whole: [cor]}",
            r"`regions.whole`: no class 'cor'. Did you mean 'core'\? Valid: core, enhancing, oedema, rest. Or give a number of 0 to 3.",
        ),
        ("{whole: [4]}", "`regions.whole`: no class 4"),
        ("{whole: []}", "`regions.whole` to hold at least one of the classes"),
        ("{whole: [1, core]}", "Expected every class of `regions.whole` once"),
        ("{whole: [0, 1, 2, 3]}", "`regions.whole` to leave a class outside"),
        ("{a b: [1], a_b: [2]}", "make different file names"),
        ("{Background: [1]}", "other than 'Background'"),
        ("{whole: 1}", "regions.whole: expected"),
    ],
)
def test_wrong_regions(regions: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "brain.yaml"
    path.write_text(BRAIN + f"regions: {regions}\npatch_size: [8, 8, 8]\n")
    with pytest.raises(ValueError, match=message):
        load_card(path)
