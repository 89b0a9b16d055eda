"""A step leaves nothing behind: what a loss needed goes when the loss goes, not when Python next looks for cycles, which may be an epoch later."""

import gc
import weakref

import pytest
import torch
from losses_by_name import NAMES, evaluate, make_loss


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_nothing_behind(name, backend, no_collector):
    loss = make_loss(name, backend=backend)
    label = torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(0))
    scores = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = scores * 1.0
    total = evaluate(loss, logits, label)
    left = [weakref.ref(logits), weakref.ref(label), weakref.ref(total)]
    total.backward()
    del logits, label, total
    assert [ref() is None for ref in left] == [True] * 3


def test_a_step_without_its_backward_pass_leaves_nothing_behind(no_collector):
    loss, label = make_loss("nacl"), torch.zeros(2, 6, 7, dtype=torch.long)
    logits = torch.randn(2, 3, 6, 7, requires_grad=True) * 1.0
    left = [weakref.ref(logits), weakref.ref(label)]
    loss(logits, label)
    del logits, label
    assert [ref() is None for ref in left] == [True] * 2
