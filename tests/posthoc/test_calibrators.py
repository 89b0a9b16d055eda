"""Calibrators against loops and scipy, on cases with a known answer, and what each must keep."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from scipy.optimize import minimize, minimize_scalar

from densecal.metrics import ClasswiseCalibrationError, ExpectedCalibrationError
from densecal.posthoc import (
    DirichletCalibration,
    HistogramBinning,
    IsotonicCalibration,
    PixelSample,
    TemperatureScaling,
    VectorScaling,
    best_temperature,
    load_calibrator,
    normalised_logits,
    save_calibrator,
)
from densecal.registry import CALIBRATORS

NAMES = CALIBRATORS.list()
SIGMOID = [name for name in NAMES if "sigmoid" in CALIBRATORS[name].activations]
POINTWISE = [name for name in NAMES if CALIBRATORS[name].pointwise]


def drawn(probs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Labels ``(N, *spatial)`` drawn from ``(N, C, *spatial)``."""
    c = probs.shape[1]
    flat = probs.movedim(1, -1).reshape(-1, c)
    return torch.multinomial(flat, 1, generator=torch.Generator().manual_seed(seed)).view(probs.movedim(1, -1).shape[:-1])


def random_logits(*shape: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str, num_classes: int, activation: str = "softmax", **options):
    quick = {"local_temperature": {"steps": 5, "max_crops": 4}, "selective": {"steps": 20}}
    return CALIBRATORS.create(name, num_classes, activation=activation, ignore_index=255, **quick.get(name, {}), **options)


# Temperature.


def nll_of(z: np.ndarray, y: np.ndarray, temperature: float) -> float:
    total = 0.0
    for row, label in zip(z / temperature, y, strict=True):
        shifted = row - row.max()
        total += math.log(sum(math.exp(v) for v in shifted)) - shifted[label]
    return total / len(z)


def test_best_temperature_is_the_minimum_of_the_likelihood():
    z = random_logits(200, 4)
    y = drawn((z / 1.7).softmax(1))
    reference = minimize_scalar(lambda t: nll_of(z.numpy(), y.numpy(), math.exp(t)), bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    assert best_temperature(z, y) == pytest.approx(math.exp(reference.x), rel=1e-6)


@pytest.mark.parametrize("factor", [0.25, 3.0, 8.0])
def test_temperature_repairs_a_network_that_is_too_sure(factor):
    z = random_logits(2, 3, 60, 70, 30)
    label = drawn(z.softmax(1))
    scaling = TemperatureScaling(3).fit([(factor * z, label)])
    assert float(scaling.temperature) == pytest.approx(factor, rel=0.02)
    torch.testing.assert_close(scaling(factor * z), z.softmax(1), atol=0.01, rtol=0)


def test_temperature_without_a_minimum_ends_somewhere():
    z = torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(10, 1)
    assert best_temperature(z, torch.ones(10, dtype=torch.long)) == pytest.approx(100)
    found = best_temperature(z, torch.zeros(10, dtype=torch.long))
    assert 0.01 <= found < 0.1
    assert float((z[0] / found).softmax(0)[0]) == 1


def test_temperature_of_shares_is_that_of_repeated_labels():
    z = random_logits(50, 3)
    y = drawn((z / 2).softmax(1)), drawn((z / 2).softmax(1), seed=1)
    shares = sum(torch.nn.functional.one_hot(one, 3).double() for one in y) / 2
    assert best_temperature(z, shares) == pytest.approx(best_temperature(torch.cat([z, z]), torch.cat(y)))


def test_temperature_of_a_region_is_that_of_two_classes():
    z = random_logits(1, 1, 500)
    label = (torch.rand(1, 1, 500, generator=torch.Generator().manual_seed(0)) < (z / 2).sigmoid()).long()
    region = TemperatureScaling(1, activation="sigmoid").fit([(z, label)])
    classes = TemperatureScaling(2).fit([(torch.cat([torch.zeros_like(z), z], dim=1), label)])
    assert float(region.temperature) == pytest.approx(float(classes.temperature))


# Vector and Dirichlet.


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_vector_is_the_minimum_of_the_likelihood(activation):
    z = random_logits(1, 3, 300)
    inside = torch.rand(1, 3, 300, generator=torch.Generator().manual_seed(1)) < (0.5 * z + 0.3).sigmoid()
    label = drawn((0.5 * z).softmax(1)) if activation == "softmax" else inside.long()
    scaling = VectorScaling(3, activation=activation).fit([(z, label)])
    flat = normalised_logits(z, activation)[0].T.numpy()

    def nll(parameters):
        mapped = flat * parameters[:3] + parameters[3:]
        if activation == "softmax":
            shifted = mapped - mapped.max(1, keepdims=True)
            return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(300), label[0].numpy()]).mean())
        y = label[0].T.numpy()
        return float((np.logaddexp(0, mapped) - y * mapped).mean())

    found = minimize(nll, np.concatenate([np.ones(3), np.zeros(3)]), method="BFGS", options={"gtol": 1e-9})
    ours = np.concatenate([scaling.weight.numpy(), scaling.bias.numpy()])
    assert nll(ours) == pytest.approx(found.fun, abs=1e-9)
    if activation == "softmax":  # up to an offset common to all classes
        found.x[3:] -= found.x[3:].mean() - ours[3:].mean()
    np.testing.assert_allclose(ours, found.x, atol=1e-3)


