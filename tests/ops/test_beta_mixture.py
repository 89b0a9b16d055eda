"""Mixture of two betas: loops, known mixtures, edges."""

import pytest
import reference_terms as reference
import torch

from densecal.ops import beta_mixture_posterior, fit_beta_mixture


def draw(components, n=12000, seed=0):
    torch.manual_seed(seed)
    return torch.cat([torch.distributions.Beta(torch.tensor(a), torch.tensor(b)).sample((int(n * w),)) for a, b, w in components]).double()


@pytest.mark.parametrize("steps", [1, 10])
def test_fit_matches_the_loops(steps):
    values = draw([(2.0, 6.0, 0.6), (6.0, 2.0, 0.4)], n=200)
    mixture = fit_beta_mixture(values, steps=steps)
    torch.testing.assert_close(mixture, torch.tensor(reference.fit_betas(values.tolist(), steps), dtype=torch.float64))


@pytest.mark.parametrize(
    "components", [[(2.0, 10.0, 0.7), (8.0, 2.0, 0.3)], [(1.0, 20.0, 0.8), (5.0, 5.0, 0.2)], [(4.0, 12.0, 0.5), (12.0, 4.0, 0.5)]]
)
def test_fit_recovers_a_known_mixture(components):
    mixture = fit_beta_mixture(draw(components), steps=50)
    expected = torch.tensor(components, dtype=torch.float64)
    means, known = (m[:, 0] / m[:, :2].sum(1) for m in (mixture, expected))
    torch.testing.assert_close(means, known, rtol=0, atol=0.02)
    torch.testing.assert_close(mixture[:, 2], expected[:, 2], rtol=0, atol=0.03)
    torch.testing.assert_close(mixture[:, :2], expected[:, :2], rtol=0.15, atol=0)


def test_ten_steps_separate_the_components():
    components = [(2.0, 10.0, 0.7), (8.0, 2.0, 0.3)]
    noisy = beta_mixture_posterior(draw(components), fit_beta_mixture(draw(components))) > 0.5
    truth = torch.arange(12000) >= 8400
    assert (noisy == truth).double().mean() > 0.97


def test_posterior_matches_the_loops():
    mixture = [[2.0, 6.0, 0.6], [5.0, 1.5, 0.4]]  # rises all the way
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = torch.tensor([reference.beta_responsibility(v, mixture) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(beta_mixture_posterior(x, torch.tensor(mixture)), expected)


@pytest.mark.parametrize(
    ("mixture", "turn"),
    [([[1.0, 2.0, 0.5], [6.0, 3.0, 0.5]], 5 / 6), ([[3.0, 6.0, 0.5], [1.0, 1.0, 0.5]], 2 / 7)],
    ids=["maximum", "minimum"],
)
def test_posterior_never_falls(mixture, turn):
    x = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    posterior = beta_mixture_posterior(x, torch.tensor(mixture))
    assert (posterior.diff() >= 0).all()
    # Where the odds rise by themselves they are as they are; beyond the turn they stay.
    flat = (x > turn + 1e-3) if turn > 0.5 else (x < turn - 1e-3)
    assert posterior[flat].max() - posterior[flat].min() < 1e-5
    rising = x[~flat & (x > 0.01) & (x < 0.99) & ((x - turn).abs() > 1e-3)]
    expected = torch.tensor([reference.beta_responsibility(v, mixture) for v in rising.tolist()], dtype=torch.float64)
    torch.testing.assert_close(beta_mixture_posterior(rising, torch.tensor(mixture)), expected)


@pytest.mark.parametrize(
    "values",
    [torch.full((100,), 0.3), torch.zeros(100), torch.cat([torch.zeros(50), torch.ones(50)]), torch.tensor([0.5]), torch.tensor([-3.0, 7.0])],
    ids=["constant", "zeros", "both-ends", "single", "outside"],
)
def test_odd_values_stay_finite(values):
    mixture = fit_beta_mixture(values)
    assert mixture.isfinite().all()
    assert (mixture > 0).all()
    for dtype in (torch.float32, torch.float64):
        posterior = beta_mixture_posterior(torch.linspace(-1.0, 2.0, 31, dtype=dtype), mixture)
        assert posterior.dtype == dtype
        assert ((posterior >= 0) & (posterior <= 1)).all()
