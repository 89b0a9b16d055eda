"""Slow references of the terms that compare prediction and target: one pixel at a time, in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reference import log_probabilities, pixels
from torch import Tensor

OfPixel = Callable[[Sequence[float], Sequence[float], Sequence[float]], float]
"""Logits, target and weights of the classes at one pixel -> value."""


def over_pixels(logits: Tensor, probs: Tensor, valid: Tensor, of_pixel: OfPixel, weights: Sequence[float] | None = None) -> float:
    """Sum over valid pixels."""
    total = 0.0
    for image, *x in pixels(logits.shape):
        if valid[(image, *x)]:
            at = (image, slice(None), *x)
            total += of_pixel(logits[at].tolist(), probs[at].tolist(), weights or [1.0] * logits.shape[1])
    return total


def over_channels(of_pixel: OfPixel) -> OfPixel:
    """The same of two outcomes, yes and no, for each channel: what sigmoid means."""

    def of_channels(z: Sequence[float], q: Sequence[float], weights: Sequence[float]) -> float:
        return sum(of_pixel([a, 0.0], [b, 1.0 - b], [w, w]) for a, b, w in zip(z, q, weights, strict=True))

    return of_channels


def focal(gamma: float, *, dual: bool = False) -> OfPixel:
    """-sum_c w_c q_c (1 - p_c + r_c)^gamma log p_c, r_c the largest probability below p_c in the dual form."""

    def of_pixel(z: Sequence[float], q: Sequence[float], weights: Sequence[float]) -> float:
        log_p = log_probabilities(z)
        p = [math.exp(v) for v in log_p]
        total = 0.0
        for c in range(len(z)):
            below = max([v for v in p if v < p[c]], default=0.0) if dual else 0.0
            total -= weights[c] * q[c] * (1 - p[c] + below) ** gamma * log_p[c]
        return total

    return of_pixel


def kl(temperature: float) -> OfPixel:
    """T^2 sum_c w_c q_c (log q_c - log softmax(z / T)_c)."""

    def of_pixel(z: Sequence[float], q: Sequence[float], weights: Sequence[float]) -> float:
        log_p = log_probabilities([v / temperature for v in z])
        return temperature**2 * sum(w * b * (math.log(b) - a) for a, b, w in zip(log_p, q, weights, strict=True) if b > 0)

    return of_pixel


def perturbed_cross_entropy(share: float) -> OfPixel:
    """Cross-entropy with (1 - s) q + s / (K - 1) (1 - q)."""

    def of_pixel(z: Sequence[float], q: Sequence[float], weights: Sequence[float]) -> float:
        log_p = log_probabilities(z)
        return -sum(w * ((1 - share) * b + share / (len(z) - 1) * (1 - b)) * a for a, b, w in zip(log_p, q, weights, strict=True))

    return of_pixel


def ldr_kl(temperature: float, margin: float, adapt: float | None = None) -> OfPixel:
    """sum_y w_y q_y lambda log(1/C sum_k exp((z_k - z_y + c_k) / lambda)), lambda of its own for each pixel and label where ``adapt`` is given."""

    def of_pixel(z: Sequence[float], q: Sequence[float], weights: Sequence[float]) -> float:
        total, c = 0.0, len(z)
        for y in range(c):
            gaps = [z[k] - z[y] + (margin if k != y else 0.0) for k in range(c)]
            own = temperature
            if adapt is not None:
                log_p = log_probabilities([g / temperature for g in gaps])
                divergence = sum(math.exp(v) * (v + math.log(c)) for v in log_p)
                own = max(1e-3 * temperature, temperature * (1 - divergence / (adapt * math.log(c))))
            largest = max(gaps)
            total += weights[y] * q[y] * (largest + own * math.log(sum(math.exp((g - largest) / own) for g in gaps) / c))
        return total

    return of_pixel


def log_beta_density(x: float, alpha: float, beta: float) -> float:
    normalizer = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    return normalizer + (alpha - 1) * math.log(x) + (beta - 1) * math.log(1 - x)


def beta_responsibility(x: float, mixture: Sequence[Sequence[float]]) -> float:
    """Probability of the second of two components (alpha, beta, weight)."""
    first, second = (w * math.exp(log_beta_density(x, a, b)) for a, b, w in mixture)
    return second / (first + second)


def fit_betas(values: Sequence[float], steps: int) -> list[list[float]]:
    """Expectation-maximisation with the method of moments."""
    mixture = [[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]]
    for _ in range(steps):
        second = [beta_responsibility(x, mixture) for x in values]
        mixture = []
        for shares in ([1 - r for r in second], second):
            total = sum(shares)
            mean = sum(r * x for r, x in zip(shares, values, strict=True)) / total
            variance = sum(r * (x - mean) ** 2 for r, x in zip(shares, values, strict=True)) / total
            size = mean * (1 - mean) / variance - 1
            mixture.append([mean * size, (1 - mean) * size, total / len(values)])
    return mixture
