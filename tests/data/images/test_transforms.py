from __future__ import annotations

import pickle
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from painted import COLORS, image_card, inside, tiles
from torch import Tensor

from densecal.data.card import STANDARD_PIPELINE, DataCard
from densecal.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageLoading, ImagePipeline, Normalisation

pytestmark = pytest.mark.filterwarnings("ignore:ShiftScaleRotate", "ignore:This augmenter is very slow")

CROP: dict[str, Any] = {"RandomCrop": {"pad_if_needed": True}}

GEOMETRIC: dict[str, dict[str, Any]] = {
    "Affine": {"scale": [0.5, 2.0], "rotate": [-45, 45], "shear": [-10, 10]},
    "CoarseDropout": {"hole_height_range": [4, 9], "hole_width_range": [4, 9]},
    "CropAndPad": {"percent": [-0.2, 0.3]},
    "D4": {},
    "ElasticTransform": {"alpha": 30, "sigma": 4},
    "GridDistortion": {"distort_limit": [-0.4, 0.4]},
    "GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 4},
    "OpticalDistortion": {"distort_limit": [-0.5, 0.5]},
    "PadIfNeeded": {"min_height": 80, "min_width": 90},
    "Perspective": {"scale": [0.05, 0.2]},
    "PiecewiseAffine": {},
    "RandomGridShuffle": {},
    "RandomResizedCrop": {"scale": [0.2, 1.0]},
    "RandomRotate90": {},
    "RandomScale": {"scale_limit": [-0.5, 1.0]},
    "RandomSizedCrop": {"min_max_height": [16, 40]},
    "Rotate": {"limit": [-90, 90]},
    "SafeRotate": {"limit": [-90, 90]},
    "ShiftScaleRotate": {},
    "ThinPlateSpline": {},
    "Transpose": {},
    "VerticalFlip": {},
    "XYMasking": {"num_masks_x": 2, "num_masks_y": 2, "mask_x_length": 5, "mask_y_length": 5},
}


def with_crop(name: str, **arguments: Any) -> dict[str, Any]:
    return {name: {"p": 1.0, **arguments}} | CROP


def item_of(loading: ImageLoading, image: np.ndarray, label: np.ndarray) -> dict[str, Tensor]:
    """What `load` gives; labels as classes, 255 for none, or as shares."""
    if loading.reader.soft:
        codes = np.concatenate([label, 1 - label.sum(axis=2, keepdims=True)], axis=2).astype(np.float32)
    else:
        codes = np.where(label == 255, 0, label + 1).astype(np.uint8)
    statistics = torch.from_numpy(loading.normalise.statistics(image))
    return {"image": torch.from_numpy(image), "label": torch.from_numpy(codes), "statistics": statistics}


def back(image: Tensor, statistics: Tensor) -> np.ndarray:
    """The colours of a normalised patch, `(H, W, C)`."""
    return (image.movedim(0, -1) * statistics[3] + statistics[2]).numpy()


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_moves_image_and_label_alike(name: str) -> None:
    """The image is the label in colours: inside of the tiles it still is, the label has no new classes, and what is padding in one is in the other."""
    loading = ImageLoading(
        image_card(pipeline=with_crop(name, **GEOMETRIC[name]) if name != "RandomScale" else {name: {"p": 1.0}} | CROP), train=True
    )
    label = tiles((44, 56))
    label[:12, :15] = 4
    item = item_of(loading, COLORS[label], label)
    for seed in range(4):
        patch = loading.patch(item, seed)
        after = patch["label"][0].numpy().astype(np.uint8)
        assert set(np.unique(after)) <= {0, 1, 2, 3, 4, 255}
        padding = after == 255
        assert (patch["image"].numpy()[:, padding] == 0).all()
        colors = back(patch["image"], item["statistics"])
        nearest = np.abs(colors[..., None, :] - COLORS).sum(axis=-1).argmin(axis=-1)
        hidden = (patch["image"].abs().amax(dim=0) < 0.02).numpy()  # dropped out: the mean, up to a step of 8 bits
        compared = inside(after, 2) & ~padding & ~hidden
        assert (nearest == after)[compared].mean() > 0.99
        assert compared.sum() > 100


