from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from densecal.data.card import DataCard, load_card, override_card
from densecal.data.dataset import CaseDataset
from densecal.data.layouts import Case, find_cases
from densecal.data.volumes.transforms import DecodeLabeld, EncodeLabeld, RandCropd, eval_transforms, load_image, restore


def first_case(card: DataCard) -> Case:
    return find_cases(Path(card.root or ""), card)[0]


def paths(case: Case) -> dict[str, list[str] | str]:
    return {"image": [str(path) for path in case.image], "label": str(case.label)}


def stored(path: Path | None) -> np.ndarray:
    assert path is not None
    return np.asanyarray(nib.load(path).dataobj)


def patch(card: DataCard, seed: int = 0) -> dict[str, Tensor]:
    return CaseDataset([first_case(card)], card, train=True)[0, seed]


def test_eval_transforms_gives_the_volume_as_stored(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1)
    case = first_case(card)
    item = eval_transforms(card)(paths(case))
    values = stored(case.image[0]).astype(np.float64)
    np.testing.assert_allclose(item["image"][0].numpy(), (values - values.mean()) / values.std(), atol=1e-4)
    np.testing.assert_array_equal(item["label"][0].numpy(), stored(case.label))
    assert (item["image"].dtype, item["label"].dtype, item["label"].ndim) == (torch.float32, torch.int64, 4)
    np.testing.assert_array_equal(item["image"].affine.numpy(), nib.load(case.image[0]).affine)


@pytest.mark.parametrize("normalisation", ["zscore", "zscore_nonzero", "percentile", "none"])
def test_eval_transforms_normalises(make_set: Callable[..., DataCard], normalisation: str) -> None:
    card = make_set(1, normalisation=normalisation)
    case = first_case(card)
    values = stored(case.image[0]).copy()
    values[:4] = 0
    values[0, 0, 0] = 1e6
    nib.save(nib.Nifti1Image(values, np.eye(4)), case.image[0])
    image = eval_transforms(card)(paths(case))["image"]
    inside = image[image != 0] if normalisation == "zscore_nonzero" else image
    if normalisation == "none":
        np.testing.assert_array_equal(image[0].numpy(), values)
    else:
        assert inside.mean().abs() < 1e-3
        assert (inside.std() - 1).abs() < 1e-2
    assert (image.max() < 10) == (normalisation == "percentile"), "the outlier is clipped"


def test_labels_stored_as_float_are_exact(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1)
    case = first_case(card)
    label = stored(case.label)
    nib.save(nib.Nifti1Image(label.astype(np.float32) + np.float32(1e-4), nib.load(case.label).affine), case.label)
    np.testing.assert_array_equal(eval_transforms(card)(paths(case))["label"][0].numpy(), label)


def test_hippocampus_003_is_whole(hippocampus: Path) -> None:
    card = load_card("hippocampus")
    case = next(case for case in find_cases(hippocampus, card) if case.id == "hippocampus_003")
    label = eval_transforms(card)(paths(case))["label"]
    assert label.dtype == torch.int64
    assert label.unique().tolist() == [0, 1, 2]


