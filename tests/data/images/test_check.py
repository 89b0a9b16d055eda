from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import SHAPE, mask, photo, save, voc_palette
from PIL import Image

from densecal.cli.check_data import main
from densecal.data.card import DataCard, override_card
from densecal.data.layouts import find_cases
from densecal.data.validate import find_problems

Damage = Callable[[Path, Path], Any]

COLORS = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., DataCard]:
    """Write a set of three images ``s1, s2, s3`` and return its card."""

    def make(*, listed: bool = False, **changes: Any) -> DataCard:
        settings = {"name": "blocks", "classes": ["wall", "crack", "stain"], "root": str(tmp_path), "image_channels": 3, "patch_size": [16, 16]}
        card = DataCard(**(settings | changes | ({"case_lists": "train.txt"} if listed else {})))
        for n in range(1, 4):
            label = mask([0, 1, 2], n)
            save(tmp_path / "images" / f"s{n}.jpg", photo(n))
            if card.soft_labels:
                (tmp_path / "labels").mkdir(exist_ok=True)
                np.save(tmp_path / "labels" / f"s{n}.npy", np.eye(3, dtype=np.float32)[label])
            elif card.label_encoding == "color":
                save(tmp_path / "labels" / f"s{n}.png", np.array(card.palette, np.uint8)[label])
            else:
                save(tmp_path / "labels" / f"s{n}.png", label, palette=voc_palette() if card.palette else None)
        if listed:
            (tmp_path / "train.txt").write_text("# cases\ns1\ns2\ns3\n")
        return card

    return make


def relabel(change: Callable[[np.ndarray], np.ndarray | None]) -> Damage:
    """Damage that stores the label map otherwise: ``change`` edits it in place or returns another."""

    def damage(_: Path, label: Path) -> None:
        values = np.load(label) if label.suffix == ".npy" else np.array(Image.open(label))
        changed = change(values)
        values = values if changed is None else changed
        if label.suffix == ".npy":
            np.save(label, values)
        else:
            save(label, values, palette=voc_palette() if Image.open(label).mode == "P" else None)

    return damage


def put(value: Any) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[3, 5] = value

    return change


