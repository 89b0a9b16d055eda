"""Penalties on logits and their schedules against the authors' numbers."""

from __future__ import annotations

import math

import pytest
import torch
from golden import check, handles, ignore, labels_of, with_spatial
from torch.nn import functional as F

from densecal.losses import ACLSLoss, CompoundLoss, ConfidencePenaltyLoss, MaxSupLoss, MbLSLoss
from densecal.schedules import Add, Linear, Multiply, Schedule
from densecal.targets import OneHotTarget
from densecal.terms import CrossEntropy, LogitPenalty, MarginalL1ACE, NeighbourConstraint
from densecal.terms.crac import constraint_penalty, constraint_slope


@handles("mbls", "mbls_ignore")
def mbls(case, tensors):
    params = case["params"]
    loss = MbLSLoss(weight=params["alpha"], margin=params["margin"], ignore_index=ignore(case))
    check(case, tensors, loss, labels_of(tensors))
    parts = loss.terms(with_spatial(tensors["logits"]).double(), labels_of(tensors))
    assert parts["ce"].item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)
    assert parts["mbls"].item() == pytest.approx(case["results"]["penalty"], rel=1e-6)


@handles("mbls_alpha_schedule")
def mbls_alpha_schedule(case, tensors):
    params = case["params"]
    start, mu, maximum = params["alpha"], params.get("mu", 0.0), params.get("max_alpha", math.inf)
    schedule: float | Schedule = {
        "": start,
        "add": Add(start, mu, maximum=maximum),
        "multiply": Multiply(start, mu or 1.0, maximum=maximum),
        "step": Multiply(start, mu or 1.0, every=params.get("step_size", 100), maximum=maximum),
    }[params["schedule"]]
    loss = MbLSLoss(weight=schedule)
    weights = []
    for epoch in range(len(tensors["alpha"])):
        loss.on_epoch(epoch, len(tensors["alpha"]))
        weights.append(float(loss.weights["mbls"]))
    torch.testing.assert_close(torch.tensor(weights), tensors["alpha"], rtol=1e-5, atol=0)


@handles("maxsup", "maxsup_lt")
def maxsup(case, tensors):
    """Two conventions: the end is reached one epoch after the last, or in the last."""
    params = case["params"]
    until = 1.0 if case["stratum"] == "maxsup" else None
    schedule = Linear(params.get("begin_lambda", 0.1), params.get("end_lambda", 0.2), until=until)
    assert schedule(params["epoch"], params["epochs"]) == pytest.approx(params["weight"], rel=1e-12)
    loss = MaxSupLoss(weight=schedule, ignore_index=ignore(case))
    loss.on_epoch(params["epoch"], params["epochs"])
    check(case, tensors, loss, labels_of(tensors))


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


@handles("ml1_ace")
def ml1_ace(case, tensors):
    params = case["params"]
    target = tensors["soft_labels"] if params["soft_target"] else labels_of(tensors)
    if params["activation"] == "sigmoid" and not params["soft_target"]:
        target = F.one_hot(target, tensors["logits"].shape[1]).movedim(-1, 1)
    term = MarginalL1ACE(
        num_bins=params["num_bins"],
        include_background=params.get("include_background", True),
        class_weights=params.get("weight"),
        reduction="none" if "per_class" in tensors else "mean",
    )
    loss = CompoundLoss(OneHotTarget(activation=params["activation"], ignore_index=ignore(case)), {"ml1_ace": {"weight": 1.0, "term": term}})
    if "per_class" in tensors:
        values = loss(tensors["logits"].double(), target)
        torch.testing.assert_close(values, tensors["per_class"].double().flatten(1), rtol=0, atol=1e-6)
        assert values.mean().item() == pytest.approx(case["results"]["loss"], rel=1e-6)
        return
    # The published gradient is single precision; so are the probabilities that its binning saw.
    check(case, tensors, loss, target, gradient=False)
    logits = tensors["logits"].detach().double().requires_grad_()
    loss(logits, target).backward()
    torch.testing.assert_close(logits.grad, tensors["grad"].double(), rtol=0, atol=1e-4 * tensors["grad"].abs().max().item())


