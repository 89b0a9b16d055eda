"""The mean of several networks' probabilities, and who may be a member."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from teachers import CARD, IMAGES, write_teacher
from torch import Tensor, nn
from volumes import blob, save

from densecal.data import DataCard
from densecal.inference import Ensemble, Predictor, WholeImage, cases_of_split
from densecal.inference.calibration import find_calibration
from densecal.inference.ensemble import check_one_data_set
from densecal.posthoc import TemperatureScaling, save_calibrator
from densecal.runs import file_hash


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("scan") / "scan.nii.gz", blob((7, 9, 8), seed=3)[0])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Of three networks that disagree; the second sees the image in another way."""
    folder = tmp_path_factory.mktemp("members")
    cards = (CARD, replace(CARD, normalisation="percentile", spacing=[1.5, 1.0, 2.0]), CARD)
    return [write_teacher(folder / f"{n}.ckpt", card, seed=n) for n, card in enumerate(cards)]


def slow_mean(every: list[Tensor]) -> np.ndarray:
    """Pixel by pixel, in double precision."""
    expected = np.zeros(every[0].shape)
    for place in product(*map(range, expected.shape)):
        expected[place] = sum(float(probs[place]) for probs in every) / len(every)
    return expected


def test_ensemble_is_the_mean_of_its_members(checkpoints, scan):
    every = [Predictor.from_run(path)(scan).probs for path in checkpoints]
    assert max(float((a - b).abs().max()) for a, b in pairwise(every)) > 0.1
    prediction = Ensemble.from_runs(checkpoints)(scan)
    assert prediction.probs.shape == (3, 7, 9, 8)
    np.testing.assert_allclose(prediction.probs, slow_mean(every), atol=1e-6)
    np.testing.assert_allclose(prediction.probs.sum(0), 1, atol=1e-6)
    assert prediction.label_map.shape == (7, 9, 8)


