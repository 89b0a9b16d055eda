"""Numerics without ``nn.Module``: tensors and keyword options in, tensors out. No state, no device moves, no logging."""

from densecal.ops.activation import Activation, outcome_logits, probabilities
from densecal.ops.boundary import boundary_region
from densecal.ops.neighbourhood import Border, Kernel, gaussian_kernel, mean_kernel, normalized_convolution, svls_kernel
from densecal.ops.overlap import overlap_sums, tversky_score
from densecal.ops.reduction import Reduction, reduce
from densecal.ops.soft_cross_entropy import soft_cross_entropy, uniform_cross_entropy

__all__ = [
    "Activation",
    "Border",
    "Kernel",
    "Reduction",
    "boundary_region",
    "gaussian_kernel",
    "mean_kernel",
    "normalized_convolution",
    "outcome_logits",
    "overlap_sums",
    "probabilities",
    "reduce",
    "soft_cross_entropy",
    "svls_kernel",
    "tversky_score",
    "uniform_cross_entropy",
]
