"""Logits and a target -> a scalar: comparisons and penalties, all with one interface, so that any mix works."""

from densecal.terms.acls import AdaptiveConditionalMargin
from densecal.terms.base import PixelPenalty, Term
from densecal.terms.crac import NeighbourConstraint
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.entropy import NegativeEntropy
from densecal.terms.logit_penalty import LogitPenalty
from densecal.terms.maxsup import MaxSuppression
from densecal.terms.mbls import LogitMargin
from densecal.terms.ml1_ace import MarginalL1ACE
from densecal.terms.neighbour import NeighbourPenalty
from densecal.terms.overlap import DiceSemimetric, JaccardMetric, Overlap

__all__ = [
    "AdaptiveConditionalMargin",
    "CrossEntropy",
    "DiceSemimetric",
    "JaccardMetric",
    "LogitMargin",
    "LogitPenalty",
    "MarginalL1ACE",
    "MaxSuppression",
    "NegativeEntropy",
    "NeighbourConstraint",
    "NeighbourPenalty",
    "Overlap",
    "PixelPenalty",
    "Term",
]
