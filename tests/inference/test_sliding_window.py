"""Sliding windows against a loop over the definition, and what a single window must come to."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.data import MetaTensor
from torch import Tensor, nn
from volumes import blob

from densecal.data.card import DataCard
from densecal.data.volumes.transforms import ForegroundVoxelsd, train_transforms
from densecal.inference import SlidingWindow
from densecal.models import dynunet, unet


class Opinionated(nn.Module):
    """Logits that depend on the pixel, its neighbours and the whole window, so that overlapping windows disagree."""

    def __init__(self, in_channels: int, num_classes: int, spatial_dims: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        self.conv = conv(in_channels, num_classes, 3, padding=1)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        spatial = tuple(range(2, image.ndim))
        return (
            3 * self.conv(image) * (1 + image.mean(dim=spatial, keepdim=True).sum(1, keepdim=True))
            + torch.sin(40 * image.sum(spatial, keepdim=True))[:, :1]
        )


def starts(size: int, patch: int, overlap: float) -> list[int]:
    """First pixels of the windows along an axis: each covers a share ``overlap`` of the one before, the last ends with the image."""
    step = round(patch * (1 - overlap))
    return [min(n * step, size - patch) for n in range(1 + max(0, -(-(size - patch) // step)))]


def blended(model: nn.Module, image: Tensor, patch: tuple[int, ...], overlap: float) -> Tensor:
    """Mean over windows of the windows' probabilities, pixel by pixel, for images no smaller than a window."""
    results = []
    for volume in image:
        windows = []
        for corner in itertools.product(*(starts(n, p, overlap) for n, p in zip(volume.shape[1:], patch, strict=True))):
            place = tuple(slice(s, s + p) for s, p in zip(corner, patch, strict=True))
            windows.append((corner, model(volume[(slice(None), *place)].unsqueeze(0))[0].double().softmax(0)))
        result = torch.full((windows[0][1].shape[0], *volume.shape[1:]), torch.nan, dtype=torch.float64)
        for voxel in np.ndindex(*volume.shape[1:]):
            opinions = []
            for corner, probs in windows:
                inside = tuple(v - s for v, s in zip(voxel, corner, strict=True))
                if all(0 <= v < p for v, p in zip(inside, patch, strict=True)):
                    opinions.append(probs[(slice(None), *inside)])
            result[(slice(None), *voxel)] = sum(opinions) / len(opinions)
        results.append(result)
    return torch.stack(results)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "one-window": ((8, 8, 8), (8, 8, 8), 0.5),
    "odd": ((9, 11, 13), (8, 8, 8), 0.5),
    "anisotropic": ((7, 13, 10), (4, 8, 6), 0.5),
    "prime": ((11, 7, 5), (4, 4, 4), 0.25),
    "no-overlap": ((8, 12, 9), (4, 4, 4), 0.0),
    "much-overlap": ((9, 8, 8), (8, 8, 8), 0.75),
}


