"""How a loss chooses who computes it, where there are no kernels; :mod:`tests.ops.triton` has the rest."""

import sys

import pytest
import torch
from cases import make_case
from losses_by_name import NAMES, evaluate, make_loss

from densecal.losses import CompoundLoss, CrossEntropyLoss
from densecal.ops import backend
from densecal.targets import OneHotTarget
from densecal.targets.one_hot import LabelMap
from densecal.terms import CrossEntropy


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_hands_its_backend_on(name):
    loss = make_loss(name, backend="torch")
    assert loss.backend == "torch"
    assert make_loss(name).backend == "auto"
    case = make_case((7,))
    assert torch.equal(evaluate(loss, case.logits, case.label_map), evaluate(make_loss(name), case.logits, case.label_map))


def test_backend_is_checked_when_the_loss_is_built():
    with pytest.raises(ValueError, match=r"Expected `backend` to be one of \('auto', 'torch', 'triton'\), but got 'cuda'"):
        CompoundLoss(OneHotTarget(), {"ce": {"term": CrossEntropy()}}, backend="cuda")


@pytest.mark.skipif(backend.why_not_triton(torch.device("cpu")) is None, reason="Triton interprets in this process")
def test_triton_on_a_cpu_is_one_clear_error():
    case = make_case((7,))
    with pytest.raises(ValueError, match=r"for backend='triton', but .*Use backend='auto' or 'torch'\."):
        CrossEntropyLoss(backend="triton")(case.logits, case.label_map)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "densecal.ops.triton.label_losses", raising=False)
    backend._import_error.cache_clear()
    try:
        assert "Triton cannot be imported" in backend.why_not_triton(torch.device("cuda"))
    finally:
        backend._import_error.cache_clear()


def test_labels_are_read_when_somebody_asks(monkeypatch):
    monkeypatch.setattr("densecal.targets.one_hot.may_look", lambda tensor: False)  # as on a GPU
    labels = LabelMap(torch.tensor([[0, 255]], dtype=torch.uint8), 3, 255)
    assert labels._read is None
    assert labels.valid.tolist() == [[True, False]]
    assert labels.classes is labels.classes
