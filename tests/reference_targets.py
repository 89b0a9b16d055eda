"""Slow references of targets: loops over the formula, pixel by pixel, in plain Python numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from reference import pixels
from torch import Tensor


def around(
    x: Sequence[int], sides: Sequence[int], spatial: Sequence[int], border: str = "renormalize"
) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """Each offset of the window and the pixel there; None where it lies outside, unless the outermost pixel is repeated."""
    result: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []
    for offset in itertools.product(*[range(-(k // 2), k // 2 + 1) for k in sides]):
        y = tuple(a + d for a, d in zip(x, offset, strict=True))
        if border == "replicate":
            y = tuple(min(max(a, 0), size - 1) for a, size in zip(y, spatial, strict=True))
        inside = all(0 <= a < size for a, size in zip(y, spatial, strict=True))
        result.append((offset, y if inside else None))
    return result


def boundary(label_map: Tensor, sides: Sequence[int], ignore_index: int = -100) -> Tensor:
    """True where the window holds another label and no ignored pixel."""
    result = torch.zeros(label_map.shape, dtype=torch.bool)
    for image, *x in itertools.product(*map(range, label_map.shape)):
        window = [label_map[(image, *y)].item() for _, y in around(x, sides, label_map.shape[1:]) if y is not None]
        result[(image, *x)] = ignore_index not in window and len(set(window)) > 1
    return result


def smoothed(one_hot: Tensor, valid: Tensor, share: Tensor) -> Tensor:
    """(1 - eps(x)) delta_y + eps(x) / C at valid pixels, 0 elsewhere; ``share`` is eps ``(N, *spatial)``."""
    result, c = torch.zeros_like(one_hot), one_hot.shape[1]
    for image, *x in pixels(one_hot.shape):
        if valid[(image, *x)]:
            eps = share[(image, *x)].item()
            for k in range(c):
                result[(image, k, *x)] = (1 - eps) * one_hot[(image, k, *x)].item() + eps / c
    return result


def statistic(label_map: Tensor, num_classes: int, kind: str, sides: Sequence[int], border: str, ignore_index: int = -100) -> Tensor:
    """One-hot of the largest, smallest, lower median or most frequent (smallest of ties) class number of the window; ignored pixels left out."""
    result = torch.zeros(label_map.shape[0], num_classes, *label_map.shape[1:], dtype=torch.float64)
    for image, *x in itertools.product(*map(range, label_map.shape)):
        if label_map[(image, *x)] == ignore_index:
            continue
        window = [label_map[(image, *y)].item() for _, y in around(x, sides, label_map.shape[1:], border) if y is not None]
        found = sorted(label for label in window if label != ignore_index)
        pick = {"max": found[-1], "min": found[0], "median": found[(len(found) - 1) // 2], "mode": max(found, key=lambda c: (found.count(c), -c))}[
            kind
        ]
        result[(image, int(pick), *x)] = 1.0
    return result


def guided(
    one_hot: Tensor, valid: Tensor, image: Tensor, similarity: str, sides: Sequence[int], border: str, sigma: float | None, scale: float
) -> Tensor:
    """sum w v q / sum w v with w = exp(-mean |d|) or exp(-mean d^2) over channels, times a Gaussian in space where there is a sigma."""
    result, c, channels = torch.zeros_like(one_hot), one_hot.shape[1], image.shape[1]
    for n, *x in pixels(one_hot.shape):
        if not valid[(n, *x)]:
            continue
        numerator, denominator = [0.0] * c, 0.0
        for offset, y in around(x, sides, one_hot.shape[2:], border):
            if (y is None and border == "renormalize") or (y is not None and not valid[(n, *y)]):
                continue
            there = [0.0 if y is None else image[(n, i, *y)].item() for i in range(channels)]
            d = [(b - image[(n, i, *x)].item()) / scale for i, b in enumerate(there)]
            weight = math.exp(-sum(abs(e) if similarity == "l1" else e * e for e in d) / channels)
            if sigma is not None:
                weight *= math.exp(-sum(o * o for o in offset) / (2 * sigma**2))
            denominator += weight
            for k in range(c):
                numerator[k] += weight * one_hot[(n, k, *y)].item() if y is not None else 0.0
        for k in range(c):
            result[(n, k, *x)] = numerator[k] / denominator
    return result


def time_to_next(events: Sequence[int]) -> list[float]:
    """Steps to the first later step whose event begins there."""
    result = []
    for t in range(len(events)):
        later = [u - t for u in range(t + 1, len(events)) if events[u] == 1 and events[u - 1] != 1]
        result.append(float(later[0]) if later else math.inf)
    return result


def temporal_share(t: float, form: str, h_true: float, h_min: float, h_max: float, gamma: float, per_hour: float) -> float:
    """The forms as written; d of the sigmoid by bisection."""
    if form == "hard":
        return float(t < h_true)
    if form == "constant":
        return 1 - gamma if t <= h_true else gamma
    if t <= h_min:
        return 1.0
    if t > h_max:
        return 0.0
    g, k = gamma / per_hour, gamma * per_hour
    if form == "exponential":
        return (math.exp(-g * t) - math.exp(-g * h_max)) / (math.exp(-g * h_min) - math.exp(-g * h_max))
    if form == "linear":
        return 1 - (t - h_min) / (h_max - h_min)
    if form == "step":
        return 1 - math.floor((t - h_min) / k) / ((h_max - h_min) / k)

    def q(x: float, d: float) -> float:
        s = [1 / (1 + math.exp((y - d) / k)) for y in (x, h_min, h_max)]
        return (s[0] - s[2]) / (s[1] - s[2])

    low, high = h_min - 20 * k, h_max + 20 * k
    for _ in range(200):
        d = (low + high) / 2
        low, high = (d, high) if q(h_true, d) < 0.5 else (low, d)
    return q(t, d)


def rater_mean(label_maps: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """Share of each class among the raters ``(N, R, *spatial)`` that do not ignore the pixel; 0 where all do."""
    n, _, *spatial = label_maps.shape
    result = torch.zeros(n, num_classes, *spatial, dtype=torch.float64)
    for image, *x in itertools.product(range(n), *map(range, spatial)):
        votes = [v for v in label_maps[(image, slice(None), *x)].tolist() if v != ignore_index]
        for v in votes:
            result[(image, v, *x)] += 1 / len(votes)
    return result


def distances(mask: Tensor, spacing: Sequence[float]) -> Tensor:
    """Euclidean distance from each pixel of ``(N, *spatial)`` to the nearest True one, by trying all; inf where there is none."""
    result = torch.full(mask.shape, math.inf, dtype=torch.float64)
    for image in range(mask.shape[0]):
        marked = mask[image].nonzero().tolist()
        for x in itertools.product(*map(range, mask.shape[1:])):
            apart = [math.sqrt(sum((s * (a - b)) ** 2 for s, a, b in zip(spacing, x, y, strict=True))) for y in marked]
            result[(image, *x)] = min(apart, default=math.inf)
    return result


def kernel_density(p: Sequence[float], keys: Sequence[Sequence[float]], labels: Sequence[Sequence[float]], bandwidth: float) -> list[float]:
    """sum w y / sum w with Dirichlet densities written out."""

    def dirichlet(alpha: Sequence[float]) -> float:
        normaliser = math.gamma(sum(alpha)) / math.prod(math.gamma(a) for a in alpha)
        return normaliser * math.prod(x ** (a - 1) for x, a in zip(p, alpha, strict=True))

    weights = [dirichlet([x / bandwidth + 1 for x in key]) for key in keys]
    return [sum(w * y[c] for w, y in zip(weights, labels, strict=True)) / sum(weights) for c in range(len(p))]