def test_ensemble_of_regions_and_of_images(tmp_path):
    card = replace(IMAGES, regions={"left": [1], "both": [1, 2]})
    paths = [write_teacher(tmp_path / f"{n}.ckpt", card, seed=n) for n in range(2)]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (18, 14, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    every = [Predictor.from_run(path)(tmp_path / "photo.png").probs for path in paths]
    np.testing.assert_allclose(Ensemble.from_runs(paths)(tmp_path / "photo.png").probs, slow_mean(every), atol=1e-6)


def test_ensemble_of_one_is_the_run(checkpoints, scan):
    assert torch.equal(Ensemble.from_runs(checkpoints[:1])(scan).probs, Predictor.from_run(checkpoints[0])(scan).probs)


def test_order_of_members_does_not_matter(checkpoints, scan):
    torch.testing.assert_close(Ensemble.from_runs(checkpoints)(scan).probs, Ensemble.from_runs(checkpoints[::-1])(scan).probs)


class Told(nn.Module):
    """Says the same logits everywhere."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.view(1, -1, 1, 1, 1).expand(len(image), -1, *image.shape[2:])


def test_probabilities_are_averaged_not_logits(scan):
    """Of 0.9 and 0.2 the mean is 0.55; averaged logits would give 0.6: the surer one outvotes the other."""
    card = replace(CARD, classes=["background", "left"])
    members = [Predictor(Told([0.0, float(np.log(p / (1 - p)))]), card, WholeImage(3)) for p in (0.9, 0.2)]
    probs = Ensemble(members)(scan).probs
    torch.testing.assert_close(probs[1], torch.full((7, 9, 8), 0.55))


def test_one_sum_however_many_members(scan):
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    class Watched(Predictor):
        def __call__(self, path):
            prediction = super().__call__(path)
            alive.append(weakref.ref(prediction.probs))
            counts.append(sum(probs() is not None for probs in alive))
            return prediction

    card = replace(CARD, classes=["background", "left"])
    Ensemble([Watched(Told([0.0, float(n)]), card, WholeImage(3)) for n in range(5)])(scan)
    assert counts == [1, 2, 2, 2, 2]


def test_calibrator_comes_after_the_mean(checkpoints, scan, tmp_path):
    scaling = TemperatureScaling(3).fit([(torch.tensor([[[4.0, 4.0], [0.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1]]))])
    assert float(scaling.temperature) > 1.5
    path = save_calibrator(scaling, tmp_path / "temperature.safetensors", {"classes": CARD.classes, "fitted_on": ["a"]})
    ensemble = Ensemble.from_runs(checkpoints, calibration=str(path))
    mean = Ensemble.from_runs(checkpoints)(scan).probs
    torch.testing.assert_close(ensemble(scan).probs, scaling(mean.unsqueeze(0), from_probs=True)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["background", "left", "other"]}, r"1\.ckpt: was trained on the classes .*'other'\], but .*0\.ckpt on the classes .*'right'\]"),
        ({"regions": {"one": [1], "two": [2], "three": [1, 2]}}, r"1\.ckpt: was trained on the regions .*, but .*0\.ckpt on the classes"),
        ({"image_channels": 2}, r"1\.ckpt: was trained on images of 2 channel\(s\) in 3D, but .*0\.ckpt on images of 1 channel"),
        ({"patch_size": [8, 8]}, r"1\.ckpt: was trained on images of 1 channel\(s\) in 2D, but .*0\.ckpt on .* in 3D"),
    ],
    ids=["classes", "regions", "channels", "dims"],
)
def test_members_that_do_not_fit_are_named(changes, message, checkpoints, tmp_path):
    other = write_teacher(tmp_path / "1.ckpt", replace(CARD, **changes))
    with pytest.raises(ValueError, match=message):
        Ensemble.from_runs([checkpoints[0], other])


def test_images_that_are_turned_differently_do_not_fit(tmp_path):
    paths = [write_teacher(tmp_path / f"{exif}.ckpt", replace(IMAGES, exif=exif)) for exif in ("apply", "ignore")]
    with pytest.raises(
        ValueError, match=r"ignore\.ckpt: was trained on images read with exif=ignore, but .*apply\.ckpt on images read with exif=apply"
    ):
        Ensemble.from_runs(paths)


def test_no_member_or_one_named_twice_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"at least one member"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"0\.ckpt: is named twice"):
        Ensemble.from_runs([checkpoints[0], checkpoints[1], str(checkpoints[0])])


def test_member_with_a_calibrator_of_its_own_is_refused(checkpoints, tmp_path):
    scaling = TemperatureScaling(3).fit([(torch.randn(1, 3, 4), torch.tensor([[0, 1, 2, 0]]))])
    path = save_calibrator(scaling, tmp_path / "temperature.safetensors", {"classes": CARD.classes, "fitted_on": ["a"]})
    member = Predictor.from_run(checkpoints[0], calibration=str(path))
    with pytest.raises(ValueError, match=r"0\.ckpt: has a calibrator of its own.*as a whole"):
        Ensemble([member])


# Which calibrator belongs to which members.


def known(paths: list[Path]) -> dict:
    return {path: Predictor.from_run(path).config.inference for path in paths}


def fitted(folder: Path, paths: list[Path]) -> str:
    """A calibrator as ``densecal-calibrate`` leaves it for these checkpoints."""
    members = [
        {"run": path.stem, "checkpoint": file_hash(path), "inference": OmegaConf.to_container(inference)} for path, inference in known(paths).items()
    ]
    facts = {"classes": CARD.classes, "fitted_on": ["a"], **(members[0] if len(members) == 1 else {"members": members})}
    scaling = TemperatureScaling(3).fit([(torch.randn(1, 3, 4), torch.tensor([[0, 1, 2, 0]]))])
    return str(save_calibrator(scaling, folder / "temperature.safetensors", facts))


def test_calibrator_of_members_is_theirs_in_any_order(checkpoints, tmp_path):
    path = fitted(tmp_path, checkpoints)
    assert find_calibration(path, known(checkpoints[::-1]), CARD).name == "temperature"
    assert [member["run"] for member in find_calibration(path, known(checkpoints), CARD).members] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("of", "given", "message"),
    [
        ([0, 1, 2], [0, 1], r"fitted for the mean of 0, 1, 2, and says nothing about the mean of .*0\.ckpt, .*1\.ckpt\."),
        ([0, 1], [0, 2], r"fitted for the mean of 0, 1, and says nothing about the mean of .*0\.ckpt, .*2\.ckpt\."),
        ([0, 1], [0], r"fitted for the mean of 0, 1, and says nothing about .*0\.ckpt alone"),
        ([0], [0, 1], r"fitted for 0 alone, and says nothing about the mean of .*0\.ckpt, .*1\.ckpt\."),
        ([0], [1], r"fitted for another checkpoint than .*1\.ckpt"),
    ],
    ids=["one-less", "another", "one-of-two", "one-more", "other-run"],
)
def test_calibrator_of_other_members_is_refused(of, given, message, checkpoints, tmp_path):
    path = fitted(tmp_path, [checkpoints[n] for n in of])
    with pytest.raises(ValueError, match=message):
        find_calibration(path, known([checkpoints[n] for n in given]), CARD)


def test_calibrator_of_another_way_of_predicting_is_refused(checkpoints, tmp_path):
    path = fitted(tmp_path, checkpoints)
    other = known(checkpoints)
    other[checkpoints[1]] = OmegaConf.merge(other[checkpoints[1]], {"flip_axes": [0]})
    with pytest.raises(ValueError, match=r"fitted for images predicted by .*flip_axes"):
        find_calibration(path, other, CARD)


def test_calibrator_of_an_ensemble_is_a_file(checkpoints):
    with pytest.raises(ValueError, match=r"calibration: expected a file, calibration=DIR/temperature\.safetensors, but got 'temperature'"):
        Ensemble.from_runs(checkpoints, calibration="temperature")


# Which cases are in a split of all members.


@pytest.fixture
def card(tmp_path) -> DataCard:
    for n in range(8):
        image, label = blob((8, 8, 8), seed=n)
        save(tmp_path / "images" / f"c{n}.nii.gz", image)
        save(tmp_path / "labels" / f"c{n}.nii.gz", label)
    return replace(CARD, root=str(tmp_path))


def divided(card: DataCard, **splits: str) -> DataCard:
    return replace(card, splits={name: [f"c{n}" for n in numbers] for name, numbers in splits.items()})


def test_split_of_an_ensemble_is_that_of_all_members(card):
    first, other = divided(card, train="01", val="23", test="4567"), divided(card, train="02", val="13", test="567")
    for split, expected in (("train", ["c0"]), ("val", ["c3"]), ("test", ["c5", "c6", "c7"]), ("all", [f"c{n}" for n in range(8)])):
        name, cases = cases_of_split(first, split, [other])
        assert (name, [case.id for case in cases]) == (split, expected)
    assert cases_of_split(first, None, [other])[0] == "test"
    assert cases_of_split(first, None)[1] == cases_of_split(first, None, [first])[1]


def test_folds_have_no_test_case_in_common(card):
    folds = [replace(card, num_folds=4, fold=fold) for fold in range(4)]
    with pytest.raises(ValueError, match=r"split: no test case of blobs in .* is one of all 4 members .*data=CARD data\.root=DIR"):
        cases_of_split(folds[0], None, folds[1:])


def test_members_of_other_data_are_told(card):
    members = [Predictor(Told([0.0, 0.0, 0.0]), one, WholeImage(3)) for one in (card, replace(card, root="/elsewhere"))]
    check_one_data_set(members[:1], ["a"])
    with pytest.raises(ValueError, match=r"b: was trained on /elsewhere, but a on .*root=DIR if they are copies"):
        check_one_data_set(members, ["a", "b"])
