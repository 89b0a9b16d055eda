"""Surface distances per case and class."""

import builtins
import itertools
import math

import numpy as np
import pytest
import torch

from densecal.metrics import HausdorffDistance95, NormalizedSurfaceDistance, hausdorff_distance_95, normalized_surface_distance

pytest.importorskip("monai")

NAN = math.nan
SHAPES = {"2d": (13, 11), "3d": (7, 9, 8)}
each_shape = pytest.mark.parametrize("spatial", SHAPES.values(), ids=SHAPES.keys())


def as_probs(label_map, num_classes):
    return torch.nn.functional.one_hot(label_map, num_classes).movedim(-1, 1).float()


def blobs(spatial, seed=0, batch=2):
    """Label maps of three classes in few pieces, some of which touch the border, with ignored pixels; and a prediction that resembles them."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(batch, 3, *(size // 3 + 1 for size in spatial), generator=generator)
    field = torch.nn.functional.interpolate(field, size=spatial, mode="bilinear" if len(spatial) == 2 else "trilinear")
    label = field.argmax(1)
    prediction = (field + 0.6 * torch.randn(field.shape, generator=generator)).argmax(1)
    valid = torch.rand(batch, *spatial, generator=generator) > 0.1
    return prediction, label.masked_fill(~valid, -100), valid


def surface(mask):
    """Pixels of a mask that share a face with one outside it or with the outside of the image."""
    found = []
    for at in itertools.product(*map(range, mask.shape)):
        if mask[at]:
            others = [(*at[:a], at[a] + step, *at[a + 1 :]) for a in range(mask.ndim) for step in (-1, 1)]
            if any(not all(0 <= x < size for x, size in zip(o, mask.shape, strict=True)) or not mask[o] for o in others):
                found.append(at)
    return np.array(found, dtype=float).reshape(-1, mask.ndim)


def distances(a, b, spacing):
    """From each surface pixel of a to the nearest of b."""
    a, b = surface(a) * spacing, surface(b) * spacing
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


@each_shape
@pytest.mark.parametrize("spaced", [False, True], ids=["pixels", "mm"])
def test_surface_distances_equal_a_loop(spatial, spaced):
    prediction, label, valid = blobs(spatial)
    spacing = torch.tensor([[0.7, 1.5, 2.1], [1.0, 0.4, 2.0]])[:, : len(spatial)] if spaced else None
    probs = as_probs(prediction, 3)
    hd95 = hausdorff_distance_95(probs, label, spacing=spacing, background=None)
    nsd = normalized_surface_distance(probs, label, spacing=spacing, background=None, tolerance=(0.5, 1.0, 1.45))
    assert hd95.dtype == nsd.dtype == torch.float64
    for n, c in itertools.product(range(2), range(3)):
        a, b = (((m[n] == c) & valid[n]).numpy() for m in (prediction, label))
        steps = spacing[n].double().numpy() if spaced else 1.0
        forth, back = distances(a, b, steps), distances(b, a, steps)
        assert hd95[n, c].item() == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)), rel=1e-6)
        near = (np.concatenate([forth, back]) <= (0.5, 1.0, 1.45)[c] + 1e-6).mean()
        assert nsd[n, c].item() == pytest.approx(near, rel=1e-6)
    assert hausdorff_distance_95(probs, label, spacing=spacing)[:, 0].isnan().all()
    torch.testing.assert_close(hausdorff_distance_95(probs, label, spacing=spacing)[:, 1:], hd95[:, 1:])


@each_shape
def test_cropping_changes_nothing(spatial):
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    prediction, label, _ = blobs(spatial)
    label = label.clamp(min=0)
    a, b, spacing = as_probs(prediction, 3), as_probs(label, 3), [0.7, 1.5, 2.1][: len(spatial)]
    torch.testing.assert_close(
        hausdorff_distance_95(a, label, spacing=spacing)[:, 1:].float(),
        compute_hausdorff_distance(a, b, percentile=95, spacing=spacing),
        rtol=1e-6,  # coordinates start elsewhere
        atol=0,
    )
    torch.testing.assert_close(
        normalized_surface_distance(a, label, spacing=spacing, tolerance=1.0)[:, 1:].float(),
        compute_surface_dice(a, b, class_thresholds=[1.0, 1.0], spacing=spacing),
        rtol=0,
        atol=0,
    )


def test_what_is_missing():
    # class 1 in both, 2 in the prediction alone, 3 in the reference alone, 4 in neither
    prediction, label = torch.tensor([[[0, 1, 0, 2]]]), torch.tensor([[[0, 1, 3, 0]]])
    probs = as_probs(prediction, 5)
    hd95, nsd = hausdorff_distance_95(probs, label), normalized_surface_distance(probs, label, tolerance=0)
    torch.testing.assert_close(hd95, torch.tensor([[NAN, 0, NAN, NAN, NAN]], dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(nsd, torch.tensor([[NAN, 1, 0, 0, NAN]], dtype=torch.float64), equal_nan=True)
    metric = HausdorffDistance95(5)
    metric.update(probs, label)
    assert metric.missed.tolist() == [0, 0, 1, 1, 0]
    assert metric.class_count.tolist() == [0, 1, 0, 0, 0]


def test_ignored_pixels_belong_to_no_structure():
    # The reference has class 1 in columns 2 to 4, the prediction up to 7; columns 5 and 6 are ignored or left out by the mask, 7 is a false positive.
    label = torch.zeros(1, 3, 10, dtype=torch.long)
    label[..., 2:5] = 1
    prediction = torch.zeros_like(label)
    prediction[..., 2:7] = 1
    out = torch.zeros_like(label, dtype=torch.bool)
    out[..., 5:7] = True
    probs = as_probs(prediction, 2)
    for found in (hausdorff_distance_95(probs, label.masked_fill(out, -100)), hausdorff_distance_95(probs, label, mask=~out)):
        assert found[0, 1] == 0
    assert hausdorff_distance_95(probs, label)[0, 1] == 2


def test_regions_may_overlap():
    label = torch.zeros(1, 2, 6, 6, dtype=torch.long)
    label[0, 0, 1:5, 1:5] = 1
    label[0, 1, 2:4, 2:4] = 1
    probs = 0.2 + 0.6 * label.roll(1, dims=2)
    found = hausdorff_distance_95(probs, label, activation="sigmoid", spacing=(3.0, 1.0))
    assert found.tolist() == [[3.0, 3.0]]
    one = hausdorff_distance_95(probs[:, 1:], label[:, 1:], activation="sigmoid", spacing=(3.0, 1.0))
    two = hausdorff_distance_95(torch.cat([1 - probs[:, 1:], probs[:, 1:]], 1), label[:, 1], spacing=(3.0, 1.0))
    assert one[0, 0] == two[0, 1] == 3.0


@pytest.mark.parametrize("make", [HausdorffDistance95, lambda c, **kw: NormalizedSurfaceDistance(c, tolerance=1.0, **kw)], ids=["hd95", "nsd"])
def test_metrics_mean_over_cases(make):
    prediction, label, _ = blobs((13, 11), batch=5)
    label[3][label[3] == 2] = 1
    spacing = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    probs = as_probs(prediction, 3)
    function = hausdorff_distance_95 if make is HausdorffDistance95 else lambda *a, **kw: normalized_surface_distance(*a, tolerance=1.0, **kw)
    scores = function(probs, label, spacing=spacing)
    assert scores[3, 2].isnan() if make is HausdorffDistance95 else scores[3, 2] == 0
    macro, per_class = make(3), make(3, average="none")
    for i in range(5):
        macro.update(probs[i : i + 1], label[i : i + 1], spacing=spacing[i])
    per_class.update(probs, label, spacing=spacing)
    torch.testing.assert_close(macro.compute(), scores[:, 1:].nanmean(1).mean())
    assert macro.count == 5
    torch.testing.assert_close(per_class.compute(), scores.nanmean(0), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_in_every_type_and_nothing_there(dtype):
    metric = HausdorffDistance95(3)
    metric.update(torch.full((1, 3, 4, 4), 1 / 3, dtype=dtype), torch.full((1, 4, 4), -100))
    metric.update(torch.zeros(0, 3, 4, 4, dtype=dtype), torch.zeros(0, 4, 4, dtype=torch.long))
    assert metric.compute().isnan()
    assert metric.count == 0
    assert metric.missed.tolist() == [0, 0, 0]


def test_soft_reference_takes_the_largest_share():
    prediction, label, valid = blobs((13, 11))
    shares = (0.5 * as_probs(label.clamp(min=0), 3) + 0.5 / 3).masked_fill(~valid.unsqueeze(1), -100.0)
    assert torch.equal(hausdorff_distance_95(as_probs(prediction, 3), shares)[:, 1:], hausdorff_distance_95(as_probs(prediction, 3), label)[:, 1:])


def test_errors(monkeypatch):
    probs, label = as_probs(torch.zeros(1, 4, 4, dtype=torch.long), 2), torch.ones(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="Expected 2 or 3 spatial dimensions for surface distances, but got 1"):
        hausdorff_distance_95(probs[:, :, 0], label[:, 0])
    with pytest.raises(ValueError, match=r"Expected `spacing` of shape \(2,\)"):
        hausdorff_distance_95(probs, label, spacing=[1.0])
    with pytest.raises(ValueError, match="`background` to be a class of 0 to 1"):
        hausdorff_distance_95(probs, label, background=2)
    with pytest.raises(ValueError, match="Expected `tolerance` to be 0 or greater, but got -1"):
        NormalizedSurfaceDistance(2, tolerance=-1)
    with pytest.raises(ValueError, match="Expected `tolerance` to be a number or 2 numbers, one per class"):
        normalized_surface_distance(probs, label, tolerance=[1.0])
    imported = builtins.__import__

    def without_monai(name, *args, **kwargs):
        if name.startswith("monai"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_monai)
    with pytest.raises(ImportError, match=r"measured by MONAI, which is not installed\. Run `pip install monai`"):
        hausdorff_distance_95(as_probs(label, 2), label)