def test_vector_repairs_known_factors_and_offsets():
    z = random_logits(2, 3, 300, 300)
    weight, bias = torch.tensor([0.5, 1.0, 0.8]).double(), torch.tensor([0.3, -0.5, 0.2]).double()
    true = (normalised_logits(z) * weight.view(3, 1, 1) + bias.view(3, 1, 1)).softmax(1)
    scaling = VectorScaling(3).fit([(z, drawn(true))])
    torch.testing.assert_close(scaling(z), true, atol=0.02, rtol=0)
    np.testing.assert_allclose(scaling.weight, weight, atol=0.03)


@pytest.mark.parametrize("name", ["vector", "dirichlet"])
def test_shares_are_as_good_as_classes(name):
    z = random_logits(1, 4, 300)
    label = drawn((z / 2)[:, :3].softmax(1))  # the last class has no pixel
    shares = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).double()
    results = [build(name, 4).fit([(z, one)])(z) for one in (label, shares)]
    torch.testing.assert_close(*results)


def test_dirichlet_recovers_a_linear_map():
    z = random_logits(2, 3, 300, 300)
    weight = torch.tensor([[0.6, 0.2, 0.0], [0.0, 0.8, 0.1], [0.3, 0.0, 0.7]]).double()
    true = torch.einsum("dc,ncxy->ndxy", weight, normalised_logits(z)).softmax(1)
    calibration = DirichletCalibration(3, off_diagonal=0.0, intercept=0.0).fit([(z, drawn(true))])
    torch.testing.assert_close(calibration(z), true, atol=0.03, rtol=0)
    # A column is known up to a number that is added to all classes alike.
    centred = [w - w.mean(0, keepdim=True) for w in (calibration.weight, weight)]
    np.testing.assert_allclose(*centred, atol=0.03)


def test_dirichlet_with_odir_is_the_minimum_of_the_penalised_likelihood():
    z = random_logits(1, 3, 200)
    label = drawn((0.5 * z).softmax(1))
    calibration = DirichletCalibration(3, off_diagonal=0.3, intercept=0.2).fit([(z, label)])
    flat = normalised_logits(z)[0].T.numpy()

    def objective(parameters):
        weight, bias = parameters[:9].reshape(3, 3), parameters[9:]
        total = 0.0
        for row, y in zip(flat, label[0].tolist(), strict=True):
            mapped = [sum(weight[d, c] * row[c] for c in range(3)) + bias[d] for d in range(3)]
            total += math.log(sum(math.exp(v) for v in mapped)) - mapped[y]
        others = sum(weight[i, j] ** 2 for i in range(3) for j in range(3) if i != j)
        return total / len(flat) + 0.3 * others / 6 + 0.2 * (bias**2).sum() / 3

    ours = np.concatenate([calibration.weight.numpy().ravel(), calibration.bias.numpy()])
    found = minimize(objective, ours + 0.05, method="BFGS", options={"gtol": 1e-7, "maxiter": 60})
    assert objective(ours) <= found.fun + 1e-8
    np.testing.assert_allclose(ours, found.x, atol=1e-3)


def test_strong_odir_leaves_a_diagonal():
    z = random_logits(1, 3, 500)
    calibration = DirichletCalibration(3, off_diagonal=1e6, intercept=1e6).fit([(z, drawn((0.5 * z).softmax(1)))])
    np.testing.assert_allclose(calibration.weight - calibration.weight.diag().diag(), 0, atol=1e-4)
    np.testing.assert_allclose(calibration.bias, 0, atol=1e-4)


