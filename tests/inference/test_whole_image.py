"""Images in one piece: padded to what the network takes, cropped back, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densecal.inference import SlidingWindow, WholeImage
from densecal.models import unet

CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Strided(nn.Module):
    """As many strides of 2 as come to ``stride``, and back: it takes multiples of ``stride`` only."""

    def __init__(self, spatial_dims: int, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = CONV[spatial_dims]
        down = [conv(1 if n == 0 else 4, 4, 3, stride=2, padding=1) for n in range(int(math.log2(stride)))]
        self.layers = nn.Sequential(*down, nn.Upsample(scale_factor=stride), conv(4, 3, 3, padding=1))
        self.skip, self.stride = conv(1, 3, 1), stride
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape[2:]))
        return 3 * self.layers(image) + self.skip(image)


def between_zeros(image: Tensor, stride: int) -> tuple[Tensor, tuple[slice, ...]]:
    """The image in the middle of the next multiples; of an odd rest the larger half comes first."""
    sides = [math.ceil(n / stride) * stride for n in image.shape[2:]]
    first = [math.ceil((side - n) / 2) for side, n in zip(sides, image.shape[2:], strict=True)]
    inside = (slice(None), slice(None), *(slice(a, a + n) for a, n in zip(first, image.shape[2:], strict=True)))
    padded = torch.zeros(*image.shape[:2], *sides)
    padded[inside] = image
    return padded, inside


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "stride", "seen"),
    [
        ((2, 1, 33, 50), 32, (64, 64)),
        ((1, 1, 32, 96), 32, (32, 96)),
        ((1, 1, 1, 31), 32, (32, 32)),
        ((1, 1, 9, 16, 13), 8, (16, 16, 16)),
    ],
    ids=["2d", "2d-fits", "2d-small", "3d"],
)
def test_image_goes_through_a_strided_network_in_one_piece(shape, stride, seen):
    image = noise(*shape)
    model = Strided(image.ndim - 2, stride).eval()
    probs, logits = WholeImage(image.ndim - 2, multiple=stride).with_logits(model, image)
    assert model.seen == [seen]
    padded, inside = between_zeros(image, stride)
    torch.testing.assert_close(logits, model(padded)[inside], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(probs, model(padded)[inside].softmax(1), atol=1e-6, rtol=0)


def test_strided_network_of_these_tests_refuses_other_sides():
    with pytest.raises(RuntimeError, match="size of tensor"):
        Strided(2, 32)(noise(1, 1, 33, 50))


@torch.no_grad()
def test_each_scale_is_padded_by_itself():
    model = Strided(2, 8).eval()
    WholeImage(2, multiple=8, scales=[0.5, 1.0, 1.5], flip_axes=[1])(model, noise(1, 1, 30, 21))
    assert model.seen == [(16, 16)] * 2 + [(32, 24)] * 2 + [(48, 32)] * 2  # of sides 15 x 10, 30 x 21 and 45 x 32


@torch.no_grad()
def test_multiple_may_differ_per_axis():
    """A network that does not halve the few slices of a volume."""
    seen: list[tuple[int, ...]] = []
    WholeImage(3, multiple=[8, 8, 1])(lambda image: seen.append(tuple(image.shape[2:])) or image, noise(1, 2, 9, 8, 5))
    assert seen == [(16, 8, 5)]


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 2, 7, 32])
@pytest.mark.parametrize("shape", [(1, 1, 19, 40), (2, 1, 5, 9, 3)], ids=["2d", "3d"])
def test_pointwise_network_gives_its_own_softmax(shape, multiple):
    """Padding says nothing about the pixels beside it."""
    image, dims = noise(*shape), len(shape) - 2
    model = CONV[dims](1, 3, 1)
    torch.testing.assert_close(WholeImage(dims, multiple=multiple)(model, image), model(image).softmax(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_image_within_one_patch_is_seen_as_by_a_sliding_window():
    """Which pads as training does; see its own test."""
    model = Strided(2, 16).eval()
    image = noise(1, 1, 11, 16)
    torch.testing.assert_close(WholeImage(2, multiple=16)(model, image), SlidingWindow((16, 16))(model, image), atol=1e-6, rtol=0)


@torch.no_grad()
def test_whole_volume_goes_through_a_network_of_monai():
    torch.manual_seed(0)
    model, image = unet(1, 2, channels=(4, 8, 8)).eval(), noise(1, 1, 9, 13, 6)
    padded, inside = between_zeros(image, 4)
    torch.testing.assert_close(WholeImage(3, multiple=4)(model, image), model(padded)[inside].softmax(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_first_of_several_outputs_is_used():
    conv, image = nn.Conv2d(1, 3, 1), noise(1, 1, 9, 5)
    heads = lambda image: [conv(image), conv(image)[..., ::2, ::2]]  # noqa: E731
    torch.testing.assert_close(WholeImage(2, multiple=8)(heads, image), conv(image).softmax(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"multiple": 0}, r"`multiple` to be greater than 0, but got 0"),
        ({"multiple": [8, -8]}, r"`multiple` to be greater than 0, but got -8"),
        ({"multiple": [8, 8, 8]}, r"`multiple` to be a number or 2 numbers, one per spatial axis, but got \(8, 8, 8\)"),
        ({"spatial_dims": 4}, r"`spatial_dims` to be one of \(1, 2, 3\), but got 4"),
    ],
    ids=["zero", "negative", "too-many", "dims"],
)
def test_whole_image_refuses_what_it_cannot_do(arguments, match):
    with pytest.raises(ValueError, match=match):
        WholeImage(**({"spatial_dims": 2} | arguments))
