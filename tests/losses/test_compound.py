"""The composition itself: one target, named parts, side inputs, hooks, errors."""

import pytest
import torch
from cases import make_case

from densecal.losses import CompoundLoss, SVLSLoss
from densecal.targets import OneHotTarget, SVLSTarget, Target, one_hot_target
from densecal.terms import CrossEntropy, DiceSemimetric, Term


class Probe(Term):
    """Keeps what it was given."""

    needs = ("image",)

    def forward(self, logits, target, *, context=None):
        self.seen = (target, context)
        return logits.mean()

    def on_epoch(self, epoch, max_epochs):
        self.epoch = (epoch, max_epochs)

    def on_validation(self, stats):
        self.stats = stats


class CountingTarget(Target):
    """Counts how often it is made, and wants something of its own."""

    needs = ("case_id",)
    made = 0

    def forward(self, label, num_classes, *, spatial_dims=None, dtype=torch.float32, context=None):
        self.made += 1
        self.context = context
        return one_hot_target(label, num_classes, spatial_dims=spatial_dims, dtype=dtype)


def test_loss_is_the_weighted_sum_of_its_parts():
    case = make_case((5, 7))
    loss = CompoundLoss(SVLSTarget(), {"ce": {"weight": 0.25, "term": CrossEntropy()}, "dml": {"weight": 0.75, "term": DiceSemimetric()}})
    parts = loss.terms(case.logits, case.label_map)
    torch.testing.assert_close(loss(case.logits, case.label_map), 0.25 * parts["ce"] + 0.75 * parts["dml"])
    torch.testing.assert_close(parts["ce"], SVLSLoss()(case.logits, case.label_map))


def test_one_target_is_made_and_each_part_sees_only_what_it_declared():
    case = make_case((5, 7))
    target, first, second = CountingTarget(), Probe(), Probe()
    loss = CompoundLoss(target, {"first": {"weight": 1.0, "term": first}, "second": {"weight": 1.0, "term": second}})
    assert loss.needs == ("case_id", "image")
    loss(case.logits, case.label_map, context={"image": 1, "case_id": 2, "spacing": 3})
    assert target.made == 1
    assert target.context == {"case_id": 2}
    assert first.seen[1] == {"image": 1}
    assert first.seen[0] is second.seen[0]


def test_missing_side_input_is_named():
    case = make_case((5, 7))
    loss = CompoundLoss(OneHotTarget(), {"probe": {"weight": 1.0, "term": Probe()}})
    with pytest.raises(ValueError, match=r"Expected the side input 'image', which Probe needs, but got \['spacing'\]"):
        loss(case.logits, case.label_map, context={"spacing": 1})


def test_hooks_reach_the_parts():
    probe = Probe()
    loss = CompoundLoss(OneHotTarget(), {"probe": {"weight": 1.0, "term": probe}})
    loss.on_epoch(3, 10)
    loss.on_validation({"accuracy": 0.9})
    assert probe.epoch == (3, 10)
    assert probe.stats == {"accuracy": 0.9}


def test_ignore_index_of_the_loss_reaches_the_target():
    case = make_case((5, 7))
    loss = CompoundLoss(SVLSTarget(), {"ce": {"weight": 1.0, "term": CrossEntropy()}}, ignore_index=255)
    assert loss.ignore_index == 255
    as_255 = case.label_map.masked_fill(~case.valid, 255)
    torch.testing.assert_close(loss(case.logits, as_255), SVLSLoss()(case.logits, case.label_map))
    with pytest.raises(ValueError, match="the target ignores 7 and the loss 255"):
        CompoundLoss(OneHotTarget(ignore_index=7), {"ce": {"term": CrossEntropy()}}, ignore_index=255)


def test_soft_labels_and_their_label_map_agree():
    case = make_case((5, 7), ignored=0.0)
    one_hot = torch.nn.functional.one_hot(case.label_map, 3).movedim(-1, 1).double()
    torch.testing.assert_close(SVLSLoss()(case.logits, one_hot), SVLSLoss()(case.logits, case.label_map))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CompoundLoss(OneHotTarget(), {}), ValueError, "Expected at least one term"),
        (lambda: CompoundLoss("svls", {"ce": {"term": CrossEntropy()}}), TypeError, "Expected `target` to be a densecal.targets.Target, but got str"),
        (lambda: CompoundLoss(OneHotTarget(), {"ce": CrossEntropy()}), TypeError, "Expected the term 'ce' as"),
        (lambda: CompoundLoss(OneHotTarget(), {"ce": {"term": torch.nn.ReLU()}}), TypeError, "but got ReLU"),
        (lambda: CompoundLoss(OneHotTarget(), {"ce": {"wieght": 1, "term": CrossEntropy()}}), ValueError, "Did you mean 'weight'"),
        (
            lambda: CompoundLoss(OneHotTarget(), {"ce": {"weight": -1, "term": CrossEntropy()}}),
            ValueError,
            "Expected `terms.ce.weight` to be 0 or greater",
        ),
    ],
)
def test_wrong_compositions_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
