"""The normalised convolution against visible arithmetic, against loops, and its identities."""

import pytest
import reference
import torch
from cases import SHAPES, each_dimension, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from densecal.ops import gaussian_kernel, mean_kernel, normalized_convolution, svls_kernel
from densecal.targets import one_hot_target

MAKE = {"mean": lambda k, s, d: mean_kernel(k, d), "gaussian": gaussian_kernel, "svls": svls_kernel}
each_border = pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])
each_kernel = pytest.mark.parametrize("kind", MAKE)


def one_hot_of(case):
    target = one_hot_target(case.label_map, case.logits.shape[1], spatial_dims=case.label_map.ndim - 1, dtype=torch.float64)
    return target.one_hot, target.valid


@pytest.mark.parametrize(
    ("border", "expected"),
    [("replicate", [1 / 3, 1 / 3, 1 / 3]), ("renormalize", [1 / 2, 1 / 3, 1 / 2]), ("zeros", [1 / 3, 1 / 3, 1 / 3])],
)
def test_border_by_hand(border, expected):
    shares = torch.tensor([[[0.0, 1.0, 0.0]]])
    result = normalized_convolution(shares, torch.ones(1, 3, dtype=torch.bool), mean_kernel(3, 1), border=border)
    torch.testing.assert_close(result, torch.tensor([[expected]]))


def test_svls_shares_by_hand():
    # In two dimensions the 4 sides weigh a = exp(-1/2), the 4 corners a^2; the centre keeps one half.
    a = torch.tensor(-0.5, dtype=torch.float64).exp().item()
    side, corner = 0.5 * a / (4 * a + 4 * a**2), 0.5 * a**2 / (4 * a + 4 * a**2)
    expected = torch.tensor([[corner, side, corner], [side, 0.5, side], [corner, side, corner]], dtype=torch.float64)
    torch.testing.assert_close(svls_kernel(3, 1.0, 2).dense(), expected)


@each_dimension
@each_border
@each_kernel
def test_convolution_matches_the_loops(spatial, border, kind):
    shares, valid = one_hot_of(make_case(spatial))
    dims = len(spatial)
    sizes, sigmas = ((3,), (5, 3), (3, 1, 5))[dims - 1], ((0.8,), (1.5, 0.7), (0.9, 1.0, 2.0))[dims - 1]
    expected = reference.neighbourhood(shares, valid, reference.window(kind, sizes, sigmas), border)
    torch.testing.assert_close(normalized_convolution(shares, valid, MAKE[kind](sizes, sigmas, dims), border=border), expected)