@pytest.mark.parametrize("num_classes", [3, 7, 11])
@pytest.mark.parametrize("name", [name for name in GEOMETRIC if name != "ShiftScaleRotate"])
def test_shares_stay_shares(name: str, num_classes: int) -> None:
    """With as many channels as OpenCV does not take at once, too; where a class is certain it is that of the colour."""
    card = image_card(classes=[f"c{c}" for c in range(num_classes)], soft_labels=True, pipeline=with_crop(name, **GEOMETRIC[name]))
    loading = ImageLoading(card, train=True)
    label = tiles((44, 56), num_classes=num_classes)
    shares = 0.7 * np.eye(num_classes)[label] + 0.3 / num_classes
    shares[20:30, 20:30] = 0
    image = np.repeat((20 * label + 20)[..., None], 3, axis=2)
    item = item_of(loading, image, shares.astype(np.float32))
    for seed in range(2):
        patch = loading.patch(item, seed)
        after = patch["label"]
        assert (after.shape, after.dtype) == ((num_classes, 32, 48), torch.float32)
        assert after.min() >= 0
        total = after.sum(dim=0)
        known = total > 0
        torch.testing.assert_close(total[known], torch.ones(int(known.sum())))
        sure = after.amax(dim=0) > 0.7 + 0.3 / num_classes - 1e-3
        padding = cv2.dilate((patch["image"] == 0).all(dim=0).numpy().astype(np.uint8), np.ones((3, 3))) > 0
        grey = np.rint((back(patch["image"], item["statistics"])[..., 0] - 20) / 20)
        compared = sure.numpy() & ~padding & inside(after.argmax(dim=0).numpy().astype(np.uint8), 1)
        if name not in ("CoarseDropout", "XYMasking"):
            assert (grey == after.argmax(dim=0).numpy())[compared].mean() > 0.99
        assert compared.sum() > 100


@pytest.mark.parametrize("name", ["RandomScale", "Resize"])
def test_resized_labels_keep_the_centre_of_each_pixel(name: str) -> None:
    """9 x 12 pixels made 3 x 4: each takes the middle one of its 3 x 3."""
    arguments = {"scale_limit": [-2 / 3, -2 / 3]} if name == "RandomScale" else {}
    card = image_card(classes=[f"c{c}" for c in range(108)], patch_size=[3, 4], pipeline={name: {"p": 1.0, **arguments}})
    loading = ImageLoading(card, train=True)
    label = np.arange(108, dtype=np.uint8).reshape(9, 12)
    patch = loading.patch(item_of(loading, np.zeros((9, 12, 3), np.uint8), label), 0)
    assert patch["label"][0].tolist() == label[1::3, 1::3].tolist()


@pytest.mark.parametrize("later", [{}, {"GaussianBlur": {"p": 1.0}}, {"ColorJitter": {"p": 1.0}}, {"GaussNoise": {"p": 1.0}, "Rotate": {"p": 1.0}}])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", [(np.uint8, 3), (np.float32, 3), (np.uint8, 1), (np.float32, 1)], ids=["uint8", "float32", "grey", "grey-float32"])
@pytest.mark.parametrize("normalisation", ["zscore", "none"])
def test_padding_is_the_mean_and_no_class(later: dict[str, Any], soft: bool, kind: tuple[Any, int], normalisation: str) -> None:
    dtype, channels = kind
    pipeline = {"PadIfNeeded": {"min_height": 32, "min_width": 48}} | later
    card = image_card(soft_labels=soft, image_channels=channels, normalisation=normalisation, pipeline=pipeline)
    loading = ImageLoading(card, train=True)
    image = np.random.default_rng(0).integers(100, 200, (20, 30, channels), dtype=np.uint8)
    image = image if dtype == np.uint8 else (image / 255).astype(np.float32)
    label = tiles((20, 30))
    patch = loading.patch(item_of(loading, image, np.eye(5, dtype=np.float32)[label] if soft else label), 1)
    assert (patch["image"].shape, patch["image"].dtype) == ((channels, 32, 48), torch.float32)
    outside = patch["label"].sum(dim=0) == 0 if soft else patch["label"][0] == 255
    assert (patch["image"][:, outside] == 0).all()
    if "Rotate" not in later:
        expected = torch.ones(32, 48, dtype=torch.bool)
        expected[6:26, 9:39] = False
        assert outside.equal(expected)
    else:
        assert 0.2 < outside.float().mean() < 0.9
    assert (patch["image"][:, ~outside] != 0).float().mean() > 0.5