# Bins.


def test_histogram_is_the_frequency_in_each_bin():
    probs = random_logits(1, 3, 400).softmax(1)
    label = drawn(random_logits(1, 3, 400).softmax(1))
    binning = HistogramBinning(3, num_bins=5).fit([(probs, label)], from_probs=True)
    expected = torch.full((3, 5), math.nan)
    for c in range(3):
        for b in range(5):
            inside = [int(y == c) for p, y in zip(probs[0, c].tolist(), label[0].tolist(), strict=True) if b / 5 < p <= (b + 1) / 5]
            if inside:
                expected[c, b] = sum(inside) / len(inside)
    torch.testing.assert_close(binning.frequency.float(), expected, equal_nan=True)


def test_histogram_leaves_no_calibration_error_where_it_was_fitted():
    logits = random_logits(1, 2, 31, 17, scale=3)
    label = (torch.rand(1, 2, 31, 17, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    binning = HistogramBinning(2, activation="sigmoid", num_bins=15).fit([(logits, label)])
    after = binning(logits)
    error = ClasswiseCalibrationError(2, num_bins=15, activation="sigmoid")
    assert float(error(logits.sigmoid().float(), label)) > 0.05
    assert float(error(after.float(), label)) == pytest.approx(0, abs=1e-6)


def pool_adjacent_violators(x: list[float], y: list[float]) -> list[float]:
    """Least squares among maps that never fall, by merging neighbours that fall."""
    blocks = [[value, 1] for _, value in sorted(zip(x, y, strict=True))]
    i = 0
    while i < len(blocks) - 1:
        if blocks[i][0] > blocks[i + 1][0]:
            (a, n), (b, m) = blocks[i], blocks.pop(i + 1)
            blocks[i] = [(a * n + b * m) / (n + m), n + m]
            i = max(i - 1, 0)
        else:
            i += 1
    return [value for value, n in blocks for _ in range(n)]


def test_isotonic_is_the_best_map_that_never_falls():
    probs = torch.arange(1, 40, dtype=torch.float64).div(40).view(1, 1, -1)  # each in a fine bin of its own
    label = (torch.rand(1, 1, 39, generator=torch.Generator().manual_seed(3)) < probs).long()
    isotonic = IsotonicCalibration(1, activation="sigmoid").fit([(probs, label)], from_probs=True)
    expected = pool_adjacent_violators(probs.flatten().tolist(), label.flatten().tolist())
    np.testing.assert_allclose(isotonic(probs, from_probs=True).flatten(), expected, atol=1e-6)


def test_isotonic_never_falls_and_stays_in_range():
    z = random_logits(1, 1, 2000, scale=4)
    label = (torch.rand(1, 1, 2000, generator=torch.Generator().manual_seed(1)) < (z / 3).sigmoid()).long()
    isotonic = IsotonicCalibration(1, activation="sigmoid").fit([(z, label)])
    mapped = isotonic(torch.linspace(-30, 30, 5001).view(1, 1, -1)).flatten()
    assert bool((mapped.diff() >= 0).all())
    assert 0 <= float(mapped[0]) <= float(mapped[-1]) <= 1
    assert len(mapped.unique()) > 5


# What all keep.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7,), (5, 9), (5, 6, 7)], ids=["1d", "2d", "3d"])
def test_results_are_distributions(name, shape):
    z = random_logits(2, 4, *shape, scale=3)
    calibrator = build(name, 4).fit([(z, drawn((z / 2).softmax(1)))])
    probs = calibrator(z)
    assert probs.shape == z.shape
    assert probs.dtype == torch.float64
    assert float(probs.min()) >= 0
    torch.testing.assert_close(probs.sum(1), torch.ones_like(probs[:, 0]))


@pytest.mark.parametrize("name", SIGMOID)
def test_regions_are_in_range(name):
    z = random_logits(2, 2, 9, 8, scale=3)
    label = (torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < (z / 2).sigmoid()).long()
    probs = build(name, 2, "sigmoid").fit([(z, label)])(z)
    assert 0 <= float(probs.min()) <= float(probs.max()) <= 1
    assert float((probs - z.sigmoid()).abs().max()) > 1e-3


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SIGMOID)))
def test_what_cannot_act_on_regions_says_so(name):
    with pytest.raises(ValueError, match=r"cannot act on regions.*temperature"):
        build(name, 2, "sigmoid")


