"""Perturbed labels, per-image terms and the levels of ASLP against the authors' numbers."""

from __future__ import annotations

from unittest.mock import patch

import torch
from golden import check, handles
from torch import nn

from densecal.losses import ASLPLoss
from densecal.perturbation import drawn_share, image_sums, perturb_labels


def names(count: int) -> list[str]:
    return [f"image {n}" for n in range(count)]


@handles("aslp_perturbation")
def perturbation(case, tensors):
    labels, beta, draw = tensors["labels"].float(), case["params"]["beta"], tensors["u"]
    shares = drawn_share(tensors["alpha"], beta, draw).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(perturb_labels(labels, shares, activation="sigmoid"), tensors["target"], rtol=0, atol=1e-6)
    torch.testing.assert_close(perturb_labels(labels, beta, activation="sigmoid"), tensors["target_all_perturbed"], rtol=0, atol=1e-6)

    class Drawn(nn.Module):
        """The loss in training, at the case's levels and with its draws."""

        def __init__(self) -> None:
            super().__init__()
            self.loss = ASLPLoss(case_ids=names(len(draw)), beta=beta, expected=False, activation="sigmoid")
            self.loss.target.alpha.copy_(tensors["alpha"])

        def forward(self, logits, target):
            with patch("torch.rand", return_value=draw):
                return self.loss(logits, target, context={"case_id": names(len(draw))})

    check(case, tensors, Drawn(), tensors["labels"].long())


@handles("aslp_per_image_terms")
def per_image_terms(case, tensors):
    """Not the accuracy and the mean prediction, which the published code takes of probabilities stretched to [0, 1]."""
    labels = tensors["labels"]
    valid = torch.ones_like(labels[:, 0], dtype=torch.bool)
    sums = image_sums(tensors["logits"], labels.float(), valid, activation="sigmoid")
    for column, name in enumerate(("bce", "cal")):
        torch.testing.assert_close((sums[:, column] / sums[:, 3]).float(), tensors[name], rtol=1e-5, atol=1e-6)


@handles("aslp_alpha_update")
def alpha_update(case, tensors):
    """Twelve epochs of the loss, from the fourth (counted from 1) on, with the published terms of each image; the accuracy of each step is told before it.

    The terms themselves are held to the published ones more loosely: single precision rounds 1 - p there, which is what a logarithm is taken of.
    """
    params, images, labels = case["params"], names(tensors["labels"].shape[0]), tensors["labels"].long()
    loss = ASLPLoss(case_ids=images, beta=params["beta"], eta=params["eta"], accuracy_weight=params["lbd"], activation="sigmoid")
    loss.target.alpha.copy_(tensors["alpha"][0])
    for step, logits in enumerate(tensors["logits"]):
        bce, cal = tensors["bce"][step], tensors["cal"][step]
        sums = image_sums(logits, labels.float(), torch.ones_like(labels[:, 0], dtype=torch.bool), activation="sigmoid")
        torch.testing.assert_close(sums[:, :2] / sums[:, 3:], torch.stack([bce, cal], 1).double(), rtol=2e-3, atol=1e-5)
        published = torch.stack([bce, cal, torch.ones_like(bce), torch.ones_like(bce)], 1).double()
        loss.on_epoch(step + 3, 30)
        with patch("densecal.perturbation.adaptive.image_sums", return_value=published):
            loss(logits, labels, context={"case_id": images})
        loss.on_validation({"accuracy": tensors["accuracy"][step].item()})
        loss.on_epoch_end()
        torch.testing.assert_close(loss.target.alpha, tensors["alpha"][step + 1], rtol=1e-5, atol=2e-7)
