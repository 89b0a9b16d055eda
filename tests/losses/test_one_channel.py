"""One channel z under a sigmoid and two, -z/2 and z/2, under a softmax are the same model: so are losses that treat both classes alike."""

import pytest
import torch
from losses_by_name import NAMES, make_loss, side_inputs

from densecal.ops import outcome_logits

NOT_ALIKE = {"dice_ce", "distillation", "dml", "jml", "ml1_ace", "crac", "nacl", "online_label_smoothing", "recommended"}
"""Overlap, calibration and constraints of the foreground alone; a distance summed over channels; a table of several classes."""


@pytest.mark.parametrize("name", sorted({*NAMES} - NOT_ALIKE))
@pytest.mark.parametrize("spatial", [(6, 7), (4, 3, 5)], ids=["2d", "3d"])
def test_one_channel_is_two(name, spatial):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1, *spatial, generator=generator, dtype=torch.float64, requires_grad=True)
    label = (torch.rand(2, 1, *spatial, generator=generator) < 0.4).long()
    label[:, :, 0] = 255
    inside, outside = outcome_logits(z, "sigmoid").unbind(1)
    torch.testing.assert_close(inside, z / 2)
    losses, gradients = [], []
    for logits, options in ((z, {"num_classes": 1, "activation": "sigmoid"}), (torch.cat([outside, inside], 1), {"num_classes": 2})):
        loss = make_loss(name, ignore_index=255, **options)
        value = loss(logits, label, context=side_inputs(loss, logits))
        losses.append(value)
        gradients.append(torch.autograd.grad(value, z)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [1, 3])
def test_every_loss_but_one_takes_regions(name, regions):
    """``online_label_smoothing`` spreads over the other classes, of which a region has none."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, regions, 6, 7, generator=generator, requires_grad=True)
    label = (torch.rand(2, regions, 6, 7, generator=generator) < 0.4).int()
    label[:, :, 0] = 255
    if name == "online_label_smoothing":
        with pytest.raises(ValueError, match=r"no other class to smooth towards|Expected an integer label map"):
            make_loss(name, num_classes=regions)(logits, label)
        return
    loss = make_loss(name, num_classes=regions, activation="sigmoid", ignore_index=255)
    loss(logits, label, context=side_inputs(loss, logits)).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, :, 0] == 0).all()
    assert (logits.grad[:, :, 1:] != 0).any()
