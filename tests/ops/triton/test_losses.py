"""Losses by their fused kernels and by PyTorch: the same value and gradient."""

import logging

import pytest
import torch
from cases import make_case
from kernels import DEVICE, needs_kernels
from losses_by_name import NAMES, evaluate, make_loss, takes

from densecal.losses import CompoundLoss, CrossEntropyLoss, DiceCELoss, JaccardMetricLoss, NACLLoss, SVLSLoss
from densecal.losses import fused as dispatch
from densecal.ops.backend import say_once
from densecal.targets import SVLSTarget
from densecal.terms import CrossEntropy, DiceSemimetric, LogitMargin, NegativeEntropy, NeighbourPenalty

pytestmark = needs_kernels

COVERED = ["acls", "boundary_smoothing", "ce", "dice_ce", "dml", "jml", "label_smoothing", "maxsup", "mbls", "nacl", "recommended", "svls"]


def value_and_gradient(loss, logits, target, context=None):
    logits = logits.detach().requires_grad_()
    value = loss(logits, target, context=context)
    value.sum().backward()
    return value.detach(), logits.grad


def hold(make, logits, target, *, context=None, tolerance=1e-6):
    expected, found = (value_and_gradient(make(backend).to(DEVICE), logits, target, context) for backend in ("torch", "triton"))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def case(spatial=(7,), **options):
    made = make_case(spatial, **options)
    return made.logits.to(DEVICE), made.label_map.to(DEVICE)


@pytest.mark.parametrize("name", COVERED)
def test_preset(name):
    logits, labels = case((4, 3), batch=1)
    hold(lambda backend: make_loss(name, backend=backend, class_weights=[0.5, 1.0, 2.0]), logits, labels)


@pytest.mark.parametrize("name", [name for name in COVERED if takes(name, "reduction")])
def test_reductions(name):
    logits, labels = case(dtype=torch.float32)
    for reduction in ("sum", "none"):
        hold(lambda backend, r=reduction: make_loss(name, backend=backend, reduction=r), logits, labels, tolerance=2e-5)


def test_other_losses_say_what_is_not_covered():
    logits, labels = case()
    for name in set(NAMES) - set(COVERED):
        with pytest.raises(ValueError, match=r"for backend='triton', but '\w+': no kernel computes"):
            evaluate(make_loss(name, backend="triton"), logits, labels)


@pytest.mark.parametrize(
    "options",
    [
        {"log": True, "gamma": 0.7, "include_background": False},
        {"norm": "l2", "weight_image": 1.0, "weight_class": 0.5, "active": "all"},
    ],
    ids=["log", "l2"],
)
def test_options_of_overlaps(options):
    logits, labels = case((7,))
    labels[1] = -100  # an image without valid pixels
    hold(lambda backend: JaccardMetricLoss(backend=backend, **options), logits, labels)


def test_spacing_in_mm():
    logits, labels = case()
    context = {"spacing": torch.tensor([[1.0], [2.0]], device=DEVICE)}
    hold(lambda backend: SVLSLoss(unit="mm", sigma=1.5, backend=backend), logits, labels, context=context)
    hold(lambda backend: NACLLoss(unit="mm", kernel="gaussian", backend=backend), logits, labels, context=context)


def test_compound_with_one_target_and_mixed_reductions():
    def make(backend):
        terms = {
            "ce": {"weight": 0.5, "term": CrossEntropy()},
            "dml": {"weight": 0.75, "term": DiceSemimetric()},
            "neighbour": {"weight": 0.1, "term": NeighbourPenalty(distance="l2")},
            "mbls": {"weight": 0.2, "term": LogitMargin(margin=1.0, reduction="none")},
        }
        return CompoundLoss(SVLSTarget(), terms, backend=backend)

    hold(make, *case())


def test_labels_as_they_come():
    """A channel axis, floating labels, narrow types: what a loader gives."""
    logits, labels = case((5, 4), batch=1)
    for target in (labels.unsqueeze(1), labels.unsqueeze(1).float(), labels.to(torch.int16)):
        hold(lambda backend: CrossEntropyLoss(backend=backend), logits, target)
    inside = labels.clamp_min(0)
    hold(lambda backend: CrossEntropyLoss(backend=backend), logits[:, :2], inside.clamp_max(1).bool())


@pytest.mark.parametrize("what", ["soft", "sigmoid", "probs", "median"])
def test_what_the_kernels_do_not_do_is_an_error(what):
    logits, labels = case()
    soft = logits.softmax(1).detach()
    cases = {
        "soft": (CrossEntropyLoss(backend="triton"), soft, "soft labels"),
        "sigmoid": (CrossEntropyLoss(backend="triton", activation="sigmoid"), soft, "activation='sigmoid'"),
        "probs": (NACLLoss(backend="triton", acts_on="probs"), labels, "'neighbour': .*acts_on='probs'"),
        "median": (NACLLoss(backend="triton", kernel="median"), labels, "'neighbour': .*LabelStatistic"),
    }
    loss, target, message = cases[what]
    with pytest.raises(ValueError, match=message):
        loss(logits, target)


def test_a_class_below_a_covered_one_is_not_covered_if_it_computes_something_else():
    class Doubled(CrossEntropy):
        def forward(self, logits, target, *, context=None):
            return 2 * super().forward(logits, target, context=context)

    logits, labels = case()
    loss = CompoundLoss(SVLSTarget(), {"ce": {"term": Doubled()}}, backend="triton")
    with pytest.raises(ValueError, match="no kernel computes Doubled, which has a 'forward' of its own"):
        loss(logits, labels)


def test_auto_leaves_the_rest_to_torch_and_says_so_once(monkeypatch, caplog):
    """As on a GPU, where `auto` takes kernels; the interpreter is taken for one."""
    monkeypatch.setattr(dispatch, "_takes_kernels", lambda backend, logits: backend != "torch")
    logits, labels = case()

    def make(backend):
        terms = {"ce": {"term": CrossEntropy()}, "entropy": {"weight": 0.1, "term": NegativeEntropy()}, "dice": {"term": DiceSemimetric()}}
        return CompoundLoss(SVLSTarget(), terms, backend=backend)

    say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="densecal"):
        expected, found, _ = (value_and_gradient(make(backend).to(DEVICE), logits, labels) for backend in ("torch", "auto", "auto"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert [record.message for record in caplog.records] == [
        "Computed by PyTorch, not by a fused kernel: 'entropy': no kernel computes the term NegativeEntropy."
    ]


def test_no_copy_of_the_labels_is_made(monkeypatch):
    """The kernel reads narrow labels themselves."""
    from densecal.targets.one_hot import LabelMap

    logits, labels = case()
    labels = labels.masked_fill(labels < 0, 255).to(torch.uint8)
    monkeypatch.setattr("densecal.targets.one_hot.may_look", lambda tensor: False)  # on a GPU labels are not looked at
    monkeypatch.setattr(LabelMap, "_once", lambda self: pytest.fail("the labels were converted"))
    for make in (SVLSLoss, NACLLoss, DiceCELoss):
        make(backend="triton", ignore_index=255).to(DEVICE)(logits, labels)
