"""Label smoothing, SVLS and neighbour proportions: arithmetic, loops and identities."""

import pytest
import reference
import torch
from cases import each_dimension, make_case

from densecal.losses import SVLSLoss
from densecal.ops.backend import say_once
from densecal.registry import TARGETS
from densecal.targets import (
    LabelSmoothingTarget,
    NeighbourProportionsTarget,
    SVLSTarget,
    base,
    label_smoothing_target,
    neighbour_proportions_target,
    one_hot_target,
    svls_target,
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [0.925, 0.025, 0.025, 0.025]), ({"spread": "others"}, [0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]), ({"smoothing": 0.0}, [1.0, 0.0, 0.0, 0.0])],
    ids=["all", "others", "none"],
)
def test_label_smoothing_by_hand(options, expected):
    probs = label_smoothing_target(torch.tensor([[0]]), 4, **options).probs[0, :, 0]
    torch.testing.assert_close(probs, torch.tensor(expected))


def test_label_smoothing_under_sigmoid_has_two_outcomes():
    probs = label_smoothing_target(torch.tensor([[[1, 0]]]), 1, smoothing=0.2, activation="sigmoid").probs
    torch.testing.assert_close(probs, torch.tensor([[[0.9, 0.1]]]))


@each_dimension
@pytest.mark.parametrize("share", [0.3, torch.tensor(0.3, dtype=torch.float64), "per-image"], ids=["number", "tensor", "per-image"])
def test_label_smoothing_of_a_map_equals_that_of_its_one_hot_labels(spatial, share):
    if isinstance(share, str):
        share = torch.tensor([0.1, 0.4], dtype=torch.float64).reshape(2, 1, *[1] * len(spatial))
    target = label_smoothing_target(make_case(spatial).label_map, 3, smoothing=share, dtype=torch.float64)
    torch.testing.assert_close(target.probs, target.recipe(target.one_hot, target.valid, "softmax"))


def test_a_smoothing_that_is_learned_has_its_gradient():
    share = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    case = make_case((5, 7))
    probs = label_smoothing_target(case.label_map, 3, smoothing=share, dtype=torch.float64).probs
    (probs[:, 0] * (case.label_map == 0)).sum().backward()
    torch.testing.assert_close(share.grad, (case.label_map == 0).sum() * torch.tensor(-2 / 3, dtype=torch.float64))  # 1 - 2/3 of the share stays


@each_dimension
@pytest.mark.parametrize("soft", [False, True], ids=["map", "soft"])
def test_svls_matches_the_loops(spatial, soft):
    case = make_case(spatial)
    label, dims = (case.soft_labels if soft else case.label_map), len(spatial)
    plain = one_hot_target(label, 3, spatial_dims=dims, dtype=torch.float64)
    expected = reference.neighbourhood(plain.one_hot, plain.valid, reference.window("svls", [3] * dims, [1.3] * dims), "replicate")
    torch.testing.assert_close(svls_target(label, 3, sigma=1.3, spatial_dims=dims, dtype=torch.float64).probs, expected)


def test_svls_is_linear_so_the_mean_of_raters_commutes_with_it():
    raters = torch.randint(0, 3, (4, 1, 6, 6))
    one_by_one = torch.stack([svls_target(r, 3, dtype=torch.float64).probs for r in raters]).mean(0)
    mean = torch.stack([one_hot_target(r, 3, dtype=torch.float64).probs for r in raters]).mean(0)
    torch.testing.assert_close(svls_target(mean, 3, dtype=torch.float64).probs, one_by_one)


@pytest.mark.parametrize("name", [n for n in TARGETS.list() if n in ("one_hot", "label_smoothing", "svls", "neighbour_proportions")])
@pytest.mark.parametrize("spatial", [(9,), (5, 7), (3, 4, 5)], ids=["1d", "2d", "3d"])
def test_targets_sum_to_one_where_valid_and_zero_elsewhere(name, spatial):
    case = make_case(spatial)
    target = TARGETS.create(name)(case.label_map, 3, spatial_dims=len(spatial))
    torch.testing.assert_close(target.probs.sum(1), case.valid.float())
    assert not target.probs.movedim(1, -1)[~case.valid].any()


