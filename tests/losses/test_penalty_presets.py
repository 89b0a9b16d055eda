"""The penalties as losses, by hand; the promises that every preset keeps are in test_presets.py."""

import pytest
import torch
from cases import make_case

import densecal
from densecal.losses import ACLSLoss, ConfidencePenaltyLoss, MaxSupLoss, MbLSLoss

LOGITS, LABELS = torch.tensor([[[4.0], [0.0]]]), torch.tensor([[0]])
CE = torch.nn.functional.cross_entropy(LOGITS, LABELS)


def test_presets_by_hand():
    torch.testing.assert_close(MbLSLoss(margin=1.0)(LOGITS, LABELS), CE + 0.1 * 3 / 2)
    torch.testing.assert_close(MbLSLoss(margin=1.0, squared=True, weight=0.2)(LOGITS, LABELS), CE + 0.2 * 9 / 2)
    torch.testing.assert_close(ACLSLoss(margin=1.0)(LOGITS, LABELS), CE + 0.1 * (9 + 0.1 * 9))
    torch.testing.assert_close(ACLSLoss(margin=1.0, weight_largest=0.0, weight_others=2.0)(LOGITS, LABELS), CE + 0.1 * 2 * 9)
    torch.testing.assert_close(MaxSupLoss(weight=0.5)(LOGITS, LABELS), CE + 0.5 * 2)
    p = torch.tensor([4.0, 0.0]).softmax(0)
    torch.testing.assert_close(ConfidencePenaltyLoss(weight=0.5)(LOGITS, LABELS), CE + 0.5 * (p * p.log()).sum())


@pytest.mark.parametrize("name", ["mbls", "acls", "confidence_penalty", "maxsup"])
def test_weight_zero_is_cross_entropy_and_reduction_none_is_per_pixel(name):
    case = make_case((5, 7))
    plain, loss = densecal.create_loss("ce", reduction="none"), densecal.create_loss(name, weight=0.0, reduction="none")
    torch.testing.assert_close(loss(case.logits, case.label_map), plain(case.logits, case.label_map))
    values = densecal.create_loss(name, reduction="none")(case.logits, case.label_map)
    torch.testing.assert_close(values.sum() / case.valid.sum(), densecal.create_loss(name)(case.logits, case.label_map))


def test_max_suppression_grows_from_a_tenth_to_a_fifth():
    loss = MaxSupLoss()
    for epoch, weight in ((0, 0.1), (5, 0.15), (10, 0.2)):
        loss.on_epoch(epoch, 11)
        torch.testing.assert_close(loss(LOGITS, LABELS), CE + weight * 2)