def test_unlabelled_is_not_padding() -> None:
    """A pixel of the image without a class keeps its colour."""
    loading = ImageLoading(image_card(pipeline=CROP), train=True)
    patch = loading.patch(item_of(loading, np.full((32, 48, 3), 250, np.uint8), np.full((32, 48), 255, np.uint8)), 0)
    assert (patch["label"] == 255).all()
    assert (patch["image"] > 1).all()


def test_more_classes_than_a_byte_holds() -> None:
    card = image_card(classes=[f"c{c}" for c in range(300)], ignore_index=-100, pipeline={"Rotate": {"p": 1.0, "limit": [30, 30]}} | CROP)
    loading = ImageLoading(card, train=True)
    codes = np.full((32, 48), 300, np.int16)
    item = item_of(loading, np.zeros((32, 48, 3), np.uint8), codes) | {"label": torch.from_numpy(codes)}
    patch = loading.patch(item, 0)
    assert patch["label"].unique().tolist() == [-100, 299]
    assert loading.whole(item)["label"].unique().tolist() == [299]


def test_holes_have_the_colour_of_the_mean() -> None:
    """Of the image where its own mean is taken away; the label under them stays."""
    pipeline = {"CoarseDropout": {"p": 1.0, "num_holes_range": [1, 1], "hole_height_range": [6, 6], "hole_width_range": [7, 7]}} | CROP
    loading = ImageLoading(image_card(pipeline=pipeline, normalisation="zscore"), train=True)
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16] = [200, 100, 40]
    patch = loading.patch(item_of(loading, image, tiles((32, 48))), 0)
    assert int((patch["image"].abs() < 1e-6).all(dim=0).sum()) == 42
    assert patch["label"][0].numpy().tolist() == tiles((32, 48)).tolist()


def test_standard_pipeline_scales_crops_mirrors_and_recolours() -> None:
    """As its arguments say: half to twice as large, mirrored in half of the patches, recoloured in half, and each for itself."""
    loading = ImageLoading(image_card(patch_size=[40, 40]), train=True)
    assert loading.card.pipeline == STANDARD_PIPELINE
    label = np.zeros((60, 60), np.uint8)
    label[:, 30:] = 1
    label[25:35, 25:35] = 2  # 10 x 10
    item = item_of(loading, COLORS[label], label)
    widths, mirrored, recoloured = [], [], []
    for seed in range(300):
        patch = loading.patch(item, seed)
        after = patch["label"][0]
        columns = (after == 2).any(dim=0).nonzero().flatten().tolist()
        if columns and columns[0] > 0 and columns[-1] < 39:
            widths.append(len(columns))
        rows = after.tolist()
        left, right = ([c for c in row if c in (0, 1)] for row in (rows[20][:20], rows[20][20:]))
        if left and right and left[0] != right[-1]:
            mirrored.append(left[0] == 1)
            zeros = back(patch["image"], item["statistics"])[(after == 0).numpy()]
            recoloured.append(bool(np.abs(np.median(zeros, axis=0) - 40).max() > 1))
    assert 5 <= min(widths) <= 6
    assert 18 <= max(widths) <= 20
    assert len(mirrored) > 100
    for draws in (mirrored, recoloured, np.equal(mirrored, recoloured)):
        assert 0.35 < np.mean(draws) < 0.65


