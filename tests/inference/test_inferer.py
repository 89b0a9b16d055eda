"""The mean over flipped and scaled views, by window and in one piece, against a loop over the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from densecal.inference import Inferer, SlidingWindow, WholeImage, full_resolution

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Lopsided(nn.Module):
    """Logits that a flip changes, or another size, or another window."""

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = CONV[spatial_dims](in_channels, num_classes, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        spatial = tuple(range(2, image.ndim))
        return 4 * self.conv(image) * (1 + image.square().mean(dim=spatial, keepdim=True).sum(1, keepdim=True))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resize(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear interpolation along one axis after the other: pixel ``i`` of ``m`` has its centre at ``(i + 1/2) n / m - 1/2`` among ``n``."""
    for axis, m in enumerate(size, start=2):
        n = values.shape[axis]
        pixels = []
        for i in range(m):
            x = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
            low, high = int(np.floor(x)), min(int(np.floor(x)) + 1, n - 1)
            pixels.append((1 - (x - low)) * values.take(low, axis) + (x - low) * values.take(high, axis))
        values = np.stack(pixels, axis)
    return values


def mean_of_views(predict: Callable[[Tensor], Tensor], image: Tensor, flip_axes: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Each view made, predicted and brought back by itself."""
    spatial, results = image.shape[2:], []
    for scale in scales:
        for flipped in itertools.product([False, True], repeat=len(flip_axes)):
            axes = [axis + 2 for axis, yes in zip(flip_axes, flipped, strict=True) if yes]
            view = resize(image.double().numpy(), [max(1, round(n * scale)) for n in spatial])
            result = predict(torch.from_numpy(np.flip(view, axes).copy()).float())
            results.append(resize(np.flip(result.double().numpy(), axes), spatial))
    return torch.from_numpy(sum(results) / len(results))


def window(kind: str, spatial_dims: int, **views) -> Inferer:
    if kind == "sliding":
        return SlidingWindow((8, 6, 8)[:spatial_dims], **views)
    return WholeImage(spatial_dims, multiple=4, **views)


VIEWS = {
    "flip": {"flip_axes": [1]},
    "flips": {"flip_axes": [0, 1]},
    "smaller": {"scales": [0.5]},
    "scales": {"scales": [0.75, 1, 1.6]},
    "both": {"flip_axes": [1, 0], "scales": [0.6, 1.0, 1.25]},
}
IMAGES = {"2d": (2, 2, 13, 9), "2d-one": (1, 2, 5, 12), "3d": (1, 2, 7, 9, 5)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_result_is_the_mean_over_the_views(views, shape, kind):
    dims = len(shape) - 2
    model, image = Lopsided(2, 3, dims).eval(), noise(*shape)
    plain, augmented = window(kind, dims), window(kind, dims, **views)
    probs, logits = augmented.with_logits(model, image)
    views = {"flip_axes": [], "scales": [1.0]} | views
    torch.testing.assert_close(probs.double(), mean_of_views(lambda view: plain(model, view), image, **views), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.double(), mean_of_views(lambda view: plain.with_logits(model, view)[1], image, **views), atol=1e-4, rtol=1e-5)
    assert torch.equal(augmented(model, image), probs)
    assert (probs - plain(model, image)).abs().max() > 0.01  # the views disagree


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_averaged_logits_are_not_what_comes_back(kind):
    """Two views, one pixel, by hand: the network says odds of e**4 and, flipped, of e**-1."""
    image = torch.tensor([[[[4.0, -1.0]]]])

    def two_classes(image: Tensor) -> Tensor:
        """What the first column holds, everywhere."""
        return torch.cat([image[..., :1].expand_as(image), torch.zeros_like(image)], dim=1)

    inferer = SlidingWindow((1, 2), flip_axes=[1]) if kind == "sliding" else WholeImage(2, multiple=1, flip_axes=[1])
    probs, logits = inferer.with_logits(two_classes, image)
    expected = (1 / (1 + np.exp(-4)) + 1 / (1 + np.exp(1))) / 2
    assert probs[0, 0].flatten().tolist() == pytest.approx([expected, expected], abs=1e-6)
    assert logits[0, 0].flatten().tolist() == pytest.approx([1.5, 1.5])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
@pytest.mark.parametrize("shape", [(1, 1, 12, 15), (1, 1, 8, 12, 8)], ids=["2d", "3d"])
def test_flips_change_nothing_for_a_symmetric_network(shape, kind):
    """Sides that the windows tile alike from both ends."""
    dims = len(shape) - 2
    conv, axes = CONV[dims](1, 3, 3, padding=1), list(range(dims))
    for axis in axes:
        conv.weight.copy_((conv.weight + conv.weight.flip(axis + 2)) / 2)
    image = noise(*shape)
    torch.testing.assert_close(window(kind, dims, flip_axes=axes)(conv, image), window(kind, dims)(conv, image), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_scales_change_nothing_where_there_is_nothing_to_see(kind):
    model = nn.Conv2d(2, 3, 1)
    image = torch.tensor([0.3, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 11, 7)
    probs = window(kind, 2, scales=[0.01, 0.5, 1.0, 1.75], flip_axes=[0, 1])(model, image)
    torch.testing.assert_close(probs, model(image).softmax(1), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
@pytest.mark.parametrize("shape", [(2, 1, 13, 9), (1, 1, 1, 1), (1, 1, 9, 5, 11)], ids=str)
def test_result_is_a_distribution_on_the_grid_of_the_image(shape, kind):
    dims = len(shape) - 2
    probs = window(kind, dims, flip_axes=[0, 1], scales=[0.5, 1.0, 1.5])(Lopsided(1, 5, dims).eval(), 3 * noise(*shape))
    assert probs.shape == (shape[0], 5, *shape[2:])
    assert 0 <= probs.min() <= probs.max() <= 1
    torch.testing.assert_close(probs.sum(1), torch.ones(shape[0], *shape[2:]), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_images_of_a_batch_do_not_mix(kind):
    model, image = Lopsided(1, 3, 2).eval(), noise(3, 1, 13, 9)
    inferer = window(kind, 2, flip_axes=[1], scales=[0.75, 1.0])
    torch.testing.assert_close(inferer(model, image), torch.cat([inferer(model, one.unsqueeze(0)) for one in image]), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_result_is_single_precision_in_a_network_of_half(autocast, dtype, kind):
    model, image = nn.Conv2d(1, 3, 3, padding=1), noise(1, 1, 13, 10)
    inferer = window(kind, 2, flip_axes=[1], scales=[0.5, 1.0])
    expected = inferer(model, image)
    with torch.autocast("cpu", dtype, enabled=autocast):
        probs = inferer(model, image) if autocast else inferer(model.to(dtype), image.to(dtype))
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, expected, atol={torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype], rtol=0)
    assert not torch.equal(probs, expected)  # the network did compute in half precision
    torch.testing.assert_close(probs.sum(1), torch.ones(1, 13, 10), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_image_is_left_as_it_was(kind):
    """A network that returns its input hands out the image itself."""
    image = noise(1, 3, 8, 6)
    before = image.clone()
    logits = window(kind, 2, flip_axes=[0, 1]).with_logits(nn.Identity(), image)[1]
    assert torch.equal(image, before)
    torch.testing.assert_close(logits, before, atol=1e-6, rtol=0)


@torch.no_grad()
def test_windows_keep_their_size_at_every_scale():
    model = Lopsided(1, 2, 2).eval()
    SlidingWindow((8, 8), overlap=0, scales=[0.5, 1.0, 2.0])(model, noise(1, 1, 16, 16))
    assert {shape[2:] for shape in model.seen} == {(8, 8)}
    assert sum(shape[0] for shape in model.seen) == 1 + 4 + 16


def test_own_way_of_inference_has_the_views():
    """A subclass says how one view goes through the network, nothing more."""

    class LeftHalf(Inferer):
        """Knows the left half of an image, and is undecided on the other."""

        def predict_view(self, predict, image):
            return [torch.cat([known, torch.zeros_like(known)], dim=-1) for known in predict(image[..., : image.shape[-1] // 2])]

    model = lambda image: torch.cat([image, -image], dim=1)  # noqa: E731
    image = noise(1, 1, 4, 6)
    torch.testing.assert_close(LeftHalf(2, flip_axes=[1])(model, image), model(image).softmax(1))


@pytest.mark.parametrize(
    ("views", "match"),
    [
        ({"flip_axes": [2]}, r"^Expected `flip_axes` to be different ones of the spatial axes \(0, 1\), but got \(2,\)\.$"),
        ({"flip_axes": [-1]}, r"^Expected `flip_axes` .*\(0, 1\), but got \(-1,\)\.$"),
        ({"flip_axes": [1, 1]}, r"^Expected `flip_axes` to be different .* got \(1, 1\)\.$"),
        ({"scales": []}, r"^Expected `scales` to be one or more numbers greater than 0, but got \(\)\."),
        ({"scales": [1.0, 0]}, r"^Expected `scales` .*greater than 0, but got \(1\.0, 0\)\."),
        ({"scales": [-0.5]}, r"^Expected `scales` .*\(-0\.5,\)"),
        ({"scales": [float("nan")]}, r"^Expected `scales` .*\(nan,\)"),
        ({"scales": [float("inf")]}, r"^Expected `scales` .*\(inf,\)"),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_views_that_cannot_be_are_refused(kind, views, match):
    with pytest.raises(ValueError, match=match) as error:
        window(kind, 2, **views)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sliding", "whole"])
def test_image_of_other_dimensions_is_refused(kind):
    with pytest.raises(ValueError, match=r"with 3 spatial dims, but got \(1, 1, 8, 8\)"):
        window(kind, 3)(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 8, 8))


def test_full_resolution_takes_the_first_output():
    fine, coarse = noise(2, 3, 8, 8, 8), noise(2, 3, 4, 4, 4)
    assert full_resolution(fine, 3) is fine
    assert full_resolution([fine, coarse], 3) is fine
    assert full_resolution((fine, coarse), 3) is fine
    assert torch.equal(full_resolution(torch.stack([fine, -fine], dim=1), 3), fine)
    flat = noise(2, 3, 8, 8)
    assert full_resolution(flat, 2) is flat
    assert torch.equal(full_resolution(torch.stack([flat, -flat], dim=1), 2), flat)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sliding", "whole"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
def test_probabilities_of_regions_are_averaged(shape, kind):
    """Each channel by itself: one, or several that do not sum to 1."""
    dims, views = len(shape) - 2, VIEWS["both"]
    image = noise(*shape)
    plain, augmented = window(kind, dims), window(kind, dims, **views)
    for regions in (1, 3):
        model = Lopsided(2, regions, dims).eval()
        probs, logits = augmented.with_logits(model, image, activation="sigmoid")
        expected = mean_of_views(lambda view, model=model: plain(model, view, activation="sigmoid"), image, **views)
        torch.testing.assert_close(probs.double(), expected, atol=1e-5, rtol=0)
        assert probs.shape == (shape[0], regions, *shape[2:])
        assert torch.equal(augmented(model, image, activation="sigmoid"), probs)
        assert (probs - logits.sigmoid()).abs().max() > 0.01  # not the sigmoid of the mean
    two = Lopsided(2, 1, dims).eval()
    as_classes = plain(lambda piece: torch.cat([-two(piece) / 2, two(piece) / 2], dim=1), image)
    torch.testing.assert_close(plain(two, image, activation="sigmoid"), as_classes[:, 1:], atol=1e-5, rtol=0)


def test_activation_is_checked():
    with pytest.raises(ValueError, match="Expected `activation` to be one of"):
        WholeImage(2, multiple=1)(nn.Conv2d(1, 1, 1), noise(1, 1, 4, 4), activation="tanh")