@handles("crac_penalty")
def crac_penalty(case, tensors):
    for dtype in (torch.float64, torch.float32):
        gap = tensors["h"].to(dtype).unsqueeze(1).requires_grad_()
        lam, rho = tensors["lam"].to(dtype), tensors["rho"].to(dtype)
        value = constraint_penalty(gap, lam, rho, case["params"]["penalty"])
        slope = constraint_slope(gap, lam, rho, case["params"]["penalty"])
        torch.testing.assert_close(value, tensors["value"].to(dtype), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(slope, tensors["derivative"].to(dtype), rtol=1e-5, atol=1e-9)
        (by_autograd,) = torch.autograd.grad(value.sum(), gap)
        torch.testing.assert_close(by_autograd, slope.sum(1, keepdim=True))


def crac_loss(case, tensors):
    params = case["params"]
    per_region = "region" in tensors
    classes = tensors["train_logits"].shape[2]
    term = NeighbourConstraint(
        num_classes=classes,
        margin=params["margin"],
        penalty=params["penalty"],
        constraint={"abs": "abs", "max": "relu"}[params.get("constr_type", "abs")],
        per_class=tensors["lam"].shape[1] > 1,
        per_region=per_region,
        acts_on="probs" if params.get("is_softmax") else "logits",
        border="background",
        multiplier_min=params["lambd_min"],
        multiplier_max=params["lambd_max"],
        rho=params["rho_min"],
        rho_max=params["rho_max"],
        rho_growth=params.get("gamma", 1.2),
        rho_every=params["rho_step"],
        progress=params.get("tao", 0.9),
    )
    return term, CompoundLoss(OneHotTarget(ignore_index=ignore(case)), {"crac": {"weight": 1.0, "term": term}})


@handles("crac_single", "crac_boundary_corrected", "crac_class")
def crac(case, tensors):
    """Penalty, gradient and multipliers over the epochs.

    The published multipliers per class are weighed by the class's rarity in validation: there, each epoch starts with the published ones.
    """
    term, loss = crac_loss(case, tensors)
    weighed = case["stratum"] == "crac_class"
    for epoch, (logits, labels) in enumerate(zip(tensors["train_logits"], tensors["train_labels"].long(), strict=True)):
        if weighed:
            term.multiplier.copy_(tensors["lam"][epoch].view_as(term.multiplier))
        torch.testing.assert_close(term.multiplier.flatten(), tensors["lam"][epoch], rtol=1e-5, atol=0)
        torch.testing.assert_close(term.rho.flatten(), tensors["rho"][epoch], rtol=1e-5, atol=0)
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
            leaf = logits.to(dtype, copy=True).requires_grad_()
            value = loss(leaf, labels)
            value.backward()
            # The published multipliers are single precision.
            assert value.item() == pytest.approx(case["results"][f"penalty_epoch{epoch}"], rel=1e-5)
            published = tensors["train_grad"][epoch].to(dtype)
            torch.testing.assert_close(leaf.grad, published, rtol=0, atol=tolerance * published.abs().max().item())
        batches = list(zip(tensors["val_logits"][epoch].double(), tensors["val_labels"][epoch].long(), strict=True))
        for batch in batches:
            loss.on_validation_batch(*batch)
        loss.on_validation({})
        if weighed:
            # Inverse frequencies in validation, normalised.
            weights = 1 / torch.bincount(torch.cat([labels.flatten() for _, labels in batches]), minlength=term.num_classes)
            term.multiplier.mul_(weights / weights.sum())
            torch.testing.assert_close(term.multiplier.flatten(), tensors["lam"][epoch + 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(term.rho.flatten(), tensors["rho"][-1], rtol=1e-5, atol=0)