def test_without_augmentation_patches_are_cropped_and_nothing_else() -> None:
    card = image_card(augment=False, patch_size=[4, 6])
    loading = ImageLoading(card, train=True)
    image = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    item = item_of(loading, image, np.zeros((8, 9), np.uint8))
    whole = loading.whole(item)["image"]
    windows = [whole[:, r : r + 4, c : c + 6] for r in range(5) for c in range(4)]
    found = {next(n for n, window in enumerate(windows) if window.equal(loading.patch(item, seed)["image"])) for seed in range(200)}
    assert len(found) == len(windows)


@pytest.mark.parametrize("name", ["Superpixels", "GlassBlur", "PlasmaShadow", "ElasticTransform", "RandomRain", "PiecewiseAffine", "GaussNoise"])
def test_a_patch_follows_from_its_seed_alone(name: str) -> None:
    """Not from what came before, nor from the global generators, nor is it changed by a journey to another process."""
    loading = ImageLoading(image_card(pipeline=with_crop(name)), train=True)
    item = item_of(loading, COLORS[tiles((40, 60))], tiles((40, 60)))
    seed = 2**63 - 1
    first = loading.patch(item, seed)
    np.random.seed(5)
    loading.patch(item, 3)
    travelled = pickle.loads(pickle.dumps(loading))
    for again in (loading.patch(item, seed), travelled.patch(item, seed)):
        assert again["image"].equal(first["image"])
        assert again["label"].equal(first["label"])
    assert not loading.patch(item, 4)["image"].equal(first["image"])


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"RandomScal": {}}, r"data\.pipeline\.RandomScal: albumentations has no such transform of images\. Did you mean 'RandomScale'"),
        ({"Zzz": {}}, r"data\.pipeline\.Zzz: albumentations has no such transform of images\.$"),
        ({"HorizontalFlip": {"prob": 0.5}}, r"data\.pipeline\.HorizontalFlip\.prob: not an argument of HorizontalFlip\. .*p"),
        ({"HorizontalFlip": {"p": 2}}, r"data\.pipeline\.HorizontalFlip: p: Input should be less than or equal to 1 \(got 2\)$"),
        ({"RandomScale": {"scale_limit": "much"}}, r"data\.pipeline\.RandomScale: scale_limit.*got 'much'"),
        ({"RandomSizedCrop": {}}, r"data\.pipeline\.RandomSizedCrop: min_max_height: Field required"),
        ({"Rotate": {"mask_interpolation": 1}}, r"data\.pipeline\.Rotate\.mask_interpolation: labels are resized to the nearest and nothing else"),
        ({"Normalize": {}}, r"data\.pipeline\.Normalize: images are normalised .* after the pipeline"),
        ({"ToTensorV2": None}, r"data\.pipeline\.ToTensorV2: images are normalised and made tensors after the pipeline"),
        ({"FDA": {}}, r"data\.pipeline\.FDA: needs fda_metadata besides an image and its label"),
        ({"CoarseDropout": {"fill_mask": 7}}, r"data\.pipeline\.CoarseDropout\.fill_mask: expected a class 0 to 4 or ignore_index 255, but got 7"),
    ],
)
def test_what_albumentations_refuses_is_one_line(pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ImageLoading(image_card(pipeline=pipeline), train=True)
    assert "\n" not in str(error.value)
    ImageLoading(image_card(pipeline=pipeline), train=False)  # an evaluation does not draw patches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_channels": 1, "pipeline": {"RandomRain": {}}}, r"data\.pipeline\.RandomRain: cannot vary images of 1 channel\(s\).* 3-channel"),
        ({"image_channels": 1, "pipeline": {"ToRGB": {}}}, r"data\.pipeline\.ToRGB: turns uint8 images of 1 channel into uint8 images of 3 channels"),
        ({"soft_labels": True, "pipeline": {"Morphological": {}}}, r"data\.pipeline\.Morphological: makes shares that do not sum to 1"),
        (
            {"soft_labels": True, "pipeline": {"Rotate": {"mask_interpolation": 2}}},
            r"Rotate\.mask_interpolation: expected one of 0 \(INTER_NEAREST\), 1 .*got 2",
        ),
        ({"soft_labels": True, "pipeline": {"Rotate": {"fill_mask": 1}}}, r"data\.pipeline\.Rotate\.fill_mask: soft labels are filled with nothing"),
    ],
)
def test_what_does_not_suit_the_set_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageLoading(image_card(normalisation="zscore", **changes), train=True)


