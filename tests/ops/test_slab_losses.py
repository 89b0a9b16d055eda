"""Losses of a label map in slabs, held against their twin that builds every distribution: values, gradients, and what is never built."""

import importlib
import math

import pytest
import torch
from cases import each_dimension, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from densecal.losses import CompoundLoss, CrossEntropyLoss, DiceCELoss, MbLSLoss, NACLLoss, SVLSLoss
from densecal.ops import gaussian_kernel, label_windows, mean_kernel, slab_losses, svls_kernel
from densecal.ops.backend import NotCovered
from densecal.ops.label_losses import CrossEntropyPart, LabelShares, MarginPart, NeighbourPart, OverlapPart, PixelLoss, label_losses
from densecal.targets import BoundarySmoothingTarget, SVLSTarget, one_hot_target
from densecal.terms import CrossEntropy, LogitMargin, NegativeEntropy, NeighbourPenalty

# The module of the name that the package exports as a function.
dense = importlib.import_module("densecal.ops.label_losses")

KERNELS = {
    "none": lambda sides, dims: None,
    "mean": lambda sides, dims: mean_kernel(sides, dims),
    "gaussian": lambda sides, dims: gaussian_kernel(sides, 1.3, dims),
    "svls": lambda sides, dims: svls_kernel(sides, 0.8, dims),
    "svls-spacing": lambda sides, dims: svls_kernel(sides, 1.0, dims, spacing=torch.tensor([[1.0] * dims, [0.5, 2.0, 1.0][:dims]])),
}
SIDES = {1: (5,), 2: (3, 5), 3: (3, 1, 5)}
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])

each_kernel = pytest.mark.parametrize("kind", KERNELS)
each_border = pytest.mark.parametrize("border", ["replicate", "renormalize", "zeros"])


@pytest.fixture(params=["mixed-pixels", "boxes"])
def way(request, monkeypatch):
    """Both ways to the shares, whatever would be faster, in slabs of a few pixels."""
    monkeypatch.setattr(label_windows, "_WORK_OF_A_TAP", 0.0 if request.param == "mixed-pixels" else math.inf)
    monkeypatch.setattr(label_windows, "_CHUNK", 40)
    monkeypatch.setattr(slab_losses, "_SLAB", 30)
    monkeypatch.setattr(slab_losses, "_PLANES", 2)


def numbers_of(result):
    """What can be differentiated."""
    return (result.values,) if isinstance(result, PixelLoss) else (result.tp, result.fp, result.fn)


def weighted_sum(results):
    """In which each number counts differently."""
    generator = torch.Generator().manual_seed(0)
    numbers = [number for result in results for number in numbers_of(result)]
    return sum((place + 1) * (n * torch.rand(n.shape, generator=generator).to(n)).sum() for place, n in enumerate(numbers))


def value_and_gradient(function, logits, labels, parts, **options):
    """All values, what they are divided by or the largest shares, and the gradient of a weighted sum."""
    logits = logits.detach().clone().requires_grad_()
    results = function(logits, labels, parts, **{"ignore_index": -100} | options)
    weighted_sum(results).backward()
    values = [number.detach() for result in results for number in numbers_of(result)]
    return values, [r.count if isinstance(r, PixelLoss) else r.largest for r in results], logits.grad


def assert_as_dense(logits, labels, parts, *, objectives=(None,), **options):
    expected = value_and_gradient(label_losses, logits, labels, parts, **options)
    for objective in objectives:
        torch.testing.assert_close(value_and_gradient(slab_losses.label_losses, logits, labels, parts, **options, objective=objective), expected)


@each_dimension
@each_kernel
@each_border
def test_slabs_as_dense(way, spatial, kind, border):
    shares = LabelShares(KERNELS[kind](SIDES[len(spatial)], len(spatial)), border)
    parts = [CrossEntropyPart(shares, WEIGHTS), NeighbourPart(shares, "l1"), NeighbourPart(shares, "l2"), CrossEntropyPart(LabelShares())]
    for ignored, per_pixel in ((0.3, False), (0.3, True), (0.0, True)):
        case = make_case(spatial, ignored=ignored)
        assert_as_dense(case.logits, case.label_map, parts, per_pixel=per_pixel)
    for part in parts[::2]:
        assert_as_dense(case.logits, case.label_map, [part])


