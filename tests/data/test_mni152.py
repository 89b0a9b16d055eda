from __future__ import annotations

import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from densecal.data.card import load_card
from densecal.data.layouts import find_cases
from densecal.data.mni152 import GAP, RESOLUTION, SLABS
from densecal.data.prepare import build_once, prepare
from densecal.data.split import split_cases
from densecal.data.validate import find_problems

nilearn_datasets = pytest.importorskip("nilearn.datasets")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set, made without a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    folder = tmp_path_factory.mktemp("mni152") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        prepare("mni152", folder)
    return folder


def rows(image: nib.Nifti1Image, template: nib.Nifti1Image) -> np.ndarray:
    """Front-back voxel numbers of a slab in the template's grid, by way of the affines."""
    origin = np.linalg.inv(template.affine) @ image.affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(origin, origin.round(), atol=1e-6)
    return int(origin[1].round()) + np.arange(image.shape[1])


def test_prepare_makes_a_sound_set(root: Path) -> None:
    card = load_card("mni152")
    cases = find_cases(root, card)
    assert {case.id for case in cases} == set(SLABS)
    assert find_problems(cases, card) == []
    assert {name: [case.id for case in side] for name, side in split_cases(cases, card).items()} == card.splits
    assert [path.name for path in root.parent.iterdir() if not path.name.startswith(".")] == ["set"]


def test_prepare_keeps_every_voxel_where_it_was(root: Path) -> None:
    template = nilearn_datasets.load_mni152_template(resolution=RESOLUTION)
    grey = nilearn_datasets.load_mni152_gm_template(resolution=RESOLUTION)
    for name in SLABS:
        image, label = (nib.load(root / folder / f"{name}.nii.gz") for folder in ("images", "labels"))
        low = (np.linalg.inv(template.affine) @ image.affine @ [0, 0, 0, 1])[:3].round().astype(int)
        window = tuple(slice(a, a + n) for a, n in zip(low, image.shape, strict=True))
        np.testing.assert_array_equal(image.get_fdata(), np.asarray(template.dataobj)[window])
        np.testing.assert_allclose(label.get_fdata()[..., 1], np.asarray(grey.dataobj)[window], atol=1e-6)
        np.testing.assert_array_equal(image.affine, label.affine)


def test_prepare_leaves_a_gap_of_one_patch_before_training(root: Path) -> None:
    template = nilearn_datasets.load_mni152_template(resolution=RESOLUTION)
    card = load_card("mni152")
    train, val, test = (rows(nib.load(root / "images" / f"{card.splits[split][0]}.nii.gz"), template) for split in ("train", "val", "test"))
    assert card.patch_size[1] == GAP
    for held_out in (val, test):
        assert train.min() - held_out.max() - 1 >= GAP
    assert not set(val) & set(test)
    assert nib.aff2axcodes(template.affine)[1] == "A", "the second axis runs to the front"


def test_prepare_labels_are_soft_and_sum_to_one(root: Path) -> None:
    shares = np.concatenate([nib.load(path).get_fdata(dtype=np.float32).reshape(-1, 3) for path in sorted((root / "labels").iterdir())])
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert shares.min() >= 0
    assert 0.3 < (shares.max(axis=1) < 0.99).mean() < 0.6  # the box around the brain; 21 % of the whole template


def test_build_once_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> Path:
        (folder / "half").touch()
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        build_once(tmp_path / "set", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    build_once(tmp_path / "set", lambda folder: folder)
    build_once(tmp_path / "set", fail)  # it is there: nothing to do