def test_multi_channel_images_are_normalised_each(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1, image_channels=2)
    case = first_case(card)
    values = stored(case.image[0])
    nib.save(nib.Nifti1Image(np.stack([values, 1000 - 3 * values], -1), np.eye(4)), case.image[0])
    image = eval_transforms(card)(paths(case))["image"]
    assert image.shape == (2, *values.shape)
    torch.testing.assert_close(image[0], -image[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ignore_index", [-100, 255, -1])
def test_encode_and_decode_are_inverse(ignore_index: int) -> None:
    card = DataCard(name="x", classes=["a", "b", "c"], ignore_index=ignore_index)
    label = torch.tensor([[[[0.0, 1, 2, ignore_index]]]])
    code = EncodeLabeld(card)({"label": label})["label"]
    assert code.flatten().tolist() == [1, 2, 3, 0]
    assert DecodeLabeld(card)({"label": code})["label"].equal(label.long())
    with pytest.raises(ValueError, match="values outside the card's classes 0 to 2"):
        EncodeLabeld(card)({"label": torch.full((1, 1, 1, 1), 3.0)})


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("fraction", [None, 0.5], ids=["centred", "sampled"])
def test_training_padding_is_zero_and_ignored(make_set: Callable[..., DataCard], augment: bool, fraction: float | None) -> None:
    card = make_set(1, shape=(5, 6, 4), patch_size=[8, 16, 8], augment=augment, foreground_fraction=fraction)
    card = override_card(
        card, {"augmentation": {"noise_probability": 1.0, "contrast_probability": 1.0, "bias_probability": 1.0, "flip_axes": [0, 1, 2]}}
    )
    for seed in range(4):
        item = patch(card, seed)
        assert item["image"].shape == item["label"].shape == (1, 8, 16, 8)
        padding = item["label"] == card.ignore_index
        assert padding.any()
        assert (item["label"][~padding] >= 0).all()
        assert (item["image"][:, 0, 0, 0] == 0).all()
    if not augment:
        item = patch(card)
        assert (~padding).sum() == 6 * 7 * 5  # the whole volume lies in the patch
        assert (item["image"][padding] == 0).all()


def test_training_label_moves_with_its_image(make_set: Callable[..., DataCard]) -> None:
    """A noiseless image that equals its label stays so (nearest against linear: away from edges) under the strongest augmentation."""
    card = make_set(1, shape=(24, 24, 24), patch_size=[16, 16, 16], normalisation="none", foreground_fraction=1.0)
    card = override_card(card, {"augmentation": {"affine_probability": 1.0, "rotate": 45, "flip_axes": [0, 1, 2]}})
    card = override_card(card, {"augmentation": dict.fromkeys(("noise_probability", "contrast_probability", "bias_probability"), 0.0)})
    case = first_case(card)
    nib.save(nib.Nifti1Image(stored(case.label).astype(np.float32), nib.load(case.image[0]).affine), case.image[0])
    seen = set()
    for seed in range(5):
        item = patch(card, seed)
        valid = item["label"] >= 0
        error = (item["image"] - item["label"])[valid].abs()
        assert (error < 0.5 + 1e-4).float().mean() > 0.95
        seen |= set(item["label"].unique().tolist())
    assert {0, 1, 2} <= seen <= {-100, 0, 1, 2}, "labels are never interpolated"


def test_training_soft_labels_stay_floats(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1, soft=True, shape=(9, 12, 10), patch_size=[16, 16, 16])
    card = override_card(card, {"augmentation": {"affine_probability": 1.0}})
    for seed in range(3):
        label = patch(card, seed)["label"]
        assert (label.shape, label.dtype) == ((3, 16, 16, 16), torch.float32)
        total = label.sum(dim=0)
        assert ((total - 1).abs().lt(1e-5) | (total == 0)).all()
        assert (total == 0).any()
        assert label[:, total > 0].max() < 0.9, "hard values are 0.867 and 0.067, and anything between"
    whole = eval_transforms(card)(paths(first_case(card)))["label"]
    np.testing.assert_allclose(whole.permute(1, 2, 3, 0).numpy(), stored(first_case(card).label), atol=1e-6)


def test_sampling_follows_the_foreground(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1, shape=(40, 40, 40), patch_size=[8, 8, 8], augment=False, foreground_fraction=1.0)
    case = first_case(card)
    label = np.zeros_like(stored(case.label))
    label[3, 30, 20] = 1
    nib.save(nib.Nifti1Image(label, nib.load(case.label).affine), case.label)
    dataset = CaseDataset([case], card, train=True)
    assert all((dataset[0, seed]["label"] == 1).sum() == 1 for seed in range(10))
    anywhere = CaseDataset([case], override_card(card, {"foreground_fraction": 0.0}), train=True)
    assert sum(int((anywhere[0, seed]["label"] == 1).sum()) for seed in range(20)) <= 3


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_sampling_without_foreground_draws_anywhere(make_set: Callable[..., DataCard], soft: bool) -> None:
    card = make_set(1, soft=soft, foreground_fraction=1.0, patch_size=[4, 4, 4])
    case = first_case(card)
    empty = np.zeros_like(stored(case.label))
    if soft:
        empty[..., 0] = 1
    nib.save(nib.Nifti1Image(empty, nib.load(case.label).affine), case.label)
    dataset = CaseDataset([case], card, train=True)
    images = [dataset[0, seed]["image"] for seed in range(4)]
    assert not images[0].equal(images[1])


@pytest.mark.parametrize("shape", [(20, 20, 20), (8, 20, 5), (3, 4, 5)])
def test_crop_reaches_every_voxel_and_stays_inside(shape: tuple[int, int, int]) -> None:
    card = DataCard(name="x", classes=["a", "b"], patch_size=[8, 8, 8], augment=False, foreground_fraction=0.0)
    crop = RandCropd(card)
    image = torch.arange(float(np.prod(shape))).reshape(1, *shape)
    seen: set[float] = set()
    for seed in range(400):
        crop.set_random_state(seed=seed)
        item = crop({"image": image, "label": image, "foreground": torch.zeros(0, 3)})
        assert all(n + sum(p) == 8 for n, p in zip(item["image"].shape[1:], item["pad"], strict=True))
        assert all(sum(p) == max(8 - n, 0) for n, p in zip(shape, item["pad"], strict=True))
        seen |= set(item["image"].flatten().tolist())
    assert len(seen) == image.numel()


def test_spacing_resamples_image_and_label_alike(make_set: Callable[..., DataCard]) -> None:
    card = make_set(1, spacing=[1.0, 1.0, 1.0], shape=(12, 12, 12))
    case = first_case(card)
    item = eval_transforms(card)(paths(case))
    assert item["image"].shape == item["label"].shape
    assert item["image"].shape[3] == 2 * stored(case.label).shape[2] - 1
    assert item["label"].unique().tolist() == [0, 1, 2]
    np.testing.assert_allclose(item["image"].pixdim, [1, 1, 1])
    assert torch.allclose(CaseDataset([case], card, train=False)[0]["spacing"], torch.ones(3))


@pytest.mark.parametrize(
    "changes", [{}, {"spacing": [1.3, 0.8, 1.0], "orientation": "LPS"}, {"orientation": "SRP"}], ids=["kept", "resampled", "turned"]
)
def test_restore_brings_a_prediction_back_to_the_file(make_set: Callable[..., DataCard], changes: dict[str, object]) -> None:
    card = make_set(1, normalisation="none", shape=(24, 24, 24), **changes)
    case = first_case(card)
    smooth = np.add.outer(np.add.outer(np.arange(24.0), 3 * np.arange(24.0)), 10 * np.arange(24.0)).astype(np.float32)
    nib.save(nib.Nifti1Image(smooth, nib.load(case.label).affine), case.image[0])
    image, transform = load_image(case.image[0], card)
    assert isinstance(image, MetaTensor)
    back = restore(torch.cat([image, 2 * image]), image, transform)
    assert type(back) is Tensor
    assert back.shape == (2, 24, 24, 24)
    np.testing.assert_allclose(back[1, 2:-2, 2:-2, 2:-2].numpy(), 2 * smooth[2:-2, 2:-2, 2:-2], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(image.meta["original_affine"], nib.load(case.image[0]).affine)