@pytest.mark.parametrize("name", [name for name in NAMES if CALIBRATORS[name].keeps_labels])
def test_labels_stay_where_that_is_said(name):
    z = random_logits(2, 4, 12, 11)
    calibrator = build(name, 4).fit([(z, drawn((z / 2).softmax(1)))])
    assert torch.equal(calibrator(z).argmax(1), z.argmax(1))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_their_probabilities_are_treated_alike(name):
    z = random_logits(1, 3, 8, 9, scale=3)
    label = drawn((z / 2).softmax(1))
    calibrator = build(name, 3).fit([(z, label)])
    torch.testing.assert_close(calibrator(z), calibrator(z.softmax(1), from_probs=True))
    again = build(name, 3).fit([(z.softmax(1), label)], from_probs=True)
    torch.testing.assert_close(calibrator(z), again(z), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", POINTWISE)
def test_a_shift_of_all_logits_changes_nothing(name):
    z = random_logits(1, 3, 40)
    calibrator = build(name, 3).fit([(z, drawn((z / 2).softmax(1)))])
    torch.testing.assert_close(calibrator(z + 5 * torch.randn(1, 1, 40, dtype=torch.float64)), calibrator(z))


@pytest.mark.parametrize("name", NAMES)
def test_ignored_and_masked_pixels_have_no_say(name):
    z, label = random_logits(2, 3, 6, 8, scale=3), drawn((random_logits(2, 3, 6, 8, scale=3) / 2).softmax(1))
    ignored = label.clone()
    ignored[:, :, 5:] = 255
    mask = torch.ones(label.shape, dtype=torch.bool)
    mask[:, :, 5:] = False
    other = z.clone()
    if build(name, 3).pointwise:  # the neighbours of a pixel that counts have a say in its temperature
        other[:, :, :, 5:] *= -7
    results = [
        build(name, 3).fit([(z, ignored)])(z),
        build(name, 3).fit([(other, ignored)])(z),
        build(name, 3).fit([(z, label, mask)])(z),
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    assert float((results[0] - z.softmax(1)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_cases_does_not_matter(name):
    cases = {
        f"case_{n}": (random_logits(1, 3, 8, 8 + n, scale=3, seed=n), drawn(random_logits(1, 3, 8, 8 + n, seed=10 + n).softmax(1))) for n in range(4)
    }
    results = []
    for order in (list(cases), list(cases)[::-1]):
        calibrator = build(name, 3)
        for case_id in order:
            calibrator.update(*cases[case_id], case_ids=[case_id])
        calibrator.finish()
        results.append(calibrator(cases["case_0"][0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["vector", "dirichlet", "isotonic", "histogram"])
def test_a_class_that_never_occurs_stays_finite(name):
    z = random_logits(1, 4, 300)
    label = drawn((z / 2)[:, :3].softmax(1))
    probs = build(name, 4).fit([(z, label)])(z)
    assert bool(torch.isfinite(probs).all())
    assert float(probs[:, 3].max()) > 0.05, "others' offsets drown it"
    seen = probs[:, :3] / probs[:, :3].sum(1, keepdim=True)
    error = ExpectedCalibrationError()
    assert float(error(seen.float(), label)) < float(error(z[:, :3].softmax(1).float(), label))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_comes_as_single(name, dtype):
    z = random_logits(1, 3, 6, 7)
    calibrator = build(name, 3).fit([(z, drawn((z / 2).softmax(1)))])
    probs = calibrator(z.to(dtype))
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.double(), calibrator(z.to(dtype).double()), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_file_holds_all_of_it(name, tmp_path):
    z = random_logits(1, 3, 9, 7, scale=3)
    calibrator = build(name, 3).fit([(z, drawn((z / 2).softmax(1)))])
    path = save_calibrator(calibrator, tmp_path / "one.safetensors", {"cases": ["a", "b"]})
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]
    loaded, facts = load_calibrator(path)
    assert type(loaded) is type(calibrator)
    assert loaded.ignore_index == 255
    assert facts == {"cases": ["a", "b"]}
    assert torch.equal(loaded(z), calibrator(z))


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04pickle" * 20], ids=["empty", "text", "pickle"])
def test_another_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"one\.safetensors: is no calibrator of densecal's .*densecal-calibrate") as error:
        load_calibrator(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_config_equals_the_constructor(name):
    config = yaml.safe_load((ROOT / "configs" / "posthoc" / f"{name}.yaml").read_text())
    target = config.pop("_target_")
    assert target == f"densecal.posthoc.{CALIBRATORS[name].__name__}"
    signature = inspect.signature(CALIBRATORS[name]).parameters
    assert config == {key: p.default for key, p in signature.items() if key not in ("num_classes", "activation", "ignore_index")}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TemperatureScaling(3)(torch.zeros(1, 3, 4)), r"Expected a fitted TemperatureScaling"),
        (lambda: TemperatureScaling(1), r"at least 2 under softmax, but got 1"),
        (lambda: TemperatureScaling(3, activation="relu"), r"`activation` to be one of"),
        (lambda: TemperatureScaling(3, max_pixels=0), r"`max_pixels` to be greater than 0"),
        (lambda: HistogramBinning(3, num_bins=0), r"`num_bins` to be greater than 0"),
        (lambda: DirichletCalibration(3, off_diagonal=-1.0), r"`off_diagonal` to be 0 or greater"),
        (lambda: TemperatureScaling(3).fit([(torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.long))]), r"C = 3 channels, but got \(1, 2, 4\)"),
        (lambda: TemperatureScaling(3).fit([]), r"labelled pixels to fit on, but got none"),
        (lambda: TemperatureScaling(3).fit([(torch.zeros(1, 3, 4), torch.full((1, 4), -100))]), r"labelled pixels to fit on, but got none"),
        (lambda: TemperatureScaling(3).fit([(torch.full((1, 3, 4), math.nan), torch.zeros(1, 4, dtype=torch.long))]), r"finite `logits`"),
        (lambda: TemperatureScaling(3).fit([(torch.zeros(1, 3, 4), torch.full((1, 4), 3))]), r"Expected labels in 0 to 2"),
    ],
    ids=["not-fitted", "one-class", "activation", "max-pixels", "bins", "odir", "channels", "no-case", "all-ignored", "nan", "label"],
)
def test_mistakes_are_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# The sample.


def sample_of(cases, max_pixels: int) -> PixelSample:
    from densecal.targets import one_hot_target

    sample = PixelSample(max_pixels, 0)
    for case_id, (z, label) in cases:
        target = one_hot_target(label, 2)
        sample.add(z, target, target.valid, [case_id])
    return sample


def numbered_cases(sizes: list[int]):
    """Cases whose first logit is the number of the pixel, over all cases."""
    cases, start = [], 0
    for n, size in enumerate(sizes):
        z = torch.stack([torch.arange(start, start + size).double(), torch.zeros(size).double()]).unsqueeze(0)
        cases.append((f"case_{n}", (z, torch.zeros(1, size, dtype=torch.long))))
        start += size
    return cases


def test_sample_keeps_all_that_fits():
    sample = sample_of(numbered_cases([5, 7]), 12)
    assert sorted(sample.logits[:, 0].tolist()) == list(range(12))


def test_sample_is_even_and_does_not_repeat():
    counts = torch.zeros(60)
    for seed in range(300):
        cases = [(f"{seed}_{case_id}", case) for case_id, case in numbered_cases([10, 50])]
        kept = sample_of(cases, 20).logits[:, 0].long()
        assert len(kept.unique()) == 20
        counts[kept] += 1
    assert counts.sum() == 300 * 20
    assert float((counts - 100).abs().max()) < 5 * math.sqrt(300 / 3 * 2 / 3)


def test_sample_is_bounded():
    sample = sample_of(numbered_cases([1000] * 20), 64)
    assert (len(sample), sample.logits.shape, sample.labels.shape) == (64, (64, 2), (64,))


def test_calibration_error_falls_where_it_was_not_fitted():
    z = random_logits(2, 3, 80, 80, scale=1.5)
    label = drawn(z.softmax(1))
    for name in sorted(set(POINTWISE) - {"selective"}):  # which changes the suspected pixels alone
        calibrator = build(name, 3).fit([(4 * z[:1], label[:1])])
        before, after = (float(ExpectedCalibrationError()(p.float(), label[1:])) for p in ((4 * z[1:]).softmax(1), calibrator(4 * z[1:])))
        assert after < 0.3 * before, name
