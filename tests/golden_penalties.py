"""Penalties on logits and their schedules against the authors' numbers."""

from __future__ import annotations

import pytest
from golden import check, handles, ignore, labels_of, with_spatial

from densecal.losses import ACLSLoss, CompoundLoss, ConfidencePenaltyLoss, MbLSLoss
from densecal.targets import OneHotTarget
from densecal.terms import CrossEntropy, LogitPenalty


@handles("mbls", "mbls_ignore")
def mbls(case, tensors):
    params = case["params"]
    loss = MbLSLoss(weight=params["alpha"], margin=params["margin"], ignore_index=ignore(case))
    check(case, tensors, loss, labels_of(tensors))
    parts = loss.terms(with_spatial(tensors["logits"]).double(), labels_of(tensors))
    assert parts["ce"].item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)
    assert parts["mbls"].item() == pytest.approx(case["results"]["penalty"], rel=1e-6)


@handles("acls")
def acls(case, tensors):
    params = case["params"]
    loss = ACLSLoss(weight=params["alpha"], weight_largest=params["pos_lambda"], weight_others=params["neg_lambda"], margin=params["margin"])
    check(case, tensors, loss, labels_of(tensors))
    parts = loss.terms(with_spatial(tensors["logits"]).double(), labels_of(tensors))
    assert parts["ce"].item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)
    assert parts["acls"].item() == pytest.approx(case["results"]["penalty"], rel=1e-6)


@handles("confidence_penalty")
def confidence_penalty(case, tensors):
    """The published entropy is a mean over the C classes too, so the weight is C times smaller."""
    classes = tensors["logits"].shape[1]
    loss = ConfidencePenaltyLoss(weight=case["params"]["alpha"] / classes, ignore_index=ignore(case))
    check(case, tensors, loss, labels_of(tensors))
    parts = loss.terms(with_spatial(tensors["logits"]).double(), labels_of(tensors))
    assert parts["ce"].item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)
    assert -parts["entropy"].item() / classes == pytest.approx(case["results"]["entropy_mean"], rel=1e-6)


@handles("logit_penalty")
def logit_penalty(case, tensors):
    """The published weight multiplies the cross-entropy too."""
    weight, beta = case["params"]["weight"], case["params"]["beta"]
    terms = {"ce": {"weight": weight, "term": CrossEntropy()}, "logit_penalty": {"weight": weight * beta, "term": LogitPenalty()}}
    check(case, tensors, CompoundLoss(OneHotTarget(ignore_index=ignore(case)), terms), labels_of(tensors))
