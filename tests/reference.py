"""Slow references: loops over the formula, pixel by pixel, in plain Python floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def window(kind: str, sizes: Sequence[int], sigmas: Sequence[float]) -> dict[tuple[int, ...], float]:
    """Weight of each offset; they sum to 1."""
    offsets = list(itertools.product(*[range(-(k // 2), k // 2 + 1) for k in sizes]))
    if kind == "mean":
        weights = dict.fromkeys(offsets, 1.0)
    else:
        weights = {d: math.exp(-sum((r / s) ** 2 for r, s in zip(d, sigmas, strict=True)) / 2) for d in offsets}
    if kind == "svls":
        centre = (0,) * len(sizes)
        weights[centre] = sum(w for d, w in weights.items() if d != centre)
    total = sum(weights.values())
    return {d: w / total for d, w in weights.items()}


def neighbourhood(one_hot: Tensor, valid: Tensor, weights: dict[tuple[int, ...], float], border: str) -> Tensor:
    """sum w v q / sum w v at each valid pixel, 0 elsewhere."""
    n, c, *spatial = one_hot.shape
    result = torch.zeros_like(one_hot)
    for image, *x in itertools.product(range(n), *map(range, spatial)):
        if not valid[(image, *x)]:
            continue
        numerator, denominator = [0.0] * c, 0.0
        for offset, weight in weights.items():
            y = [a + d for a, d in zip(x, offset, strict=True)]
            if border == "replicate":
                y = [min(max(a, 0), size - 1) for a, size in zip(y, spatial, strict=True)]
            if any(not 0 <= a < size for a, size in zip(y, spatial, strict=True)):
                denominator += weight if border == "zeros" else 0.0
                continue
            if valid[(image, *y)]:
                denominator += weight
                for k in range(c):
                    numerator[k] += weight * one_hot[(image, k, *y)].item()
        for k in range(c):
            result[(image, k, *x)] = numerator[k] / denominator
    return result


def log_probabilities(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    total = math.log(sum(math.exp(z - largest) for z in logits)) + largest
    return [z - total for z in logits]


def pixels(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Every (image, *x) of a tensor of shape ``(N, C, *spatial)``."""
    return list(itertools.product(range(shape[0]), *map(range, shape[2:])))


def cross_entropy(logits: Tensor, probs: Tensor, valid: Tensor, weights: Sequence[float] | None = None) -> float:
    """Sum over valid pixels of -sum_c w_c q_c log p_c."""
    total = 0.0
    for image, *x in pixels(logits.shape):
        if valid[(image, *x)]:
            at = (image, slice(None), *x)
            log_p, q = log_probabilities(logits[at].tolist()), probs[at].tolist()
            total -= sum((weights[c] if weights else 1.0) * q[c] * log_p[c] for c in range(len(q)))
    return total


def neighbour_penalty(logits: Tensor, shares: Tensor, valid: Tensor, power: int) -> float:
    """Mean over valid pixels and classes of |tau - z|^d."""
    total, count = 0.0, 0
    for image, *x in pixels(logits.shape):
        if valid[(image, *x)]:
            at = (image, slice(None), *x)
            total += sum(abs(t - z) ** power for t, z in zip(shares[at].tolist(), logits[at].tolist(), strict=True))
            count += logits.shape[1]
    return total / count if count else 0.0


def tversky(p: Sequence[float], q: Sequence[float], alpha: float, beta: float, smooth: float, power: int = 1) -> float:
    """The score of one class over the pixels of one region."""
    size_p, size_q = sum(abs(a) ** power for a in p), sum(abs(b) ** power for b in q)
    distance = sum(abs(a - b) ** power for a, b in zip(p, q, strict=True))
    tp = (size_p + size_q - distance) / 2
    return (tp + smooth) / (tp + alpha * (size_p - tp) + beta * (size_q - tp) + smooth)


def overlap_loss(
    probs: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    region: str,
    alpha: float,
    beta: float,
    smooth: float,
    power: int = 1,
    log: bool = False,
    gamma: float = 1.0,
    threshold: float | None = None,
) -> float:
    """Loss over the region ``"batch"``, ``"image"`` or ``"class"``; classes whose target stays at or under ``threshold`` are left out."""
    n, c = probs.shape[:2]
    loss: dict[tuple[int, int], float] = {}
    for image in range(1 if region == "batch" else n):
        images = range(n) if region == "batch" else [image]
        for k in range(c):
            at = [(i, k, *x) for i, *x in pixels(probs.shape) if i in images and valid[(i, *x)]]
            q = [target[a].item() for a in at]
            if not at or (threshold is not None and max(q) <= threshold):
                continue
            score = tversky([probs[a].item() for a in at], q, alpha, beta, smooth, power)
            loss[image, k] = (-math.log(score) if log else 1 - score) ** gamma
    axis = 1 if region == "class" else 0
    groups: dict[int, list[float]] = {}
    for key, value in loss.items():
        groups.setdefault(key[axis], []).append(value)
    means = [sum(values) / len(values) for values in groups.values()]
    return sum(means) / len(means) if means else 0.0
