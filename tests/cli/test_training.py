"""What is looked at before a run begins, on networks for images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from densecal.cli.configuration import CommandError
from densecal.cli.training import _build_loss, _check_smallest_batch, _probe
from densecal.inference import SlidingWindow
from densecal.labels import LabelSchema
from densecal.losses import CrossEntropyLoss
from densecal.models import smp
from densecal.targets import Target
from densecal.tasks import SegmentationTask

PATCH = (32, 32)


class Pooled(nn.Sequential):
    """As the pooling of DeepLab: normalised where one pixel is left of the image."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Upsample(size=PATCH))


def card(patch=PATCH, **settings) -> SimpleNamespace:
    given = {"batch_size": 4, "samples_per_case": 1, "soft_labels": False} | settings
    return SimpleNamespace(image_channels=1, patch_size=patch, spatial_dims=len(patch), **given)


def task(model: nn.Module) -> SegmentationTask:
    return SegmentationTask(model, CrossEntropyLoss(), LabelSchema(("background", "left", "right")), SlidingWindow(PATCH))


def check(model: nn.Module, cases: int, *, world_size: int = 1, limit: float = 1.0, sync: bool = False, **settings) -> None:
    config = OmegaConf.create({"trainer": {"sync_batchnorm": sync}})
    _check_smallest_batch(config, card(**settings), task(model), SimpleNamespace(world_size=world_size, limit_train_batches=limit), cases)


@pytest.mark.parametrize(
    ("cases", "options", "size"),
    [
        (9, {}, 3),  # 4 + 4 + 1; by threes nothing is left over
        (5, {"batch_size": 2}, 3),  # 2 + 2 + 1, and 3 + 2
        (3, {"samples_per_case": 3}, 3),
        (18, {"world_size": 2}, 3),  # 9 each
        (6, {"batch_size": 1}, 2),
        (6, {"batch_size": 1, "limit": 0.5}, 2),
    ],
)
def test_a_batch_of_one_is_refused_where_it_cannot_be_trained_on(cases, options, size):
    with pytest.raises(
        CommandError, match=rf"^data\.batch_size: .* batch of one.*Expected more than 1 value per channel.*data\.batch_size={size}\.$"
    ) as refused:
        check(Pooled(), cases, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cases", "options"),
    [(8, {}), (10, {}), (9, {"limit": 2}), (18, {"world_size": 2, "sync": True})],
    ids=["none-left", "two-left", "last-batch-not-reached", "normalised-over-processes"],
)
def test_other_batches_are_not(cases, options):
    check(Pooled(), cases, **options)


def test_a_batch_of_one_is_no_matter_without_pooled_normalisation():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    check(model, 9)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_deeplab_is_such_a_network():
    with pytest.raises(CommandError, match="batch of one"):
        check(smp(1, 3, architecture="deeplabv3", encoder="mobilenet_v2"), 9)


def test_a_patch_that_does_not_fit_the_strides_is_refused():
    with pytest.raises(CommandError, match=r"patches of 40 x 48 pixels \(Wrong input shape .*divisible by 32.*32 for swin_unetr and most encoders"):
        _probe(task(smp(1, 3, architecture="fpn", encoder="mobilenet_v2")), SimpleNamespace(card=card((40, 48))))


CLASSES = LabelSchema(("background", "left", "right"), ignore_index=255)


def perturbed(
    loss: str, *, val: int = 1, perturbation: str = "AdaptivePerturbation", schema: LabelSchema = CLASSES, said: str | None = None, **trainer
) -> nn.Module:
    made = {"_target_": f"densecal.perturbation.{perturbation}", "_partial_": True} | ({"activation": said} if said else {})
    config = OmegaConf.create({"loss": {"_target_": loss}, "perturbation": made, "trainer": trainer})
    splits = {"train": [SimpleNamespace(id="a")], "val": [SimpleNamespace(id="b")] * val}
    return _build_loss(config, SimpleNamespace(splits=splits, schema=schema))


def test_a_loss_without_a_target_is_not_perturbed():
    with pytest.raises(CommandError, match=r"^perturbation: CrossEntropyLoss is not composed of a target and terms"):
        perturbed("torch.nn.CrossEntropyLoss")


@pytest.mark.parametrize("options", [{"val": 0}, {"limit_val_batches": 0}], ids=["no-cases", "switched-off"])
def test_levels_that_follow_accuracy_need_validation(options):
    with pytest.raises(
        CommandError,
        match=r"^data\.val_fraction: the levels of perturbation follow the accuracy on validation cases, of which there are none\. Set it above 0",
    ):
        perturbed("densecal.losses.CrossEntropyLoss", **options)
    assert not perturbed("densecal.losses.CrossEntropyLoss", perturbation="StochasticPerturbation", **options).needs_validation


def test_labels_are_perturbed_once():
    with pytest.raises(
        CommandError, match=r"^perturbation: Expected labels that are perturbed once, but AdaptivePerturbation within StochasticPerturbation"
    ):
        perturbed("densecal.losses.ASLPLoss", perturbation="StochasticPerturbation")


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "SVLSLoss", "DiceCELoss"])
def test_labels_of_regions_are_perturbed_as_regions(loss):
    """A single region has one other outcome, which gets what the level takes away: 0.1 * 2 of a label."""
    region = LabelSchema(("car",), 255, None, activation="sigmoid", regions=((1,),))
    made = perturbed(f"densecal.losses.{loss}", schema=region)
    assert {module.activation for module in made.modules() if isinstance(module, Target)} == {"sigmoid"}
    assert (made.target.ignore_index, made.target.case_ids) == (255, ("a",))
    made.target.alpha.fill_(0.1)
    label = torch.ones(1, 1, 4, 4, dtype=torch.int32)
    label[..., 0] = 255
    made(torch.zeros(1, 1, 4, 4, requires_grad=True), label, context={"case_id": ["a"]}).backward()
    target = made.target(label, 1, spatial_dims=2, context={"case_id": ["a"]})
    torch.testing.assert_close(target.probs[..., 1:], torch.full((1, 1, 4, 3), 0.8))
    assert not target.valid[..., 0].any()


def test_perturbation_says_nothing_else_than_the_data_set():
    with pytest.raises(
        CommandError, match=r"^perturbation\.activation: expected softmax, which is what the data set says, but got sigmoid\. Leave it out"
    ):
        perturbed("densecal.losses.CrossEntropyLoss", said="sigmoid")
