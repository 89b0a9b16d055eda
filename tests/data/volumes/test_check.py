from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from densecal.data.card import DataCard, load_card, override_card
from densecal.data.layouts import find_cases
from densecal.data.validate import find_problems

Damage = Callable[[Path, Path], None]


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray | None], affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    values = np.asanyarray(image.dataobj).copy()
    changed = change(values)
    nib.save(nib.Nifti1Image(values if changed is None else changed, image.affine if affine is None else affine), path)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def bad_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 0xFF
    path.write_bytes(content)


def put(value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[0, 0, 0] = value

    return change


SHIFT = np.array([[1, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])

CASES: dict[str, tuple[str, Damage, str]] = {
    "image-cut-short": ("image", lambda i, _: i.write_bytes(i.read_bytes()[:200]) and None, "cannot be read"),
    "image-flipped-byte": ("image", lambda i, _: flip_byte(i), "cannot be read"),
    "image-checksum": ("image", lambda i, _: bad_checksum(i), "cannot be read"),
    "image-not-gzip": ("image", lambda i, _: i.write_text("<html>404</html>") and None, "cannot be read"),
    "image-missing": ("image", lambda i, _: i.unlink(), "is missing"),
    "image-nan": ("image", lambda i, _: edit(i, put(np.nan)), "holds 1 NaN or infinite"),
    "image-inf": ("image", lambda i, _: edit(i, put(np.inf)), "holds 1 NaN or infinite"),
    "image-empty": ("image", lambda i, _: edit(i, np.zeros_like), "is empty: every voxel is 0"),
    "image-two-channels": ("image", lambda i, _: edit(i, lambda v: np.stack([v, v], -1)), "expected 1 channel"),
    "image-flat": ("image", lambda i, _: edit(i, lambda v: v[..., 0]), "expected a volume with three axes"),
    "label-cut-short": ("label", lambda _, y: y.write_bytes(y.read_bytes()[:60]) and None, "cannot be read"),
    "label-missing": ("label", lambda _, y: y.unlink(), "is missing"),
    "label-shape": ("label", lambda _, y: edit(y, lambda v: v[:-1]), "has the shape"),
    "label-affine": ("label", lambda _, y: edit(y, lambda v: None, SHIFT), r"lies elsewhere in space than s003\.nii\.gz: .* 0\.5 mm"),
    "label-outside": ("label", lambda _, y: edit(y, put(7)), r"outside the card's classes 0 to 2: 7 \(1 voxels\)"),
    "label-negative": ("label", lambda _, y: edit(y, lambda v: put(-1)(w := v.astype(np.int16)) or w), r"outside .*: -1 \(1 voxels\)"),
    "label-fraction": ("label", lambda _, y: edit(y, lambda v: (v * 0.5).astype(np.float32)), "not whole numbers"),
    "label-nan": ("label", lambda _, y: edit(y, lambda v: put(np.nan)(w := v.astype(np.float32)) or w), "holds 1 NaN"),
    "label-soft": ("label", lambda _, y: edit(y, lambda v: np.stack([v, v], -1)), "set `soft_labels: true`"),
}


@pytest.mark.parametrize("name", CASES)
def test_find_problems_is_one_line_that_names_the_file(make_set: Callable[..., DataCard], name: str) -> None:
    card = make_set(4)
    case = find_cases(Path(card.root or ""), card)[2]
    assert case.label is not None
    file, damage, message = CASES[name]
    damage(case.image[0], case.label)
    problems = find_problems(find_cases(Path(card.root or ""), card), card)
    assert [(problem.case_id, problem.file) for problem in problems] == [("s003", case.image[0] if file == "image" else case.label)]
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(problems[0]))
    assert "\n" not in str(problems[0])
    assert str(problems[0].file) in str(problems[0])


def test_find_problems_accepts_sound_sets(make_set: Callable[..., DataCard]) -> None:
    for card in (make_set(3), make_set(3, folder="paired", layout="paired"), make_set(3, folder="soft", soft=True)):
        assert find_problems(find_cases(Path(card.root or ""), card), card) == []


def test_find_problems_accepts_ignore_index_and_labels_stored_as_float(make_set: Callable[..., DataCard]) -> None:
    card = make_set(2, ignore_index=255)
    for case in find_cases(Path(card.root or ""), card):
        assert case.label is not None
        edit(case.label, lambda v: put(255)(w := v.astype(np.float32)) or w)
    cases = find_cases(Path(card.root or ""), card)
    assert find_problems(cases, card) == []
    assert len(find_problems(cases, override_card(card, {"ignore_index": -100}))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * 0.9, "shares that sum to 1"),
        (lambda v: v[..., :2], r"expected soft labels \(X, Y, Z, 3\)"),
        (lambda v: v * np.array([-1, 1, 1], np.float32), r"expected shares in \[0, 1\]"),
    ],
    ids=["sum", "channels", "negative"],
)
def test_find_problems_soft_labels(make_set: Callable[..., DataCard], change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    card = make_set(2, soft=True)
    case = find_cases(Path(card.root or ""), card)[0]
    assert case.label is not None
    edit(case.label, change)
    (problem,) = find_problems(find_cases(Path(card.root or ""), card), card)
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(problem))


def test_find_problems_without_cases_or_with_repeats(make_set: Callable[..., DataCard], tmp_path: Path) -> None:
    card = make_set(2)
    (problem,) = find_problems([], card, root=tmp_path)
    assert str(problem).startswith(f"{tmp_path}: found no cases in the layout 'decathlon'")
    cases = find_cases(Path(card.root or ""), card)
    (problem,) = find_problems([*cases, cases[0]], card)
    assert "listed more than once" in str(problem)


def test_find_problems_hippocampus_is_sound_and_quick(hippocampus: Path) -> None:
    card = load_card("hippocampus")
    start = time.perf_counter()
    assert find_problems(find_cases(hippocampus, card), card) == []
    assert time.perf_counter() - start < 20  # 1 s on two idle cores
