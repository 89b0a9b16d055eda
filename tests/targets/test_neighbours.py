"""Statistics of the labels of a window and windows that follow the image: arithmetic, loops, identities."""

import math

import pytest
import reference_targets as reference
import torch
from cases import each_dimension, make_case

from densecal.losses import DeepSupervisionLoss, NACLLoss
from densecal.ops import gaussian_kernel, guided_convolution, mean_kernel
from densecal.targets import NeighbourProportionsTarget, neighbour_proportions_target, one_hot_target
from densecal.terms import NeighbourPenalty

SIDES = {1: (5,), 2: (3, 5), 3: (3, 1, 3)}
GUIDED = ["image_l1", "image_l2", "bilateral", "bilateral_as_published", "gradient_as_published"]
STATISTICS = ["max", "min", "median", "mode"]


def picture(spatial, channels=1, batch=2):
    return torch.rand(batch, channels, *spatial, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# --- statistics ---


@pytest.mark.parametrize(("kernel", "expected"), [("max", 3), ("min", 0), ("median", 2), ("mode", 0)])
def test_statistic_by_hand(kernel, expected):
    probs = neighbour_proportions_target(torch.tensor([[0, 3, 2, 0, 2]]), 4, kernel=kernel, kernel_size=5).probs
    assert probs[0, :, 2].argmax() == expected  # of 0 3 2 0 2: lower median 2, and 0 before 2 of the tied
    assert probs[0, :, 2].sum() == 1


def test_even_number_of_labels_has_a_lower_median():
    probs = neighbour_proportions_target(torch.tensor([[0, 1, -100]]), 2, kernel="median").probs
    assert probs[0, 0].tolist() == [1.0, 1.0, 0.0]


@each_dimension
@pytest.mark.parametrize("border", ["replicate", "renormalize"])
@pytest.mark.parametrize("kernel", STATISTICS)
def test_statistics_match_the_loops(spatial, border, kernel):
    case, sides = make_case(spatial, num_classes=4), SIDES[len(spatial)]
    target = neighbour_proportions_target(case.label_map, 4, kernel=kernel, kernel_size=sides, border=border, spatial_dims=len(spatial))
    assert torch.equal(target.probs.double(), reference.statistic(case.label_map, 4, kernel, sides, border))


def test_statistics_under_sigmoid_dilate_erode_and_vote():
    regions = torch.tensor([[[0, 0, 1, 0, 1, 1, 1]]])
    found = {k: neighbour_proportions_target(regions, 1, kernel=k, activation="sigmoid").probs[0, 0].tolist() for k in STATISTICS}
    assert found["max"] == [0, 1, 1, 1, 1, 1, 1]
    assert found["min"] == [0, 0, 0, 0, 0, 1, 1]
    assert found["median"] == found["mode"] == [0, 0, 0, 1, 1, 1, 1]


def test_mode_does_not_depend_on_the_order_of_classes_where_nothing_ties():
    case, order = make_case((5, 7), num_classes=2, ignored=0.0), torch.tensor([1, 0])  # nine pixels, two classes: no tie
    mode = neighbour_proportions_target(case.label_map, 2, kernel="mode").probs
    assert torch.equal(neighbour_proportions_target(order[case.label_map], 2, kernel="mode").probs[:, order], mode)


# --- windows that follow the image ---


def test_image_weights_by_hand():
    label_map, image = torch.tensor([[0, 0, 1]]), torch.tensor([[[0.0, 1.0, 3.0]]])
    l1, l2 = [math.exp(-1), 1.0, math.exp(-2)], [math.exp(-1), 1.0, math.exp(-4)]
    near = math.exp(-1 / 2)
    for kernel, share in {
        "image_l1": l1[2] / sum(l1),
        "image_l2": l2[2] / sum(l2),
        "bilateral": near * l2[2] / (near * l2[0] + 1 + near * l2[2]),
        "gradient_as_published": 2 / 3,
        "bilateral_as_published": 2 * near / (1 + 2 * near) / 3,
    }.items():
        probs = neighbour_proportions_target(label_map, 2, kernel=kernel, image=image).probs
        torch.testing.assert_close(probs[0, 1, 1], torch.tensor(share), msg=kernel)


@each_dimension
@pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])
@pytest.mark.parametrize(("kernel", "channels"), [("image_l1", 3), ("image_l2", 2), ("bilateral", 1)])
def test_image_weights_match_the_loops(spatial, border, kernel, channels):
    case, sides, image = make_case(spatial), SIDES[len(spatial)], picture(spatial, channels)
    options = {"kernel": kernel, "kernel_size": sides, "sigma": 1.3, "intensity_scale": 0.4, "border": border, "image": image}
    target = neighbour_proportions_target(case.label_map, 3, spatial_dims=len(spatial), dtype=torch.float64, **options)
    similarity, sigma = ("l1" if kernel == "image_l1" else "l2"), (1.3 if kernel == "bilateral" else None)
    torch.testing.assert_close(target.probs, reference.guided(target.one_hot, target.valid, image, similarity, sides, border, sigma, 0.4))


@pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])
def test_a_flat_image_leaves_the_window_in_space(border):
    case = make_case((5, 7))
    image = torch.full((2, 3, 5, 7), 4.0)
    for kernel, plain in (("image_l1", "mean"), ("image_l2", "mean"), ("bilateral", "gaussian")):
        options = {"border": border, "sigma": 0.8, "intensity_scale": 1e9 if border == "zeros" else 1.0}  # zeros: the outside has intensity 0
        guided = neighbour_proportions_target(case.label_map, 3, kernel=kernel, image=image, **options).probs
        torch.testing.assert_close(guided, neighbour_proportions_target(case.label_map, 3, kernel=plain, border=border, sigma=0.8).probs)


def test_an_edge_of_the_image_keeps_labels_apart():
    case = make_case((5, 7))
    image = 1e3 * case.label_map.unsqueeze(1).double()
    target = neighbour_proportions_target(case.label_map, 3, kernel="bilateral", image=image)
    torch.testing.assert_close(target.probs, target.one_hot)


@pytest.mark.parametrize("kernel", GUIDED)
@pytest.mark.parametrize("junk", [float("nan"), 1e6])
def test_the_image_at_an_ignored_pixel_is_not_read(kernel, junk):
    case, image = make_case((5, 7)), picture((5, 7))
    dirty = torch.where(case.valid.unsqueeze(1), image, junk)
    clean = neighbour_proportions_target(case.label_map, 3, kernel=kernel, image=image).probs
    assert torch.equal(neighbour_proportions_target(case.label_map, 3, kernel=kernel, image=dirty).probs, clean)
    assert not clean.movedim(1, -1)[~case.valid].any()


def test_a_volume_repeated_along_depth_is_its_slice():
    case, image = make_case((5, 7)), picture((5, 7))
    deep, thick = (t.unsqueeze(axis).expand(*t.shape[:axis], 3, *t.shape[axis:]) for t, axis in ((case.label_map, 1), (image, 2)))
    for kernel in ("image_l1", "image_l2", "bilateral"):
        flat = neighbour_proportions_target(case.label_map, 3, kernel=kernel, image=image, dtype=torch.float64).probs
        probs = neighbour_proportions_target(deep, 3, kernel=kernel, image=thick, spatial_dims=3, dtype=torch.float64).probs
        torch.testing.assert_close(probs, flat.unsqueeze(2).expand_as(probs))


