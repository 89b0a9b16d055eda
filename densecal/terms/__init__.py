"""Logits and a target -> a scalar: comparisons and penalties, all with one interface, so that any mix works."""

from densecal.terms.acls import AdaptiveConditionalMargin
from densecal.terms.base import PixelPenalty, PixelTerm, Term
from densecal.terms.bootstrapped import BootstrappedCrossEntropy
from densecal.terms.crac import NeighbourConstraint
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.entropy import NegativeEntropy
from densecal.terms.erf_gaussian import ErfGaussianPenalty
from densecal.terms.focal import DualFocal, Focal, focal_cross_entropy
from densecal.terms.kl import KLDivergence, kl_divergence
from densecal.terms.ldr import LDRKL, ldr_kl
from densecal.terms.logit_penalty import LogitPenalty
from densecal.terms.maxsup import MaxSuppression
from densecal.terms.mbls import LogitMargin
from densecal.terms.ml1_ace import MarginalL1ACE
from densecal.terms.neighbour import NeighbourPenalty
from densecal.terms.online_label_smoothing import OnlineLabelSmoothing
from densecal.terms.overlap import DiceSemimetric, JaccardMetric, Overlap
from densecal.terms.sc_bce import SCBCE

__all__ = [
    "LDRKL",
    "SCBCE",
    "AdaptiveConditionalMargin",
    "BootstrappedCrossEntropy",
    "CrossEntropy",
    "DiceSemimetric",
    "DualFocal",
    "ErfGaussianPenalty",
    "Focal",
    "JaccardMetric",
    "KLDivergence",
    "LogitMargin",
    "LogitPenalty",
    "MarginalL1ACE",
    "MaxSuppression",
    "NegativeEntropy",
    "NeighbourConstraint",
    "NeighbourPenalty",
    "OnlineLabelSmoothing",
    "Overlap",
    "PixelPenalty",
    "PixelTerm",
    "Term",
    "focal_cross_entropy",
    "kl_divergence",
    "ldr_kl",
]