def test_a_pipeline_of_another_size_is_refused() -> None:
    loading = ImageLoading(image_card(pipeline={"HorizontalFlip": {}}), train=True)
    item = item_of(loading, np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.uint8))
    with pytest.raises(ValueError, match=r"data\.pipeline gives \(40, 50\) instead of data\.patch_size \(32, 48\)\. Let it end with a RandomCrop"):
        loading.patch(item, 0)


def test_arguments_that_are_classes_are_given_as_classes() -> None:
    """The pipeline's own codes stay inside: class 2 fills the holes, and ignore_index is no class."""
    for value in (2, 255):
        pipeline = {
            "CoarseDropout": {"p": 1.0, "fill_mask": value, "num_holes_range": [1, 1], "hole_height_range": [5, 5], "hole_width_range": [5, 5]}
        }
        loading = ImageLoading(image_card(pipeline=pipeline), train=True)
        patch = loading.patch(item_of(loading, np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8)), 0)
        assert int((patch["label"] == value).sum()) == 25


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("kind", "channels"), [("imagenet", 3), *((kind, c) for kind in ("zscore", "percentile", "none") for c in (1, 3))])
def test_normalisation_is_its_formula(kind: str, channels: int, dtype: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (13, 17, channels), dtype=np.uint8)
    image = image if dtype == np.uint8 else (image / 255).astype(np.float32)
    values = image.astype(np.float64)
    low, high = np.percentile(values, (0.5, 99.5), axis=(0, 1))
    clipped = values.clip(low, high) if kind == "percentile" else values
    unit = 255 if dtype == np.uint8 else 1
    expected = {
        "imagenet": lambda: (values / unit - IMAGENET_MEAN) / IMAGENET_STD,
        "zscore": lambda: (values - values.mean(axis=(0, 1))) / values.std(axis=(0, 1)),
        "percentile": lambda: (clipped - clipped.mean(axis=(0, 1))) / clipped.std(axis=(0, 1)),
        "none": lambda: values / unit,
    }[kind]()
    normalise = Normalisation(kind)
    result = normalise(torch.from_numpy(image), torch.from_numpy(normalise.statistics(image)))
    assert (result.dtype, result.is_contiguous()) == (torch.float32, True)
    np.testing.assert_allclose(result.numpy(), expected.transpose(2, 0, 1), atol=2e-5)


def test_normalising_leaves_the_image_and_a_constant_one_is_zero() -> None:
    image = torch.full((4, 5, 3), 7, dtype=torch.uint8)
    normalise = Normalisation("zscore")
    assert (normalise(image, torch.from_numpy(normalise.statistics(image.numpy()))) == 0).all()
    floats = torch.rand(4, 5, 3)
    kept = floats.clone()
    normalise(floats, torch.from_numpy(normalise.statistics(floats.numpy())))
    assert floats.equal(kept)


def test_pipeline_is_the_cards_in_its_order() -> None:
    card: DataCard = image_card(pipeline={"HorizontalFlip": None, "RandomScale": {}} | CROP)
    names = [type(step).__name__ for step in ImagePipeline(card, ImageLoading(card, train=False).reader).compose.transforms]
    assert names == ["HorizontalFlip", "RandomScale", "RandomCrop"]