@each_kernel
@settings(deadline=None, max_examples=25, derandomize=True)
@given(size=st.sampled_from([1, 3, 5, 7]), sigma=st.floats(0.02, 20.0), spatial=st.sampled_from(list(SHAPES.values())), seed=st.integers(0, 99))
def test_shares_are_a_distribution_at_any_width(kind, size, sigma, spatial, seed):
    case = make_case(spatial, seed=seed, ignored=0.4, dtype=torch.float32)
    target = one_hot_target(case.label_map, 3, spatial_dims=len(spatial))
    shares = normalized_convolution(target.one_hot, target.valid, MAKE[kind](size, sigma, len(spatial)))
    assert shares.min() >= 0
    torch.testing.assert_close(shares.sum(1), target.valid.float())


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_svls_centre_holds_one_half_at_every_size(size, sigma, dims):
    stencil = svls_kernel(size, sigma, dims).dense()
    assert stencil[(size // 2,) * dims].item() == pytest.approx(0.5, abs=1e-12)
    assert stencil.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["mean", "gaussian"])
def test_depth_constant_volume_equals_a_slice(kind):
    shares, valid = one_hot_of(make_case((5, 7)))
    expected = normalized_convolution(shares, valid, MAKE[kind](3, 1.0, 2))
    volume, mask = shares.unsqueeze(2).expand(-1, -1, 4, -1, -1), valid.unsqueeze(1).expand(-1, 4, -1, -1)
    result = normalized_convolution(volume, mask, MAKE[kind](3, 1.0, 3))
    torch.testing.assert_close(result, expected.unsqueeze(2).expand_as(result))


def test_svls_of_a_window_flat_in_depth_equals_a_slice():
    shares, valid = one_hot_of(make_case((5, 7)))
    volume, mask = shares.unsqueeze(2).expand(-1, -1, 4, -1, -1), valid.unsqueeze(1).expand(-1, 4, -1, -1)
    result = normalized_convolution(volume, mask, svls_kernel((1, 3, 3), 1.0, 3))
    torch.testing.assert_close(result, normalized_convolution(shares, valid, svls_kernel(3, 1.0, 2)).unsqueeze(2).expand_as(result))


def test_svls_with_an_axis_so_narrow_that_its_neighbours_vanish():
    # At sigma 0.02 a neighbour's weight is exp(-1250), zero in double precision: the half goes to the other axis.
    torch.testing.assert_close(svls_kernel((3, 3), (0.02, 1.0), 2).dense()[1], svls_kernel(3, 1.0, 1).dense())


def test_a_pixel_among_ignored_ones_keeps_its_class():
    shares = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    valid = torch.tensor([[False, True, False]])
    for kind, make in MAKE.items():
        assert normalized_convolution(shares, valid, make(3, 1.0, 1))[0, :, 1].tolist() == pytest.approx([1.0, 0.0]), kind


def test_sigma_in_millimetres_is_divided_by_the_spacing():
    in_voxels = gaussian_kernel(5, (0.5, 2.0), 2)
    in_mm = gaussian_kernel(5, (1.0, 1.0), 2, spacing=(2.0, 0.5))
    torch.testing.assert_close(in_mm.dense(), in_voxels.dense())


@pytest.mark.parametrize("kind", ["gaussian", "svls"])
def test_spacing_per_image_equals_each_image_alone(kind):
    shares, valid = one_hot_of(make_case((5, 7)))
    spacing = torch.tensor([[1.0, 1.0], [4.0, 0.5]])
    together = normalized_convolution(shares, valid, MAKE[kind](5, 1.0, 2, spacing=spacing))
    for i in range(2):
        alone = normalized_convolution(shares[i : i + 1], valid[i : i + 1], MAKE[kind](5, 1.0, 2, spacing=spacing[i].tolist()))
        torch.testing.assert_close(together[i : i + 1], alone)


@each_dimension
@each_kernel
def test_inside_is_what_no_border_reaches(spatial, kind):
    values = torch.randn(2, 3, *(side + 4 for side in spatial), dtype=torch.float64)
    sizes = ((3,), (5, 3), (3, 1, 5))[len(spatial) - 1]
    kernel = MAKE[kind](sizes, 0.9, len(spatial))
    inner = tuple(slice(side // 2, length - side // 2) for side, length in zip(sizes, values.shape[2:], strict=True))
    expected = kernel.convolve(values, border="zeros")[(slice(None), slice(None), *inner)]
    torch.testing.assert_close(kernel.convolve(values, border="inside"), expected)


def test_kernel_of_one_image_of_the_batch():
    spacing = torch.tensor([[1.0, 1.0], [4.0, 0.5]])
    for make in (gaussian_kernel, svls_kernel):
        batch = make(5, 1.0, 2, spacing=spacing)
        for i in range(2):
            torch.testing.assert_close(batch.of_image(i).dense(), batch.dense()[i])
            torch.testing.assert_close(batch.of_image(i).dense(), make(5, 1.0, 2, spacing=spacing[i].tolist()).dense())


def test_class_permutation_permutes_the_shares():
    shares, valid = one_hot_of(make_case((5, 7)))
    order = [2, 0, 1]
    kernel = svls_kernel(3, 1.0, 2)
    torch.testing.assert_close(
        normalized_convolution(shares[:, order], valid, kernel), normalized_convolution(shares, valid, kernel)[:, order], rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["mean", "svls"])
def test_gradient_of_soft_shares(kind):
    shares = torch.rand(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(1, 3, 4) > 0.3

    def run(values):
        return normalized_convolution(values * valid.unsqueeze(1), valid, MAKE[kind](3, 1.0, 2))

    assert torch.autograd.gradcheck(run, shares)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"Expected `kernel_size` to be odd, so that a window has a centre, but got 4\. Try 5\."):
        mean_kernel(4, 2)
    with pytest.raises(ValueError, match="Expected `sigma` to be greater than 0, but got 0"):
        gaussian_kernel(3, 0.0, 2)
    with pytest.raises(ValueError, match="Expected `sigma` to be a number or 2 numbers"):
        gaussian_kernel(3, (1.0, 1.0, 1.0), 2)
    with pytest.raises(ValueError, match=r"Expected `spacing` of shape \(2,\) or \(N, 2\)"):
        gaussian_kernel(3, 1.0, 2, spacing=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="Expected `border` to be one of"):
        normalized_convolution(torch.ones(1, 1, 3), torch.ones(1, 3, dtype=torch.bool), mean_kernel(3, 1), border="reflect")
    with pytest.raises(ValueError, match="Expected a kernel of 1 axes"):
        normalized_convolution(torch.ones(1, 1, 3), torch.ones(1, 3, dtype=torch.bool), mean_kernel(3, 2))
