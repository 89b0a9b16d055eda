"""Deep supervision: weights, downsampled labels, stacks, side inputs."""

import pytest
import torch

from densecal.losses import CompoundLoss, CrossEntropyLoss, DeepSupervisionLoss, SVLSLoss
from densecal.losses.deep_supervision import downsample_nearest
from densecal.targets import OneHotTarget
from densecal.terms import Term


def outputs(*sides, channels=3, dims=2):
    torch.manual_seed(0)
    return [torch.randn(2, channels, *[s] * dims, requires_grad=True) for s in sides]


def test_nearest_by_hand():
    label = torch.arange(16).reshape(4, 4)
    assert downsample_nearest(label, (2, 2)).tolist() == [[5, 7], [13, 15]]
    assert torch.equal(downsample_nearest(label, (4, 4)), label)


@pytest.mark.parametrize(("weights", "expected"), [(None, (4 / 7, 2 / 7, 1 / 7)), ((1.0, 0.5, 0.0), (1.0, 0.5, 0.0))], ids=["default", "given"])
def test_levels_are_weighted(weights, expected):
    levels = outputs(8, 4, 2)
    label_map = torch.randint(0, 3, (2, 8, 8))
    loss = SVLSLoss()
    by_hand = sum(w * loss(z, downsample_nearest(label_map, z.shape[2:])) for w, z in zip(expected, levels, strict=True))
    value = DeepSupervisionLoss(loss, weights=weights)(levels, label_map)
    torch.testing.assert_close(value, by_hand)


def test_plain_tensor_passes_through():
    (logits,) = outputs(8)
    label_map = torch.randint(0, 3, (2, 8, 8))
    assert torch.equal(DeepSupervisionLoss(CrossEntropyLoss())(logits, label_map), CrossEntropyLoss()(logits, label_map))


@pytest.mark.parametrize("form", ["map", "channel", "soft"])
@pytest.mark.parametrize("dims", [2, 3])
def test_stack_of_outputs_equals_the_list(form, dims):
    levels = outputs(6, 6, dims=dims)
    label_map = torch.randint(0, 3, (2, *[6] * dims))
    target = {"map": label_map, "channel": label_map.unsqueeze(1), "soft": torch.rand(2, 3, *[6] * dims).softmax(1)}[form]
    loss = DeepSupervisionLoss(CrossEntropyLoss())
    torch.testing.assert_close(loss(torch.stack(levels, 1), target), loss(levels, target))


def test_a_volume_is_not_a_stack():
    logits, label_map = torch.randn(2, 3, 4, 6, 6), torch.randint(0, 3, (2, 4, 6, 6))
    assert torch.equal(DeepSupervisionLoss(CrossEntropyLoss())(logits, label_map), CrossEntropyLoss()(logits, label_map))


def test_doubt_between_volume_and_stack_is_an_error_that_spatial_dims_settles():
    stack, label_map = torch.randn(2, 3, 1, 6, 6), torch.randint(0, 2, (2, 1, 6, 6))
    loss = CrossEntropyLoss(activation="sigmoid")
    with pytest.raises(ValueError, match="Set `spatial_dims`, or pass a list"):
        DeepSupervisionLoss(loss)(stack, label_map)
    as_stack = DeepSupervisionLoss(loss, spatial_dims=2)(stack, label_map)
    torch.testing.assert_close(as_stack, DeepSupervisionLoss(loss)(list(stack.unbind(1)), label_map))


def test_ignored_pixels_stay_ignored_at_each_level():
    levels = outputs(8, 4)
    label_map = torch.randint(0, 3, (2, 8, 8))
    label_map[0] = 255
    DeepSupervisionLoss(SVLSLoss(ignore_index=255))(levels, label_map).backward()
    for level in levels:
        assert not level.grad[0].any()
        assert level.grad[1].any()


def test_named_parts_add_up():
    levels = outputs(8, 4)
    label_map = torch.randint(0, 3, (2, 8, 8))
    loss = DeepSupervisionLoss(CrossEntropyLoss())
    torch.testing.assert_close(loss.terms(levels, label_map)["ce"], loss(levels, label_map))


class Image(Term):
    needs = ("image", "spacing")

    def forward(self, logits, target, *, context=None):
        assert context["image"].shape[2:] == logits.shape[2:]
        return context["spacing"].sum() + 0 * logits.mean()


def test_image_and_spacing_follow_the_resolution():
    loss = DeepSupervisionLoss(CompoundLoss(OneHotTarget(), {"image": {"weight": 1.0, "term": Image()}}), weights=(0.0, 1.0))
    assert loss.needs == ("image", "spacing")
    context = {"image": torch.rand(2, 1, 8, 8), "spacing": torch.tensor([1.0, 3.0])}
    assert loss(outputs(8, 4), torch.zeros(2, 8, 8).long(), context=context).item() == 8.0


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="Expected `weights` to be 0 or greater"):
        DeepSupervisionLoss(CrossEntropyLoss(), weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="Expected 2 outputs, one per weight, but got 3"):
        DeepSupervisionLoss(CrossEntropyLoss(), weights=[1.0, 1.0])(outputs(8, 4, 2), torch.zeros(2, 8, 8).long())


def test_works_around_a_loss_of_pytorch():
    levels = outputs(8, 4)
    label_map = torch.randint(0, 3, (2, 8, 8))
    torch.testing.assert_close(
        DeepSupervisionLoss(torch.nn.CrossEntropyLoss())(levels, label_map), DeepSupervisionLoss(CrossEntropyLoss())(levels, label_map)
    )
