"""What every registered term keeps, whether or not a preset has it: copies, gradients, ignored pixels, compilation."""

import copy
import inspect
import pickle

import pytest
import torch
from cases import each_dimension, make_case
from losses_by_name import evaluate

from densecal.losses import CompoundLoss
from densecal.registry import TERMS
from densecal.targets import OneHotTarget

each_term = pytest.mark.parametrize("name", TERMS.list())


def make(name: str) -> CompoundLoss:
    options = {"num_classes": 3} if "num_classes" in inspect.signature(TERMS[name]).parameters else {}
    return CompoundLoss(OneHotTarget(), {name: {"weight": 1.0, "term": TERMS.create(name, **options)}})


@each_term
@each_dimension
def test_gradient_is_right_and_zero_at_ignored_pixels(name, spatial):
    case = make_case(spatial, seed=3)
    loss = make(name).double()
    logits = (6 * case.logits).requires_grad_()  # wide enough for margins of 10
    evaluate(loss, logits, case.label_map).backward()
    assert logits.grad is not None
    assert logits.grad.any()
    assert not logits.grad.movedim(1, -1)[~case.valid].any()
    if spatial == (7,) and name != "acls":  # it holds the largest logit fixed, so its gradient is none of a difference quotient
        assert torch.autograd.gradcheck(lambda z: evaluate(loss, z, case.label_map), logits.detach().requires_grad_())


@each_term
def test_copies_give_the_same(name):
    case = make_case((5, 7))
    loss = make(name)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(evaluate(twin.eval(), case.logits, case.label_map), evaluate(loss.eval(), case.logits, case.label_map))


@each_term
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    case = make_case((5, 7), dtype=torch.float32)
    loss = make(name).eval()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, case.logits, case.label_map), evaluate(loss, case.logits, case.label_map))