def turn(image: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(image).save(image, exif=exif)


INDEX: dict[str, Any] = {}
COLOR = {"label_encoding": "color", "palette": COLORS, "ignore_colors": [[255, 255, 255]]}
PALETTE = {"palette": COLORS}
SOFT = {"soft_labels": True}
LISTED = {"listed": True}
SHORT = "cannot be read .* Copy or download it again"

CASES: dict[str, tuple[dict[str, Any], str, Damage, str]] = {
    "image-cut-short": (INDEX, "image", lambda i, _: i.write_bytes(i.read_bytes()[:400]), SHORT),
    "image-cut-near-its-end": (
        INDEX,
        "image",
        lambda i, _: i.write_bytes(i.read_bytes()[:-200]),
        r"cannot be read \(OSError: image file is truncated",
    ),
    "image-empty-file": (INDEX, "image", lambda i, _: i.write_bytes(b""), SHORT),
    "image-no-picture": (INDEX, "image", lambda i, _: i.write_text("<html>404</html>"), r"cannot be read \(ValueError: not an image"),
    "image-missing": (INDEX, "image", lambda i, _: i.unlink(), r"is missing\. Restore the file, or leave the case out"),
    "image-listed-but-missing": (LISTED, "image", lambda i, _: i.unlink(), r"is missing, though line 3 of .*train\.txt names it\. Restore"),
    "image-one-colour": (INDEX, "image", lambda i, _: save(i, np.full((*SHAPE, 3), 7, np.uint8)), "is empty: every pixel is 7. Export it again"),
    "label-cut-short": (INDEX, "label", lambda _, y: y.write_bytes(y.read_bytes()[:60]), SHORT),
    "label-no-picture": (INDEX, "label", lambda _, y: y.write_text("404"), r"cannot be read \(ValueError: not a picture\)"),
    "label-missing": (INDEX, "label", lambda _, y: y.unlink(), r"is missing\. Restore the file"),
    "label-listed-but-missing": (LISTED, "label", lambda _, y: y.unlink(), r"is missing, though line 3 of .*train\.txt names it"),
    "label-size": (INDEX, "label", relabel(lambda v: v[:-4]), r"is 20 x 40, but s2\.jpg is 24 x 40 \(rows x columns\)\. Resize the label"),
    "label-turned": (INDEX, "label", lambda i, _: turn(i, 6), r"is 24 x 40, but s2\.jpg is 40 x 24 .* with `exif: ignore` in the card the two agree"),
    "label-not-turned": (
        {"exif": "ignore"},
        "label",
        lambda i, y: (turn(i, 6), relabel(lambda v: v.T)(i, y)),
        r"is 40 x 24, but s2\.jpg is 24 x 40 .* with `exif: apply` in the card the two agree",
    ),
    "label-unknown-number": (
        INDEX,
        "label",
        relabel(put(7)),
        r"outside the card's classes 0 to 2: 7 \(1 pixels\)\. Add the class to the card, or list",
    ),
    "label-unknown-id": (
        {"label_values": [[0, 2], 1, 5]},
        "label",
        relabel(put(9)),
        r"outside those of `label_values`: 9 \(1 pixels\)\. .* `ignore_values`",
    ),
    "label-colours-for-numbers": (
        INDEX,
        "label",
        relabel(lambda v: voc_palette()[v]),
        r"is a colour image\. Set `label_encoding: color` and `palette`",
    ),
    "label-numbers-for-colours": (COLOR, "label", relabel(lambda v: v[..., 0] // 64), r"colours outside .*: \(2, 2, 2\) at \d+ pixel"),
    "label-wrong-colour": (
        COLOR,
        "label",
        relabel(put([128, 1, 0])),
        r"outside the card's `palette` and `ignore_colors`: \(128, 1, 0\) at 1 pixel\(s\)\. Add",
    ),
    "label-wrong-palette": (
        PALETTE,
        "label",
        lambda _, y: save(y, mask([0, 1, 2]), palette=np.roll(voc_palette(), 1, axis=0)),
        r"its palette shows 0 as .* but the card's wall is \(0, 0, 0\): .* Mend the order of `classes`, or leave `palette` out",
    ),
    "label-shares-for-numbers": (
        INDEX | {"label_files": ["labels/{id}.*"]},
        "label",
        lambda _, y: (y.unlink(), np.save(y.with_suffix(".npy"), np.zeros((*SHAPE, 4), np.float32))),
        r"expected one number per pixel, but got shape \(24, 40, 4\)\. .* `soft_labels: true`",
    ),
    "label-fraction": (
        INDEX,
        "label",
        lambda _, y: (y.unlink(), np.save(y.with_suffix(".npy"), np.full(SHAPE, 0.5, np.float32))),
        "numbers that are not whole. Resize labels to the nearest",
    ),
    "soft-nan": (SOFT, "label", relabel(put(np.nan)), r"holds NaN or infinite shares\. Set the shares of a pixel without a label to 0"),
    "soft-sum": (SOFT, "label", relabel(lambda v: v * np.float32(0.9)), r"shares that sum to 1 .* but 960 pixel\(s\) do not\. Divide by their sum"),
    "soft-logits": (SOFT, "label", relabel(put([-2, 3, 0])), r"expected shares in \[0, 1\], but got -2 to 3"),
    "soft-classes": (SOFT, "label", relabel(lambda v: v[..., :2]), r"expected soft labels \(H, W, 3\).*but got float32 of shape \(24, 40, 2\)"),
    "soft-pickled": (SOFT, "label", lambda _, y: np.save(y, np.array([{}], object), allow_pickle=True), SHORT),
}


@pytest.mark.parametrize("name", CASES)
def test_find_problems_is_one_line_that_names_the_file(make_images: Callable[..., DataCard], name: str) -> None:
    changes, file, damage, message = CASES[name]
    card = make_images(**changes)
    root = Path(card.root or "")
    assert find_problems(find_cases(root, card), card) == []
    image, label = (lambda case: (case.image[0], case.label))(find_cases(root, card)[1])
    assert label is not None
    damage(image, label)
    cases = find_cases(root, card)
    problems = find_problems(cases, card)
    assert [(problem.case_id, problem.file) for problem in problems] == [("s2", cases[1].image[0] if file == "image" else cases[1].label)]
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(problems[0]))
    assert "\n" not in str(problems[0])
    assert " at 0x" not in str(problems[0])


def test_find_problems_names_two_files_of_one_case(make_images: Callable[..., DataCard]) -> None:
    card = make_images()
    root = Path(card.root or "")
    second = save(root / "images" / "s2.png", photo(0))
    (problem,) = find_problems(find_cases(root, card), card)
    assert str(problem) == f"{second}: is a second image of the case 's2', beside {root / 'images' / 's2.jpg'}. Rename or remove one of them."
    second.unlink()
    second = save(root / "labels" / "s3.tif", mask([0, 1, 2], 3))
    (problem,) = find_problems(find_cases(root, card), card)
    assert str(problem) == f"{second}: is a second label of the case 's3', beside {root / 'labels' / 's3.png'}. Rename or remove one of them."


def test_find_problems_names_the_lines_that_repeat_a_case(make_images: Callable[..., DataCard]) -> None:
    card = override_card(make_images(), {"case_lists": "{split}.txt", "split_names": {"train": ["train"], "test": ["test"]}})
    root = Path(card.root or "")
    (root / "train.txt").write_text("s1\ns2\n")
    (root / "test.txt").write_text("s3\n\ns2\n")
    (problem,) = find_problems(find_cases(root, card), card)
    assert f"s2.jpg: is listed more than once (line 2 of {root / 'train.txt'} and line 3 of {root / 'test.txt'}). Keep one entry" in str(problem)


def test_find_problems_says_that_no_alternative_is_there(make_images: Callable[..., DataCard]) -> None:
    card = override_card(make_images(), {"label_files": ["none/{id}.png", "labels/{id}.png"]})
    root = Path(card.root or "")
    (root / "labels" / "s1.png").unlink()
    (problem,) = find_problems(find_cases(root, card), card)
    assert str(problem).startswith(f"{root / 'none' / 's1.png'}: is missing. So are the other files that `label_files` allows. Restore")
    assert find_problems(find_cases(root, override_card(card, {"exclude": ["s1"]})), card) == []


def test_find_problems_without_cases_names_the_patterns(tmp_path: Path) -> None:
    card = DataCard(name="x", classes=["a", "b"], patch_size=[8, 8])
    (problem,) = find_problems([], card, root=tmp_path)
    expected = (
        "found no cases in the layout 'paired' (images/{id}.* and labels/{id}.*). Check data.root and the card's `image_files` and `label_files`."
    )
    assert str(problem) == f"{tmp_path}: {expected}"


def test_check_reads_well_for_images(make_images: Callable[..., DataCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images()
    save(tmp_path / "images" / "s4.png", photo(4, (32, 20)))
    save(tmp_path / "labels" / "s4.png", np.full((32, 20), 255, np.uint8))
    (tmp_path / "blocks.yaml").write_text("classes: [wall, crack, stain, moss]\nimage_channels: 3\npatch_size: [16, 16]\nignore_index: 255\n")
    main([str(tmp_path / "blocks.yaml"), "--root", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"blocks in {tmp_path}",
        "  cases    4",
        "  shape    24 x 20 (min), 24 x 40 (median), 32 x 40 (max) pixels",
        "  labels   wall 33.33 %, crack 33.33 %, stain 33.33 %, moss 0.00 %; ignored 18.18 % of all",
        "  absent   moss: no pixel in any label",
        "  split    train 2, val 1, test 1",
        "  no problems",
    ]