def test_sigma_in_millimetres_follows_the_spacing_of_each_image():
    case, image = make_case((5, 7)), picture((5, 7))
    target = NeighbourProportionsTarget(kernel="bilateral", unit="mm", sigma=1.0)
    assert target.needs == ("image", "spacing")
    probs = target(case.label_map, 3, context={"image": image, "spacing": torch.tensor([[2.0, 0.5], [1.0, 1.0]])}).probs
    for i, sigma in enumerate([(0.5, 2.0), 1.0]):
        alone = neighbour_proportions_target(case.label_map[i : i + 1], 3, kernel="bilateral", sigma=sigma, image=image[i : i + 1]).probs
        torch.testing.assert_close(probs[i : i + 1], alone)


# --- the penalty and the loss ---


@pytest.mark.parametrize("kernel", [*STATISTICS, *GUIDED])
def test_penalty_is_zero_at_the_shares_and_its_gradient_is_right(kernel):
    case, image = make_case((2, 3), seed=3), picture((2, 3))
    target = one_hot_target(case.label_map, 3, dtype=torch.float64)
    shares = neighbour_proportions_target(case.label_map, 3, kernel=kernel, image=image, dtype=torch.float64).probs
    penalty, context = NeighbourPenalty(kernel=kernel, distance="l2"), {"image": image}
    assert penalty.needs == (("image",) if kernel in GUIDED else ())
    assert penalty(shares, target, context=context).item() == 0.0
    logits = case.logits.requires_grad_()
    if kernel in ("median", "bilateral"):  # the shares are constants, so that one of each kind stands for all
        assert torch.autograd.gradcheck(lambda z: penalty(z, target, context=context), logits)
    penalty(logits, target, context=context).backward()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()


@pytest.mark.parametrize(("kernel", "unit"), [("median", "voxel"), ("bilateral_as_published", "mm")])
def test_loss_compiles_into_one_graph(kernel, unit):
    torch._dynamo.reset()
    case, image = make_case((5, 7), dtype=torch.float32), picture((5, 7)).float()
    loss, context = NACLLoss(kernel=kernel, unit=unit), {"image": image, "spacing": torch.tensor([[1.0, 2.0], [0.5, 1.0]])}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.logits, case.label_map, context=context), loss(case.logits, case.label_map, context=context))


def test_deep_supervision_resamples_the_image():
    label_map, image = torch.randint(0, 3, (2, 8, 8)), picture((8, 8)).float()
    outputs = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    assert DeepSupervisionLoss(NACLLoss(kernel="bilateral"))(outputs, label_map, context={"image": image}).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeighbourProportionsTarget(kernel="box"), "Expected `kernel` to be one of"),
        (lambda: NeighbourProportionsTarget(intensity_scale=0.0), "Expected `intensity_scale` to be greater than 0"),
        (lambda: NeighbourPenalty(intensity_scale=-1.0), "Expected `intensity_scale` to be greater than 0"),
        (
            lambda: NeighbourProportionsTarget(kernel="bilateral")(torch.zeros(1, 4).long(), 2),
            "Expected the side input 'image' for kernel='bilateral'",
        ),
        (lambda: neighbour_proportions_target(torch.zeros(1, 4).long(), 2, kernel="image_l1"), "Expected an `image` for kernel='image_l1'"),
        (
            lambda: NACLLoss(kernel="image_l2")(torch.zeros(1, 2, 4), torch.zeros(1, 4).long()),
            "Expected the side input 'image', which NeighbourPenalty needs",
        ),
        (
            lambda: neighbour_proportions_target(torch.zeros(1, 4, 4).long(), 2, kernel="image_l1", image=torch.zeros(1, 4, 4)).probs,
            r"Expected the image as \(N, channels, \*spatial\).*image.unsqueeze\(1\)",
        ),
        (
            lambda: guided_convolution(
                torch.ones(1, 2, 4), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, 4), mean_kernel(3, 1), similarity="l3"
            ),
            "Expected `similarity` to be one of",
        ),
        (
            lambda: guided_convolution(torch.ones(1, 2, 4), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, 4), gaussian_kernel(3, 1.0, 2)),
            "Expected a kernel of 1 axes",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
