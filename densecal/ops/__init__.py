"""Numerics without ``nn.Module``: tensors and keyword options in, tensors out. No state, no device moves, no logging."""

from densecal.ops.activation import Activation, logits_from_probabilities, most_probable, outcome_logits, probabilities
from densecal.ops.beta_mixture import beta_mixture_posterior, fit_beta_mixture
from densecal.ops.boundary import boundary_region, face_boundary, window_maximum
from densecal.ops.distance import nearest_distance
from densecal.ops.guided_neighbourhood import Similarity, guided_convolution
from densecal.ops.label_losses import label_losses
from densecal.ops.neighbourhood import Border, Kernel, gaussian_kernel, mean_kernel, normalized_convolution, svls_kernel
from densecal.ops.overlap import overlap_sums, tversky_score
from densecal.ops.ranks import sum_over_ranks
from densecal.ops.reduction import Reduction, reduce
from densecal.ops.region_maps import region_maps
from densecal.ops.soft_cross_entropy import soft_cross_entropy, uniform_cross_entropy

__all__ = [
    "Activation",
    "Border",
    "Kernel",
    "Reduction",
    "Similarity",
    "beta_mixture_posterior",
    "boundary_region",
    "face_boundary",
    "fit_beta_mixture",
    "gaussian_kernel",
    "guided_convolution",
    "label_losses",
    "logits_from_probabilities",
    "mean_kernel",
    "most_probable",
    "nearest_distance",
    "normalized_convolution",
    "outcome_logits",
    "overlap_sums",
    "probabilities",
    "reduce",
    "region_maps",
    "soft_cross_entropy",
    "sum_over_ranks",
    "svls_kernel",
    "tversky_score",
    "uniform_cross_entropy",
    "window_maximum",
]