MARGINS = {
    "l1": MarginPart(1.0, False, 0.3),
    "maxsup": MarginPart(0.0, False, 0.3),
    "l2": MarginPart(0.5, True, 0.3),
    "largest": MarginPart(0.5, True, 0.3, 0.2),
    "detached": MarginPart(0.5, True, 0.3, 0.2, detached=True),
}


@pytest.mark.parametrize("part", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("per_pixel", [False, True], ids=["sum", "per-pixel"])
def test_margins_as_dense(way, part, per_pixel):
    case = make_case((5, 7))
    case.logits[:, 0, :3] = case.logits[:, 1, :3]  # some of these are the largest
    case.logits[:, :, 3] = 0.0
    assert_as_dense(case.logits, case.label_map, [CrossEntropyPart(LabelShares()), part], per_pixel=per_pixel)
    assert_as_dense(case.logits, case.label_map, [part], per_pixel=per_pixel)


OBJECTIVES = {
    "right": weighted_sum,
    "scaled": lambda results: 3 * weighted_sum(results),
    "wrong": lambda results: sum(numbers_of(result)[0].sum() for result in results),
    "of-one": lambda results: numbers_of(results[0])[0],
    "constant": lambda results: torch.tensor(1.0),
}


@pytest.mark.parametrize("ignored", [0.0, 0.3], ids=str)
@pytest.mark.parametrize("boundary", [False, True], ids=["everywhere", "boundary"])
def test_whatever_was_expected_of_the_results_the_gradient_is_right(way, boundary, ignored):
    case = make_case((5, 7), ignored=ignored)
    shares = LabelShares(svls_kernel(3, 1.0, 2), "zeros", 0.25, (3, 3) if boundary else None)
    parts = [CrossEntropyPart(shares, WEIGHTS), NeighbourPart(LabelShares(mean_kernel(3, 2)), "l2"), *MARGINS.values(), OverlapPart(shares)]
    for some in (parts[:1], parts[:-1], parts):
        assert_as_dense(case.logits, case.label_map, some, objectives=OBJECTIVES.values())


@each_border
@pytest.mark.parametrize("spatial", [(7,), (5, 3, 4)], ids=["1d", "3d"])
@pytest.mark.parametrize("kind", ["none", "svls"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_overlaps_as_dense(way, spatial, kind, border, norm):
    kernel = KERNELS[kind](SIDES[len(spatial)], len(spatial))
    for ignored in (0.0, 0.3):
        case = make_case(spatial, ignored=ignored)
        case.label_map[0, : spatial[0] // 2] = 1  # without the other classes
        for smoothing, boundary in ((0.0, None), (0.2, None), (0.2, SIDES[len(spatial)])):
            part = OverlapPart(LabelShares(kernel, border, smoothing, boundary), norm)
            assert_as_dense(case.logits, case.label_map, [part])
    assert_as_dense(case.logits, case.label_map, [part, CrossEntropyPart(part.shares, WEIGHTS), OverlapPart(LabelShares()), MARGINS["l2"]])


@each_dimension
@pytest.mark.parametrize("kind", ["none", "svls"])
@pytest.mark.parametrize("boundary", [False, True], ids=["everywhere", "boundary"])
def test_smoothing_as_dense(way, spatial, kind, boundary):
    case, dims = make_case(spatial), len(spatial)
    case.label_map[..., : spatial[-1] // 2] = 1  # somewhere the labels are all alike
    sides = SIDES[dims]
    for share in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.5]).reshape(2, 1, *[1] * dims)):
        shares = LabelShares(KERNELS[kind](sides, dims), "zeros", share, sides if boundary else None)
        for weights in (None, WEIGHTS):
            assert_as_dense(case.logits, case.label_map, [CrossEntropyPart(shares, weights)])


@pytest.mark.parametrize("shares", ["svls", "boundary"])
def test_constant_maps_axes_of_one_pixel_and_maps_without_a_valid_one(way, shares):
    shares = LabelShares(svls_kernel((3, 5, 3), 1.0, 3)) if shares == "svls" else LabelShares(smoothing=0.5, boundary=(3, 5, 3))
    for spatial in ((1, 1, 1), (1, 6, 1), (4, 1, 2)):
        case = make_case(spatial)
        for label_map in (torch.ones_like(case.label_map), torch.full_like(case.label_map, -100), case.label_map):
            assert_as_dense(case.logits, label_map, [CrossEntropyPart(shares)])


def test_by_hand():
    logits = torch.tensor([[[math.log(3.0)] * 3, [0.0] * 3]], dtype=torch.float64)  # p = (3/4, 1/4)
    shares = LabelShares(mean_kernel(3, 1), "zeros")
    ce, around = slab_losses.label_losses(
        logits, torch.tensor([[0, 0, 1]]), [CrossEntropyPart(shares), NeighbourPart(shares)], ignore_index=-100, per_pixel=True
    )
    # Shares (2/3, 0), (2/3, 1/3) and (1/3, 1/3): outside there is no class.
    a, b, z = -math.log(3 / 4), -math.log(1 / 4), math.log(3.0)
    assert ce.values[0].tolist() == pytest.approx([2 / 3 * a, 2 / 3 * a + 1 / 3 * b, 1 / 3 * a + 1 / 3 * b])
    assert around.values[0].tolist() == pytest.approx([(z - 2 / 3) / 2, (z - 2 / 3 + 1 / 3) / 2, (z - 1 / 3 + 1 / 3) / 2])
    assert ce.count.item() == 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("ignore_index", [-100, 1, 255], ids=str)
def test_labels_of_any_type(dtype, ignore_index):
    generator = torch.Generator().manual_seed(0)
    label_map = torch.randint(0, 2, (2, 5, 7), generator=generator)
    logits = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    parts = [CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 2)))]
    given = value_and_gradient(slab_losses.label_losses, logits, label_map.to(dtype), parts, ignore_index=ignore_index)
    torch.testing.assert_close(given, value_and_gradient(label_losses, logits, label_map, parts, ignore_index=ignore_index))
    loss = SVLSLoss(ignore_index=ignore_index)(logits, label_map.to(dtype).unsqueeze(1))
    torch.testing.assert_close(loss, given[0][0] / given[1][0])


