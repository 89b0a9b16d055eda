"""Temperatures that differ from pixel to pixel: against loops, and on cases where one temperature cannot do."""

from __future__ import annotations

import math

import pytest
import torch

from densecal.metrics import NegativeLogLikelihood
from densecal.posthoc import LocalTemperatureScaling, SelectiveScaling, TemperatureScaling, local_temperature, normalised_logits


def drawn(probs: torch.Tensor, seed: int) -> torch.Tensor:
    flat = probs.movedim(1, -1).reshape(-1, probs.shape[1])
    return torch.multinomial(flat, 1, generator=torch.Generator().manual_seed(seed)).view(probs.movedim(1, -1).shape[:-1])


def reflected(i: int, n: int) -> int:
    i = abs(i)
    return i if i < n else 2 * (n - 1) - i


@pytest.mark.parametrize("shape", [(9,), (6, 7), (5, 6, 5)], ids=["1d", "2d", "3d"])
def test_local_temperature_is_the_tree(shape):
    generator = torch.Generator().manual_seed(len(shape))
    dims = len(shape)
    z = torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64)
    weight = 0.3 * torch.randn(7, 2, *([3] * dims), generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(7, generator=generator, dtype=torch.float64)
    found = local_temperature(z, weight, bias, dilation=2, base=1.5)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, dims).tolist():
        sums = []
        for k in range(7):
            total = float(bias[k])
            for tap in torch.cartesian_prod(*(torch.arange(3) for _ in shape)).view(-1, dims).tolist():
                source = tuple(reflected(i + 2 * (d - 1), n) for i, d, n in zip(place, tap, shape, strict=True))
                total += sum(float(weight[(k, c, *tap)] * z[(0, c, *source)]) for c in range(2))
            sums.append(total)
        t = [1.5 + s for s in sums[:4]]
        g = [1 / (1 + math.exp(-s)) for s in sums[4:]]
        expected = g[2] * (g[0] * t[0] + (1 - g[0]) * t[1]) + (1 - g[2]) * (g[1] * t[2] + (1 - g[1]) * t[3])
        assert float(found[(0, 0, *place)]) == pytest.approx(max(expected, 0.01)), place


def test_axes_too_short_to_reflect_are_repeated():
    z = torch.randn(1, 2, 3, 20)
    assert local_temperature(z, torch.randn(7, 2, 5, 5), torch.zeros(7)).shape == (1, 1, 3, 20)


def scene(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A network that is right to be sure where its logits are small, and six times too sure on the other half of the image, where they are large."""
    generator = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(1, 3, 40, 40, generator=generator)
    label = drawn(z.softmax(1), seed)
    z[..., 20:] *= 6
    return z, label


def score(probs: torch.Tensor, label: torch.Tensor) -> float:
    metric = NegativeLogLikelihood()
    metric.update(probs.float(), label)
    return float(metric.compute())


def test_local_temperature_does_what_one_temperature_cannot():
    train, test = [scene(n) for n in range(6)], scene(9)
    one = TemperatureScaling(3).fit(train)
    local = LocalTemperatureScaling(3, steps=200, learning_rate=0.01).fit(train)
    best = score(torch.cat([test[0][..., :20], test[0][..., 20:] / 6], dim=3).softmax(1), test[1])
    assert score(local(test[0]), test[1]) - best < 0.75 * (score(one(test[0]), test[1]) - best)


def test_local_temperature_begins_at_the_best_single_one():
    train = [scene(n) for n in range(2)]
    start = LocalTemperatureScaling(3, steps=1, learning_rate=1e-12).fit(train)
    z = train[0][0]
    probs = start(z)
    one = TemperatureScaling(3).fit(train)
    torch.testing.assert_close(probs, one(z), atol=0.03, rtol=0)  # eight crops of each image, not all of its pixels


def suspicious(seed: int, size: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Right wherever the first class is predicted; no better than chance, and sure of it, wherever it is not."""
    generator = torch.Generator().manual_seed(seed)
    guess = torch.randint(0, 3, (1, size), generator=generator)
    z = 6.0 * torch.nn.functional.one_hot(guess, 3).movedim(-1, 1).float()
    random = torch.randint(0, 3, (1, size), generator=generator)
    return z + 0.1 * torch.randn(z.shape, generator=generator), torch.where(guess == 0, 0, random)


def test_selective_scaling_changes_likely_mistakes_alone():
    scaling = SelectiveScaling(3, steps=200).fit([suspicious(0)])
    z, label = suspicious(1)
    probs, before = scaling(z), z.softmax(1)
    sure = z.argmax(1) == 0
    same = (probs - before).abs().amax(1) < 1e-6
    assert float(same[sure].float().mean()) > 0.99
    assert float((~same)[~sure].float().mean()) > 0.99
    assert float(scaling.temperature) > 10
    # Chance: a third each.
    assert float(probs.amax(1)[~sure].mean()) == pytest.approx(1 / 3, abs=0.03)
    assert score(probs, label) < score(TemperatureScaling(3).fit([suspicious(0)])(z), label)


def test_selective_temperature_is_the_best_of_the_suspected():
    from densecal.posthoc import best_temperature

    z, label = suspicious(0)
    scaling = SelectiveScaling(3, steps=100).fit([(z, label)])
    changed = (scaling(z) - z.softmax(1)).abs().amax(1)[0] > 1e-6
    flat = normalised_logits(z)[0].T.double()
    assert float(scaling.temperature) == pytest.approx(best_temperature(flat[changed], label[0][changed]), rel=1e-6)


def test_nothing_suspected_leaves_all_as_it_is():
    z = 5 * torch.nn.functional.one_hot(torch.tensor([[0, 1, 2] * 20]), 3).movedim(-1, 1).float()
    scaling = SelectiveScaling(3, steps=100).fit([(z, z.argmax(1))])
    assert float(scaling.temperature) == 1 or not bool((scaling(z) - z.softmax(1)).abs().max() > 0.02)
