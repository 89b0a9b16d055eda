r"""A mixture of two beta distributions: the losses of what is learned (small) and of what is labelled wrongly (large), scaled to (0, 1).

.. math:: f(x) = \sum_{k=0}^{1} \pi_k\, \frac{x^{\alpha_k - 1} (1 - x)^{\beta_k - 1}}{B(\alpha_k, \beta_k)}
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["beta_mixture_posterior", "fit_beta_mixture"]

EDGE = 1e-4  # values are kept this far from 0 and 1, where densities are 0 or infinite
SMALLEST_VARIANCE = 1e-5  # keeps a component from closing in on a single value; its parameters stay below 25000


def fit_beta_mixture(values: Tensor, *, steps: int = 10) -> Tensor:
    """Expectation-maximisation from two opposite ramps; parameters by the moments of each component.

    Args:
        values: ``(n,)``, n at least 1, floating; values outside (0, 1) are moved to its edges.
        steps: Number of iterations.

    Returns:
        ``(2, 3)``, float64: alpha, beta and weight of each component, the one with the smaller mean first.

    Reference:
        Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019, arXiv:1904.11238, section 3.1.

    Example:
        >>> grid = torch.linspace(0.0, 1.0, 101)
        >>> mixture = fit_beta_mixture(torch.cat([0.1 + 0.1 * grid, 0.8 + 0.1 * grid, 0.8 + 0.1 * grid]))
        >>> mixture[:, 0] / mixture[:, :2].sum(1), mixture[:, 2]  # means, weights
        (tensor([0.1500, 0.8500], dtype=torch.float64), tensor([0.3333, 0.6667], dtype=torch.float64))
    """
    x = values.double().clamp(EDGE, 1.0 - EDGE)
    mixture = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        share = _log_densities(x, mixture).softmax(dim=0).clamp_min(1e-12)  # (2, n)
        total = share.sum(dim=1)
        mean = (share * x).sum(dim=1) / total
        variance = ((share * (x - mean.unsqueeze(1)).square()).sum(dim=1) / total).clamp_min(SMALLEST_VARIANCE)
        size = (mean * (1.0 - mean) / variance - 1.0).clamp_min(1e-3)  # alpha + beta
        mixture = torch.stack([mean * size, (1.0 - mean) * size, total / total.sum()], dim=1)
    means = mixture[:, 0] / mixture[:, :2].sum(dim=1)
    return mixture[means.argsort()]


def beta_mixture_posterior(values: Tensor, mixture: Tensor) -> Tensor:
    """Probability that a value belongs to the second component, made not to fall as the value grows.

    The odds of two betas can turn once. Beyond a maximum they stay there (as the published table does), before a minimum likewise: the largest loss is
    never less suspect than a smaller one.

    Args:
        values: Any shape, floating; values outside (0, 1) are moved to its edges.
        mixture: ``(2, 3)`` of :func:`fit_beta_mixture`.

    Returns:
        Probabilities in [0, 1], same shape and dtype.

    Example:
        >>> beta_mixture_posterior(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]]))
        tensor([0.1000, 0.5000, 0.9000])
    """
    mixture = mixture.to(values.dtype)
    rise, fall = mixture[1, :2] - mixture[0, :2]
    turn = rise / torch.where(rise + fall == 0, 1.0, rise + fall)
    lowest = torch.where((rise < 0) & (fall < 0), turn, 0.0).clamp_min(EDGE)
    highest = torch.where((rise > 0) & (fall > 0), turn, 1.0).clamp_max(1.0 - EDGE)
    density = _log_densities(torch.clamp(values, min=lowest, max=highest).flatten(), mixture)
    return (density[1] - density[0]).sigmoid().reshape(values.shape)


def _log_densities(x: Tensor, mixture: Tensor) -> Tensor:
    """log(weight * density) of each component, ``(2, n)``."""
    alpha, beta, weight = mixture.unsqueeze(2).unbind(dim=1)  # each (2, 1)
    normalizer = torch.lgamma(alpha + beta) - torch.lgamma(alpha) - torch.lgamma(beta)
    return weight.log() + normalizer + (alpha - 1.0) * x.log() + (beta - 1.0) * torch.log1p(-x)