@torch.no_grad()
@pytest.mark.parametrize(("shape", "patch", "overlap"), CASES.values(), ids=CASES)
def test_window_equals_the_mean_of_the_windows_probabilities(shape, patch, overlap):
    model = Opinionated(2, 3).eval()
    image = noise(1, 2, *shape)
    window = SlidingWindow(patch, overlap=overlap, blending="constant")
    probs = window(model, image)
    expected = blended(model, image, patch, overlap)
    torch.testing.assert_close(probs.double(), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_windows_of_the_reference_disagree():
    """Else the test above would pass for the softmax of averaged logits, or for one window alone."""
    model = Opinionated(1, 3).eval()
    image = noise(1, 1, 12, 8, 8)
    probs = blended(model, image, (8, 8, 8), 0.5)
    first = model(image[..., :8, :, :]).double().softmax(1)
    logits = (model(image[..., :8, :, :])[..., 4:8, :, :] + model(image[..., 4:12, :, :])[..., 0:4, :, :]) / 2
    assert (probs[..., 4:8, :, :] - first[..., 4:8, :, :]).abs().max() > 0.1
    assert (probs[..., 4:8, :, :] - logits.double().softmax(1)).abs().max() > 0.1


@torch.no_grad()
def test_window_of_two_dimensions():
    model = Opinionated(1, 4, spatial_dims=2).eval()
    image = noise(2, 1, 13, 9)
    probs = SlidingWindow((8, 8), blending="constant")(model, image)
    torch.testing.assert_close(probs.double(), blended(model, image, (8, 8), 0.5), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("blending", ["constant", "gaussian"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_result_does_not_depend_on_how_many_windows_go_together(batch_size, blending):
    model = Opinionated(1, 3).eval()
    image = noise(2, 1, 13, 9, 8)
    one = SlidingWindow((8, 8, 8), blending=blending, batch_size=1)(model, image)
    model.shapes.clear()
    many = SlidingWindow((8, 8, 8), blending=blending, batch_size=batch_size)(model, image)
    torch.testing.assert_close(many, one, atol=1e-6, rtol=0)
    assert max(shape[0] for shape in model.shapes) <= batch_size
    assert {shape[2:] for shape in model.shapes} == {(8, 8, 8)}
    assert sum(shape[0] for shape in model.shapes) == 2 * 3 * 2 * 1  # images x windows along each axis


@torch.no_grad()
def test_volumes_of_a_batch_do_not_mix():
    model = Opinionated(1, 3).eval()
    image = noise(3, 1, 13, 8, 9)
    window = SlidingWindow((8, 8, 8))
    torch.testing.assert_close(window(model, image), torch.cat([window(model, volume.unsqueeze(0)) for volume in image]), atol=1e-6, rtol=0)


class Constant(nn.Module):
    """For each window, everywhere the first class with the probability that its first voxel holds."""

    def forward(self, image: Tensor) -> Tensor:
        p = image[:, :, :1].clamp(0.01, 0.99).expand_as(image)
        return torch.cat([p.log(), (1 - p).log()], dim=1)


@torch.no_grad()
def test_gaussian_blending_is_a_gaussian_about_the_middle():
    """Of two windows, their weights' ratio at x is w(x) / w(x - s) = exp(((x - s - m)**2 - (x - m)**2) / 2 sigma**2): its logarithm falls along a line through
    0 at the middle of the overlap."""
    patch, step = 16, 8
    image = torch.zeros(1, 1, patch + step, dtype=torch.float64)
    image[..., 0], image[..., step] = 0.9, 0.2  # the first voxels of the windows
    share = (SlidingWindow((patch,), overlap=0.5, blending="gaussian")(Constant(), image)[0, 0].double() - 0.2) / 0.7  # weight of the first window
    torch.testing.assert_close(share[:step], torch.ones(step, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(share[patch:], torch.zeros(step, dtype=torch.float64), atol=1e-6, rtol=0)
    overlap = share[step:patch]
    torch.testing.assert_close(overlap + overlap.flip(0), torch.ones(step, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (overlap.diff() < 0).all()
    odds = (overlap / (1 - overlap)).log()[1:-1]  # the weight of the outermost voxels has a floor
    slope = (odds[-1] - odds[0]) / (len(odds) - 1)
    assert slope < -0.1
    torch.testing.assert_close(odds, slope * (torch.arange(len(odds)).double() - (len(odds) - 1) / 2), atol=2e-2, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("blending", ["constant", "gaussian"])
@pytest.mark.parametrize("shape", [(9, 13, 10), (3, 5, 2), (5, 20, 8), (1, 1, 1)], ids=str)
def test_result_is_a_distribution_on_the_grid_of_the_volume(shape, blending):
    probs = SlidingWindow((8, 8, 8), blending=blending)(Opinionated(1, 5).eval(), 5 * noise(2, 1, *shape))
    assert probs.shape == (2, 5, *shape)
    assert probs.dtype == torch.float32
    assert 0 <= probs.min() <= probs.max() <= 1
    torch.testing.assert_close(probs.sum(1), torch.ones(2, *shape), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("blending", ["constant", "gaussian"])
def test_pointwise_network_gives_its_own_softmax(blending):
    """Where windows agree there is nothing to average, whatever the weights; padding is gone."""
    model = nn.Conv3d(1, 3, 1)
    image = noise(1, 1, 5, 19, 8)
    torch.testing.assert_close(SlidingWindow((8, 8, 8), blending=blending)(model, image), model(image).softmax(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_small_volume_is_padded_as_in_training():
    """The patch that the network is trained on is the window that it sees."""
    image, label = blob((5, 8, 6), seed=0)
    patch = [8, 8, 8]
    card = DataCard("blobs", ["background", "left", "right"], patch_size=patch, foreground_fraction=None, augment=False, normalisation="none")
    item = {"image": MetaTensor(image[None]), "label": MetaTensor(label[None].astype(np.float32) + 1)}
    trained_on = train_transforms(card)(ForegroundVoxelsd(card)(item))["image"]
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return torch.cat([image, -image], dim=1)

    SlidingWindow(patch)(Watching(), torch.as_tensor(image)[None, None])
    (window,) = seen
    assert window.shape == (1, 1, *patch)
    torch.testing.assert_close(window[0], trained_on, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_result_is_single_precision_whatever_the_network_computes_in(dtype):
    model = nn.Conv3d(1, 3, 1)
    image = noise(1, 1, 9, 8, 12).to(dtype)
    expected = model.double()(image.double()).softmax(1).float()
    probs = SlidingWindow((8, 8, 8))(model.to(dtype), image)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, expected, atol={torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype], rtol=0)
    torch.testing.assert_close(probs.sum(1), torch.ones(1, 9, 8, 12), atol=1e-6, rtol=0)


class Heads(nn.Module):
    """Two outputs, the second of them nonsense."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv3d(1, 3, 1), form

    def forward(self, image: Tensor) -> Any:
        logits = self.conv(image)
        return torch.stack([logits, -logits], dim=1) if self.form == "stacked" else [logits, -logits[..., ::2, ::2, ::2]]


@torch.no_grad()
@pytest.mark.parametrize("form", ["stacked", "list"])
def test_window_uses_the_finest_of_several_outputs(form):
    model = Heads(form)
    image = noise(1, 1, 9, 8, 11)
    torch.testing.assert_close(SlidingWindow((8, 8, 8))(model, image), model.conv(image).softmax(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_window_leaves_a_network_in_its_mode():
    model = unet(1, 2, channels=(4, 8), dropout=0.5)
    window, image = SlidingWindow((8, 8, 8)), noise(1, 1, 9, 8, 8)
    window(model.eval(), image)
    assert not any(module.training for module in model.modules())
    window(model.train(), image)
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_deep_supervision_in_training_mode_gives_one_prediction():
    """MONAI's network stacks its outputs while training."""
    torch.manual_seed(0)
    model = dynunet(1, 3, filters=(4, 8, 8), deep_supervision_heads=1)
    image = noise(1, 1, 9, 8, 8)
    window = SlidingWindow((8, 8, 8))
    training = window(model.train(), image)
    assert training.shape == (1, 3, 9, 8, 8)
    torch.testing.assert_close(training, window(model.eval(), image), atol=1e-5, rtol=0)  # instance norm: the mode changes only the outputs


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"patch_size": (8, 0, 8)}, r"patch_size.*0"),
        ({"patch_size": (8, -1, 8)}, r"patch_size.*-1"),
        ({"patch_size": ()}, r"patch_size"),
        ({"overlap": 1.0}, r"overlap.*\[0, 1\).*1\.0"),
        ({"overlap": -0.1}, r"overlap.*\[0, 1\).*-0\.1"),
        ({"blending": "gausian"}, r"blending.*'gaussian'.*'constant'.*'gausian'"),
        ({"batch_size": 0}, r"batch_size.*0"),
    ],
    ids=["zero-side", "negative-side", "no-sides", "overlap-1", "overlap-negative", "blending", "batch-size"],
)
def test_window_refuses_what_it_cannot_do(arguments, match):
    with pytest.raises(ValueError, match=match):
        SlidingWindow(**({"patch_size": (8, 8, 8)} | arguments))


@torch.no_grad()
@pytest.mark.parametrize("blending", ["constant", "gaussian"])
def test_logits_of_a_volume_are_averaged_beside_the_probabilities(blending):
    model = Opinionated(1, 3).eval()
    image = noise(1, 1, 12, 8, 5)  # two windows along one axis, padding along another
    window = SlidingWindow((8, 8, 8), blending=blending)
    probs, logits = window.with_logits(model, image)
    assert torch.equal(probs, window(model, image))
    assert logits.shape == probs.shape
    padded = nn.functional.pad(image, (2, 1))
    first, second = (model(padded[..., a : a + 8, :, :])[..., 2:-1] for a in (0, 4))
    torch.testing.assert_close(logits[..., :4, :, :], first[..., :4, :, :], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[..., 8:, :, :], second[..., 4:, :, :], atol=1e-5, rtol=0)
    if blending == "constant":
        torch.testing.assert_close(logits[..., 4:8, :, :], (first[..., 4:, :, :] + second[..., :4, :, :]) / 2, atol=1e-5, rtol=0)
    assert (logits.softmax(1) - probs).abs().max() > 0.01  # the windows disagree


class Elsewhere(torch.nn.Module):
    """Weights on another device; keeps the shapes that it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
        self.shapes = []

    def forward(self, image):
        assert image.device.type == "meta"
        self.shapes.append(tuple(image.shape))
        return torch.zeros(image.shape[0], 3, *image.shape[2:])


def test_windows_alone_go_where_the_weights_are():
    model, window = Elsewhere(), SlidingWindow((8, 8), batch_size=2, flip_axes=(0,))
    probs = window(model, torch.zeros(1, 1, 50, 60))
    assert probs.device.type == "cpu"
    assert probs.shape == (1, 3, 50, 60)
    assert set(model.shapes) == {(2, 1, 8, 8)}


_PEAK = """
import torch
from densecal.cli.measuring import process_memory
from densecal.inference import SlidingWindow
torch.set_num_threads(1)
window, model = SlidingWindow((64, 64), batch_size=2, overlap=0.25), torch.nn.Conv2d(1, 16, 1)
peak = lambda: 1024 * process_memory("VmHWM")
with torch.inference_mode():
    window(model, torch.zeros(1, 1, 128, 128))
    before = peak()
    probs = window(model, torch.zeros(1, 1, 1536, 1536))
print((peak() - before) / (4 * probs.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_image_takes_little_more_than_two_copies_of_its_probabilities():
    result = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert 1 <= float(result.stdout) < 2.5  # their sum, and the sum divided by the weights
