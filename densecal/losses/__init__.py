"""What users import: losses by the names people know, and the parts to compose others.

Each is an ``nn.Module`` with ``forward(logits, target) -> Tensor``, so it drops into MONAI, Lightning, smp or a bare loop.
"""

from densecal.losses.boundary_smoothing import BoundarySmoothingLoss
from densecal.losses.compound import CompoundLoss
from densecal.losses.deep_supervision import DeepSupervisionLoss
from densecal.losses.focal import DualFocalLoss, FocalLoss
from densecal.losses.kl import KLLoss
from densecal.losses.ldr import LDRLoss
from densecal.losses.online_label_smoothing import OnlineLabelSmoothingLoss
from densecal.losses.presets import (
    CrossEntropyLoss,
    DiceCELoss,
    DiceSemimetricLoss,
    JaccardMetricLoss,
    LabelSmoothingLoss,
    NACLLoss,
    SVLSLoss,
)

__all__ = [
    "BoundarySmoothingLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceSemimetricLoss",
    "DualFocalLoss",
    "FocalLoss",
    "JaccardMetricLoss",
    "KLLoss",
    "LDRLoss",
    "LabelSmoothingLoss",
    "NACLLoss",
    "OnlineLabelSmoothingLoss",
    "SVLSLoss",
]
