"""Logits and a target -> a scalar: comparisons and penalties, all with one interface, so that any mix works."""

from densecal.terms.base import Term
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.neighbour import NeighbourPenalty
from densecal.terms.overlap import DiceSemimetric, JaccardMetric, Overlap

__all__ = ["CrossEntropy", "DiceSemimetric", "JaccardMetric", "NeighbourPenalty", "Overlap", "Term"]