def test_a_class_is_not_taken_for_an_ignore_index_that_wraps_onto_it():
    # In 8 bits -100 is 156, and 300 is 44.
    for ignore_index in (-100, 300):
        labels = torch.tensor([[156, 44, 44]], dtype=torch.uint8)
        codes, valid = label_windows.encode_labels(labels, 160, ignore_index)
        assert codes.tolist() == labels.tolist()
        assert valid is None
        wide = torch.tensor([[156, 44, ignore_index]])
        codes, valid = label_windows.encode_labels(wide, 160, ignore_index)
        assert codes.tolist() == [[156, 44, 160]]
        assert valid.tolist() == [[True, True, False]]


def test_more_classes_than_a_byte_holds(way):
    generator = torch.Generator().manual_seed(0)
    label_map = torch.randint(250, 260, (1, 4, 5), generator=generator)
    label_map[0, 0, 0] = 255
    logits = torch.randn(1, 260, 4, 5, generator=generator, dtype=torch.float64)
    assert_as_dense(logits, label_map, [CrossEntropyPart(LabelShares(mean_kernel(3, 2), "renormalize"))], ignore_index=255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_logits(way, dtype):
    case = make_case((5, 7), dtype=torch.float32)
    logits = case.logits.to(dtype)
    parts = [CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 2))), NeighbourPart(LabelShares(mean_kernel(3, 2)))]
    values, _, gradient = value_and_gradient(slab_losses.label_losses, logits, case.label_map, parts)
    expected, _, expected_gradient = value_and_gradient(label_losses, logits.double(), case.label_map, parts)
    assert values[0].dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(values, [value.float() for value in expected])
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("form", ["channels-last", "strided", "transposed"])
def test_memory_of_logits_and_labels_in_any_order(way, form):
    case = make_case((4, 6, 5))
    logits, label_map = case.logits, case.label_map
    if form == "channels-last":
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    elif form == "strided":
        logits = torch.stack([logits, -logits], dim=-1)[..., 0]
        label_map = torch.stack([label_map, -label_map], dim=-1)[..., 0]
    else:
        logits, label_map = logits.transpose(2, 4), label_map.transpose(1, 3)
    assert not logits.is_contiguous()
    assert_as_dense(logits, label_map, [CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 3))), NeighbourPart(LabelShares())])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_what_stands_at_an_ignored_pixel_reaches_nothing(way, bad):
    case = make_case((5, 7))
    poisoned = case.logits.masked_fill(~case.valid.unsqueeze(1), bad)
    parts = [CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 2))), NeighbourPart(LabelShares(mean_kernel(3, 2)))]
    result = value_and_gradient(slab_losses.label_losses, poisoned, case.label_map, parts)
    torch.testing.assert_close(result, value_and_gradient(label_losses, case.logits, case.label_map, parts))
    assert not result[2].movedim(1, -1)[~case.valid].any()


