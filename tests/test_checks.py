"""What losses and metrics say to something that is no tensor."""

import numpy as np
import pytest
import torch

from densecal.losses import SVLSLoss
from densecal.metrics import ExpectedCalibrationError

LOGITS, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        ([LOGITS, LOGITS[..., ::2, ::2]], LABELS, "Expected a tensor, but got list. Hand a network's several outputs to `DeepSupervisionLoss`"),
        ({"out": LOGITS, "aux": LOGITS}, LABELS, r"Expected a tensor, but got dict. Take the tensor out of it, by one of its keys \['out', 'aux'\]"),
        (LOGITS, LABELS.numpy(), r"Expected a tensor, but got ndarray. Make it one with `torch.as_tensor`"),
        (None, LABELS, "Expected a tensor, but got NoneType"),
    ],
    ids=["outputs", "dict", "numpy", "nothing"],
)
@pytest.mark.parametrize("use", [SVLSLoss(), ExpectedCalibrationError().update], ids=["loss", "metric"])
def test_what_is_no_tensor_is_named(use, logits, label, message):
    with pytest.raises(TypeError, match=message):
        use(logits, label)


def test_a_subclass_is_a_tensor():
    class Named(torch.Tensor):
        pass

    plain = SVLSLoss()(LOGITS, LABELS)
    assert torch.equal(SVLSLoss()(LOGITS.as_subclass(Named), torch.from_numpy(np.asarray(LABELS)).as_subclass(Named)), plain)
    assert type(SVLSLoss()(LOGITS.as_subclass(Named), LABELS)) is torch.Tensor
