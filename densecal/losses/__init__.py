"""What users import: losses by the names people know, and the parts to compose others.

Each is an ``nn.Module`` with ``forward(logits, target) -> Tensor``, so it drops into MONAI, Lightning, smp or a bare loop.
"""

from densecal.losses.acls import ACLSLoss
from densecal.losses.aslp import ASLPLoss
from densecal.losses.boundary_smoothing import BoundarySmoothingLoss
from densecal.losses.compound import CompoundLoss
from densecal.losses.confidence_penalty import ConfidencePenaltyLoss
from densecal.losses.crac import CRaCLoss
from densecal.losses.deep_supervision import DeepSupervisionLoss
from densecal.losses.distillation import DistillationLoss
from densecal.losses.focal import DualFocalLoss, FocalLoss
from densecal.losses.kl import KLLoss
from densecal.losses.ldr import LDRLoss
from densecal.losses.maxsup import MaxSupLoss
from densecal.losses.mbls import MbLSLoss
from densecal.losses.ml1_ace import ML1ACELoss
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
from densecal.losses.recommended import RecommendedLoss

__all__ = [
    "ACLSLoss",
    "ASLPLoss",
    "BoundarySmoothingLoss",
    "CRaCLoss",
    "CompoundLoss",
    "ConfidencePenaltyLoss",
    "CrossEntropyLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceSemimetricLoss",
    "DistillationLoss",
    "DualFocalLoss",
    "FocalLoss",
    "JaccardMetricLoss",
    "KLLoss",
    "LDRLoss",
    "LabelSmoothingLoss",
    "ML1ACELoss",
    "MaxSupLoss",
    "MbLSLoss",
    "NACLLoss",
    "OnlineLabelSmoothingLoss",
    "RecommendedLoss",
    "SVLSLoss",
]