def test_gradcheck(way):
    case = make_case((2, 3))
    parts = [CrossEntropyPart(LabelShares(svls_kernel(3, 1.0, 2)), WEIGHTS), NeighbourPart(LabelShares(mean_kernel(3, 2)), "l2")]

    def run(z):
        return sum(r.values for r in slab_losses.label_losses(z, case.label_map, parts, ignore_index=-100))

    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(run, logits)
    assert torch.autograd.gradgradcheck(run, logits)
    value = run(logits)
    first, second = (torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_small_loss_under_large_logits_as_precise_as_pytorch():
    logits = torch.tensor([[[1000.0], [985.0]]])
    (ce,) = slab_losses.label_losses(logits, torch.tensor([[0]]), [CrossEntropyPart(LabelShares())], ignore_index=-100)
    assert ce.values.item() == pytest.approx(
        math.log1p(math.exp(-15.0)), rel=0.2, abs=0
    )  # 3e-7: a difference of numbers near 1000 would be 0 or 6e-5
    assert ce.values.item() == torch.nn.functional.cross_entropy(logits, torch.tensor([[0]])).item()


def test_parts_without_slabs_are_left_to_their_terms():
    for part in (NeighbourPart(LabelShares(smoothing=0.1)), NeighbourPart(LabelShares(smoothing=torch.tensor(0.0)))):
        with pytest.raises(NotCovered, match="no slabs"):
            slab_losses.label_losses(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long), [part], ignore_index=-100)
    case = make_case((5, 7))
    loss = CompoundLoss(SVLSTarget(), {"ce": {"term": CrossEntropy()}, "entropy": {"term": NegativeEntropy()}})
    target = loss.target(case.label_map, 3, dtype=torch.float64)
    parts = loss.terms(case.logits, case.label_map)
    for name in parts:
        torch.testing.assert_close(parts[name], loss.parts[name](torch.where(case.valid.unsqueeze(1), case.logits, 0.0), target))


TERMS = {
    "ce": {"term": CrossEntropy(), "weight": 0.7},
    "neighbour": {"term": NeighbourPenalty(), "weight": 0.1},
    "margin": {"term": LogitMargin(margin=1.0), "weight": 0.2},
}