def test_ignored_neighbours_raise_the_centre_share():
    # One dimension, one of two neighbours ignored: (1/2) / (1/2 + 1/4) of the centre's class.
    probs = svls_target(torch.tensor([[-100, 0, 1]]), 2, border="renormalize").probs
    torch.testing.assert_close(probs[0, :, 1], torch.tensor([2 / 3, 1 / 3]))


def test_svls_proportions_equal_the_svls_target():
    label_map = torch.randint(0, 3, (2, 6, 7))
    svls, share = svls_target(label_map, 3, sigma=2.0), neighbour_proportions_target(label_map, 3, kernel="svls", sigma=2.0)
    assert torch.equal(svls.probs, share.probs)


def test_window_of_one_changes_nothing():
    case = make_case((5, 7))
    plain = one_hot_target(case.label_map, 3).probs
    for probs in (svls_target(case.label_map, 3, kernel_size=1).probs, neighbour_proportions_target(case.label_map, 3, kernel_size=1).probs):
        assert torch.equal(probs, plain)


def test_millimetres_need_spacing_and_follow_it():
    label_map = torch.randint(0, 2, (2, 6, 7))
    target = SVLSTarget(unit="mm", sigma=1.0)
    assert target.needs == ("spacing",)
    assert SVLSTarget().needs == ()
    probs = target(label_map, 2, context={"spacing": torch.tensor([[2.0, 0.5], [2.0, 0.5]])}).probs
    torch.testing.assert_close(probs, svls_target(label_map, 2, sigma=(0.5, 2.0)).probs)
    with pytest.raises(ValueError, match="Expected the side input 'spacing' for unit='mm'"):
        target(label_map, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothingTarget(smoothing=1.5), r"Expected `smoothing` in \[0, 1\], but got 1.5"),
        (lambda: LabelSmoothingTarget(spread="some"), "Expected `spread` to be one of"),
        (lambda: SVLSTarget(kernel_size=4), "Expected `kernel_size` to be odd"),
        (lambda: SVLSTarget(sigma=-1.0), "Expected `sigma` to be greater than 0"),
        (lambda: SVLSTarget(unit="cm"), "Expected `unit` to be one of"),
        (lambda: SVLSTarget(border="wrap"), "Expected `border` to be one of"),
        (lambda: NeighbourProportionsTarget(kernel="box"), "Expected `kernel` to be one of"),
    ],
)
def test_options_are_checked_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_gives_its_backend_to_its_target():
    for backend in ("torch", "auto"):
        logits, label_map = make_case((5, 7)).logits, make_case((5, 7)).label_map
        target = SVLSLoss(backend=backend)._prepared(logits, label_map, None)[1]
        assert target.backend == target.with_recipe(target.recipe, hard=True).backend == backend


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_is_left_out_by_choice(monkeypatch):
    labels = torch.randint(0, 3, (1, 15, 15), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(base, "_maker", lambda device, shares: pytest.fail("a kernel was taken"))
    target = svls_target(labels.cuda(), 3)
    target.backend = "torch"
    torch.testing.assert_close(target.one_hot.cpu(), torch.nn.functional.one_hot(labels).movedim(-1, 1).float())
    torch.testing.assert_close(target.probs.cpu(), target.recipe(target.one_hot.cpu(), target.valid.cpu(), "softmax"))


@pytest.mark.gpu
def test_on_a_gpu_what_no_kernel_covers_is_made_by_torch_and_said_once(caplog):
    labels = torch.randint(0, 3, (1, 15, 15), generator=torch.Generator().manual_seed(0))
    expected = svls_target(labels, 3, kernel_size=13).probs
    say_once.cache_clear()
    with caplog.at_level("INFO", logger="densecal"):
        for _ in range(2):
            torch.testing.assert_close(svls_target(labels.cuda(), 3, kernel_size=13).probs.cpu(), expected)
    assert [record.message for record in caplog.records] == [
        "Computed by PyTorch, not by a fused kernel: a window of 169 pixels is smoothed along one axis after the other."
    ]
