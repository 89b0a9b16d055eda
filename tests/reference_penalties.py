"""Slow references of the penalties: loops over the formulas, pixel by pixel, in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reference import log_probabilities, pixels
from torch import Tensor


def margin(z: Sequence[float], m: float, power: int = 1) -> float:
    return sum(max(0.0, max(z) - c - m) ** power for c in z) / len(z)


def acls(z: Sequence[float], m: float, first: float, second: float) -> float:
    largest = max(z)
    others = list(z)
    others.remove(largest)
    return first * max(0.0, largest - m) ** 2 + second * sum(max(0.0, largest - c - m) ** 2 for c in others) / len(others)


def maxsup(z: Sequence[float]) -> float:
    return max(z) - sum(z) / len(z)


def negative_entropy(z: Sequence[float]) -> float:
    return sum(math.exp(log_p) * log_p for log_p in log_probabilities(z))


def half_square(z: Sequence[float]) -> float:
    return sum(c * c for c in z) / 2


def mean_over_pixels(logits: Tensor, valid: Tensor, formula: Callable[[Sequence[float]], float], *, sigmoid: bool = False) -> float:
    """Mean over valid pixels of a formula of their logits; under sigmoid of its mean over channels, each a choice between z/2 and -z/2."""
    values = []
    for image, *x in pixels(logits.shape):
        if valid[(image, *x)]:
            z = logits[(image, slice(None), *x)].tolist()
            values.append(sum(formula([c / 2, -c / 2]) for c in z) / len(z) if sigmoid else formula(z))
    return sum(values) / len(values) if values else 0.0


def calibration_error(p: Sequence[float], q: Sequence[float], num_bins: int, *, soft: bool = False) -> float:
    """Mean over the bins that hold something of |mean p - mean q|."""
    sums = [[0.0, 0.0, 0.0] for _ in range(num_bins)]
    for a, b in zip(p, q, strict=True):
        if soft:
            shares = [max(0.0, 1.0 - abs(a * num_bins - (k + 0.5))) for k in range(num_bins)]
            shares = [share / sum(shares) for share in shares]
        else:
            home = max(0, min(num_bins - 1, math.ceil(a * num_bins) - 1))
            shares = [float(k == home) for k in range(num_bins)]
        for entry, share in zip(sums, shares, strict=True):
            for i, value in enumerate((1.0, a, b)):
                entry[i] += share * value
    gaps = [abs(sp - sq) / count for count, sp, sq in sums if count > 0]
    return sum(gaps) / len(gaps)


def classwise_calibration_errors(probs: Tensor, target: Tensor, valid: Tensor, num_bins: int, *, soft: bool = False) -> list[list[float]]:
    """One row per image with a valid pixel, one error per class."""
    rows = []
    for image in range(probs.shape[0]):
        at = [x for i, *x in pixels(probs.shape) if i == image and valid[(image, *x)]]
        if at:
            rows.append(
                [
                    calibration_error([probs[(image, c, *x)].item() for x in at], [target[(image, c, *x)].item() for x in at], num_bins, soft=soft)
                    for c in range(probs.shape[1])
                ]
            )
    return rows


def constraint(kind: str, h: float, lam: float, rho: float) -> float:
    if kind == "phr":
        return lam * h + rho * h * h / 2 if lam + rho * h >= 0 else -lam * lam / (2 * rho)
    if h < 0:
        return lam * h / (1 - rho * h)
    return lam * h + lam * rho * h * h + (rho * rho * h**3 / 6 if kind == "p2" else 0.0)


def gaps(logits: Tensor, shares: Tensor, boundary: Tensor | None, margin: float, *, relu: bool = False) -> dict[tuple[int, ...], float]:
    """h of each (region, image, class, *x), 0 outside the region; one region without ``boundary`` ``(N, *spatial)``."""
    result = {}
    for image, *x in pixels(logits.shape):
        for c in range(logits.shape[1]):
            z, tau = logits[(image, c, *x)].item(), shares[(image, c, *x)].item()
            for region in range(1 if boundary is None else 2):
                inside = boundary is None or bool(boundary[(image, *x)]) == (region == 0)
                d = z - (1.0 if boundary is not None and region == 0 else margin) * tau
                result[(region, image, c, *x)] = (max(0.0, d) if relu else abs(d)) if inside else 0.0
    return result