@pytest.mark.parametrize("names", [["ce"], ["ce", "margin"], ["ce", "neighbour", "margin"]], ids="+".join)
@pytest.mark.parametrize("scale", [1.0, 65536.0, 1 / 3], ids=str)
def test_slabs_are_visited_once_where_the_loss_is_the_weighted_sum(names, scale, monkeypatch):
    visits = []
    visit = slab_losses._Work.visit
    monkeypatch.setattr(slab_losses._Work, "visit", lambda self, logits: visits.append(1) or visit(self, logits))
    case = make_case((5, 7))
    loss, logits = CompoundLoss(SVLSTarget(), {name: TERMS[name] for name in names}), case.logits.requires_grad_()
    (scale * loss(logits, case.label_map)).backward()
    assert len(visits) == 1
    once, logits.grad = logits.grad, None
    # A sum with other weights is not what was expected, and right nevertheless.
    parts = loss.terms(logits, case.label_map)
    sum(scale * (place + 1) * loss.weights[name] * value for place, (name, value) in enumerate(parts.items())).backward()
    assert len(visits) == (2 if len(names) == 1 else 3)
    if len(names) == 1:
        torch.testing.assert_close(logits.grad, once)
    with torch.no_grad():
        loss(logits, case.label_map)
    assert len(visits) == (3 if len(names) == 1 else 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_loss_keeps_small_gradients_of_half_precision(dtype):
    """A mean over many pixels has gradients that half precision cannot hold unless they are scaled, as a gradient scaler does."""
    case = make_case((64, 64), dtype=torch.float32)
    logits = case.logits.to(dtype).requires_grad_()
    (65536 * CrossEntropyLoss()(logits, case.label_map)).backward()
    exact = logits.detach().double().requires_grad_()
    (65536 * CrossEntropyLoss(backend="torch")(exact, case.label_map)).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


class Sizes(TorchDispatchMode):
    """Counts the operations whose result is as large as ``numel`` and no view, nor a buffer that was given."""

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.large = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.numel * result.element_size():
            storages = [a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            if result.untyped_storage().data_ptr() not in storages:
                self.large.append(str(function))
        return result


def test_everything_is_let_go_after_the_backward_pass():
    case = make_case((5, 7))
    logits = case.logits.requires_grad_()
    value = SVLSLoss()(logits, case.label_map)
    value.backward(retain_graph=True)
    first, logits.grad = logits.grad, None
    value.backward()
    torch.testing.assert_close(first, logits.grad)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("blocks", [False, True], ids=["regions", "blocks"])
@pytest.mark.parametrize("loss", [SVLSLoss(), NACLLoss(), MbLSLoss(), DiceCELoss()], ids=["svls", "nacl", "mbls", "dice_ce"])
def test_the_gradient_is_the_only_tensor_as_large_as_the_logits(loss, blocks, monkeypatch):
    monkeypatch.setattr(slab_losses, "_SLAB", 2**10)
    monkeypatch.setattr(label_windows, "_CHUNK", 2**10)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 8, 40, 16, 16, generator=generator).requires_grad_()
    label_map = (
        torch.randint(0, 8, (1, 40, 16, 16), generator=generator, dtype=torch.uint8) if blocks else torch.zeros(1, 40, 16, 16, dtype=torch.uint8)
    )
    with Sizes(logits.numel()) as sizes:
        loss(logits, label_map).backward()
    assert sizes.large == ["aten.empty.memory_format"]
    with Sizes(logits.numel()) as sizes, torch.no_grad():
        loss(logits, label_map)
    assert sizes.large == []


@each_dimension
@each_border
@pytest.mark.parametrize("target", [SVLSTarget, BoundarySmoothingTarget], ids=["svls", "boundary"])
def test_probs_of_a_label_map_are_those_of_its_one_hot_labels(way, spatial, border, target):
    case = make_case(spatial)
    soft_target = (target(border=border) if target is SVLSTarget else target())(case.label_map, 3, spatial_dims=len(spatial), dtype=torch.float64)
    labels = one_hot_target(case.label_map, 3, spatial_dims=len(spatial), dtype=torch.float64)
    torch.testing.assert_close(soft_target.probs, soft_target.recipe(labels.one_hot, labels.valid, "softmax"))
