"""Kernel-density calibration of a network's probabilities, before they teach another network."""

from __future__ import annotations

import torch
from torch import Tensor

from densecal.checks import check_positive

__all__ = ["kde_soft_label"]


def kde_soft_label(probs: Tensor, key_probs: Tensor, key_labels: Tensor, *, bandwidth: float = 0.01) -> Tensor:
    r"""What was true where the network said something alike: a kernel regression of labels on probabilities, on the simplex.

    .. math:: q(x) = \frac{\sum_k w_k(x)\, y_k}{\sum_k w_k(x)}, \quad w_k(x) = \mathrm{Dirichlet}(p(x) \mid p_k / h + 1)

    Computed in logarithms, where a density neither overflows nor vanishes. The result is a soft label; to teach with it, pass its logarithm as the side
    input ``teacher_logits`` of :class:`densecal.targets.TeacherTarget`.

    Args:
        probs: The network's probabilities ``(N, C, *spatial)``, which sum to 1 over C. What stands at ignored pixels plays no part elsewhere.
        key_probs: Its probabilities at K pixels whose labels are known ``(K, C)``.
        key_labels: Those labels, one-hot or soft, ``(K, C)``.
        bandwidth: Width h of the kernel, > 0; small follows the nearest keys. At 0.01 single precision is good for four digits.

    Returns:
        ``(N, C, *spatial)`` of the dtype of ``probs``, sums to 1 over C.

    Raises:
        ValueError: If ``bandwidth`` is not positive or the keys are not ``(K, C)`` with at least one key.

    Reference:
        Popordanoska et al., "A Consistent and Differentiable Lp Canonical Calibration Error Estimator", NeurIPS 2022; used before distillation by Wang
        et al., "Dice Semimetric Losses", MICCAI 2023, arXiv:2303.16296.

    Example:
        >>> keys = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])  # of two pixels given 0.9, one was right
        >>> kde_soft_label(torch.tensor([[[0.9], [0.1]]]), keys, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))[0, :, 0]
        tensor([0.5000, 0.5000])
    """
    check_positive("bandwidth", bandwidth)
    num_classes = probs.shape[1]
    if key_probs.ndim != 2 or key_probs.shape != key_labels.shape or key_probs.shape[1] != num_classes or key_probs.shape[0] == 0:
        raise ValueError(
            f"Expected `key_probs` and `key_labels` of shape (K, C) with C = {num_classes}, but got {tuple(key_probs.shape)} and {tuple(key_labels.shape)}."
        )
    # alpha - 1, so that the log density is a sum of products with log p and the logarithm of the normaliser.
    strength = key_probs.to(probs.dtype) / bandwidth
    normaliser = torch.lgamma(strength.sum(dim=1) + num_classes) - torch.lgamma(strength + 1.0).sum(dim=1)
    log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    per_key = (1, -1, *[1] * (probs.ndim - 2))
    log_density = normaliser.reshape(per_key)
    for c in range(num_classes):
        log_density = log_density + strength[:, c].reshape(per_key) * log_probs.narrow(1, c, 1)
    weights = log_density.softmax(dim=1)  # (N, K, *spatial)
    labels = key_labels.to(probs.dtype)
    return torch.stack([(weights * labels[:, c].reshape(per_key)).sum(dim=1) for c in range(num_classes)], dim=1)
