"""``densecal-benchmark``: ours beside others' on the same input in one run; time and memory of metrics and losses, and the speed of loading
images.

A contender takes images one after the other and then gives its number, as in a validation. Contenders take turns, so that a machine that slows down slows
all of them; what is printed are quantiles. Memory is what a process of its own takes at its peak above what it took before the first image.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONTENDERS", "Contender", "main", "process_memory", "quantiles"]

NUM_BINS = 15


@dataclass(frozen=True)
class Contender:
    """One way to compute a calibration error.

    Args:
        measure: What is computed; contenders of one measure are compared.
        library: Who computes it; ``"densecal"`` is the one that others are held against.
        name: Of the class.
        module: What has to be importable.
        make: Number of classes -> metric with ``update`` and ``compute``.
        prepare: Probabilities and label map in the form that the metric takes, made before the clock starts.
    """

    measure: str
    library: str
    name: str
    module: str
    make: Callable[[int], Any]
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda probs, label: (probs, label)


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _one_hot(probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return probs, torch.stack([label == c for c in range(probs.shape[1])], dim=1).float()


def _flat(probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return probs.movedim(1, -1).flatten(0, -2).contiguous(), label.flatten()


class _Monai:
    """MONAI's interface is a call per batch and ``aggregate``."""

    def __init__(self, num_classes: int) -> None:
        self.metric = _attribute("monai.metrics", "CalibrationErrorMetric")(num_bins=NUM_BINS)

    def update(self, probs: Tensor, label: Tensor) -> None:
        self.metric(y_pred=probs, y=label)

    def compute(self) -> Tensor:
        return self.metric.aggregate()


TOP_LABEL = "top-label ECE, pooled"
PER_IMAGE = "classwise ECE, mean over images"
POOLED = "classwise ECE, pooled"

CONTENDERS = (
    Contender(
        TOP_LABEL,
        "densecal",
        "ExpectedCalibrationError",
        "densecal",
        lambda c: _attribute("densecal.metrics", "ExpectedCalibrationError")(num_bins=NUM_BINS),
    ),
    Contender(
        TOP_LABEL,
        "torchmetrics",
        "MulticlassCalibrationError",
        "torchmetrics",
        lambda c: _attribute("torchmetrics.classification", "MulticlassCalibrationError")(num_classes=c, n_bins=NUM_BINS),
    ),
    Contender(
        TOP_LABEL,
        "torch-uncertainty",
        "CalibrationError",
        "torch_uncertainty",
        lambda c: _attribute("torch_uncertainty.metrics", "CalibrationError")(task="multiclass", num_classes=c, num_bins=NUM_BINS),
    ),
    Contender(
        PER_IMAGE,
        "densecal",
        "ExpectedCalibrationError",
        "densecal",
        lambda c: _attribute("densecal.metrics", "ExpectedCalibrationError")(kind="classwise", pooling="image", num_classes=c, num_bins=NUM_BINS),
    ),
    Contender(PER_IMAGE, "MONAI", "CalibrationErrorMetric", "monai", _Monai, _one_hot),
    Contender(
        POOLED,
        "densecal",
        "ExpectedCalibrationError",
        "densecal",
        lambda c: _attribute("densecal.metrics", "ExpectedCalibrationError")(kind="classwise", num_classes=c, num_bins=NUM_BINS),
    ),
    Contender(
        POOLED,
        "torch-uncertainty",
        "ClasswiseCalibrationError",
        "torch_uncertainty",
        lambda c: _attribute("torch_uncertainty.metrics", "ClasswiseCalibrationError")(num_classes=c, num_bins=NUM_BINS),
        _flat,
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; exit status 1 if those compared do not give the same."""
    parser = argparse.ArgumentParser(prog="densecal-benchmark", description="Speed beside other libraries and code written by hand.")
    subjects = parser.add_subparsers(dest="subject", required=True)
    metrics = subjects.add_parser("metrics", help="time and memory of calibration errors", description="Calibration errors of several libraries.")
    _add_arguments(metrics)
    loading = subjects.add_parser("data", help="images per second", description="Our loader of images and the same pipeline written by hand.")
    _add_data_arguments(loading)
    losses = subjects.add_parser("losses", help="time and memory, forward and backward", description="Losses of several libraries.")
    from densecal.cli import benchmark_losses  # which takes its quantiles from here

    benchmark_losses.add_arguments(losses)
    args = parser.parse_args(argv)
    if args.subject == "metrics":
        same = _compare(args, metrics)
    elif args.subject == "losses":
        same = benchmark_losses.run(args, losses)
    else:
        from densecal.cli.benchmark_data import run  # not all that trains is needed for metrics

        same = run(args, loading)
    if not same:
        raise SystemExit(1)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="1,19,512,1024", help="of the probabilities of one image, N,C,*spatial (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="images per measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="how far numbers of one measure may differ on a small image (default: %(default)s)"
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="folder of CamVid in SegNet's form (default: made-up images in a temporary folder)")
    parser.add_argument("--images", type=int, default=48, help="made-up images (default: %(default)s)")
    parser.add_argument("--size", default="512,1024", help="rows,columns of the made-up images (default: %(default)s)")
    parser.add_argument("--format", choices=["png", "jpg"], default="png", help="of the made-up images (default: %(default)s)")
    parser.add_argument("--patch", default="384,384", help="rows,columns of a patch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="patches per batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements, each an epoch (default: %(default)s)")


def _compare(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Whether contenders of one measure agree on a small image, where sums in single precision do no harm."""
    try:
        shape = tuple(int(n) for n in args.shape.split(","))
    except ValueError:
        parser.error(f"--shape: expected numbers with commas between, but got {args.shape!r}")
    if len(shape) < 3 or min(shape) < 1 or args.images < 1 or args.repeats < 1:
        parser.error("expected a shape N,C,*spatial, and at least one image and one repeat")
    torch.set_num_threads(args.threads)
    contenders = [contender for contender in CONTENDERS if importlib.util.find_spec(contender.module)]
    for missing in sorted({c.library for c in CONTENDERS} - {c.library for c in contenders}):
        print(f"{missing} is not installed and left out", file=sys.stderr)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread{'s' if args.threads != 1 else ''}"
    print(f"{args.images} images of {' x '.join(map(str, shape))}, {NUM_BINS} bins, {args.repeats} measurements, {where}, torch {torch.__version__}")
    print("update of every image and compute together, seconds; memory of a process of its own at its peak, above what it took before.")
    print(f"On a small image all contenders of a measure agree to {args.tolerance:g} unless the last column says otherwise.\n")
    return _report(contenders, shape, args)


def _images(shape: Sequence[int], count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Seeded predictions as networks make them, smooth in space and mostly sure, and labels drawn from the same logits at a temperature of 1.5."""
    generator = torch.Generator().manual_seed(0)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 2]
    images = []
    for _ in range(count):
        coarse = torch.randn(shape[0], shape[1], *(max(2, n // 16) for n in shape[2:]), generator=generator)
        logits = 20 * torch.nn.functional.interpolate(coarse, shape[2:], mode=mode, align_corners=True) + 0.5 * torch.randn(
            tuple(shape), generator=generator
        )
        label = (logits / 1.5 - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(1)  # Gumbel's trick
        images.append((logits.softmax(1).to(device), label.to(device)))
    return images


def _run(contender: Contender, images: Sequence[tuple[Tensor, Tensor]], num_classes: int, device: str) -> tuple[float, float]:
    metric = contender.make(num_classes)
    metric = metric.to(device) if hasattr(metric, "to") else metric
    _wait(device)
    start = time.perf_counter()
    for probs, label in images:
        metric.update(probs, label)
    value = float(metric.compute())
    _wait(device)
    return time.perf_counter() - start, value


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _prepared(contender: Contender, images: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [contender.prepare(probs, label) for probs, label in images]


def _report(contenders: Sequence[Contender], shape: Sequence[int], args: argparse.Namespace) -> bool:
    warnings.filterwarnings("ignore")
    num_classes = shape[1]
    images = _images(shape, args.images, args.device)
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    values: dict[Contender, float] = {}
    side = round(4096 ** (1 / (len(shape) - 2)))
    small = _images((1, num_classes, *(min(n, side) for n in shape[2:])), 1, args.device)
    exact = {contender: _run(contender, _prepared(contender, small), num_classes, args.device)[1] for contender in contenders}
    for repeat in range(args.repeats + 1):  # the first is for warming up
        for contender in contenders:
            seconds, values[contender] = _run(contender, _prepared(contender, images), num_classes, args.device)
            if repeat:
                times[contender].append(seconds)
    del images
    print(f"{'measure':<32} {'library':<18} {'20 %':>8} {'median':>8} {'80 %':>8} {'ratio':>7} {'memory':>10}   value")
    agree = True
    for measure in dict.fromkeys(contender.measure for contender in contenders):
        group = [contender for contender in contenders if contender.measure == measure]
        ours = next(contender for contender in group if contender.library == "densecal")
        for contender in group:
            low, middle, high = quantiles(times[contender])
            ratio = middle / statistics.median(times[ours])
            memory = _peak_memory(contender, shape, args)
            differs = abs(exact[contender] - exact[ours]) > args.tolerance
            agree = agree and not differs
            note = f"  differs on a small image: {exact[contender]:.6f}, {exact[ours]:.6f}" if differs else ""
            print(
                f"{measure:<32} {contender.library:<18} {low:8.3f} {middle:8.3f} {high:8.3f} {ratio:6.1f}x {memory:7.0f} MiB   {values[contender]:.6f}{note}",
                flush=True,
            )
    return agree


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """At 20, 50 and 80 %."""
    tensor = torch.tensor(values, dtype=torch.float64)
    low, middle, high = tensor.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, middle, high


def _peak_memory(contender: Contender, shape: Sequence[int], args: argparse.Namespace) -> float:
    """MiB, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_memory, args=(CONTENDERS.index(contender), tuple(shape), args.images, args.threads, args.device, sender)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return float("nan")
    finally:
        process.join()


def _measure_memory(place: int, shape: tuple[int, ...], count: int, threads: int, device: str, sender: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    contender, num_classes = CONTENDERS[place], shape[1]
    small = _images((1, num_classes, *(8 for _ in shape[2:])), 1, device)
    _run(contender, _prepared(contender, small), num_classes, device)  # imports everything
    images = _prepared(contender, _images(shape, 1, device)) * count
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(contender, images, num_classes, device)
        sender.send((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak anew
        before = process_memory("VmRSS")
        _run(contender, images, num_classes, device)
        sender.send((process_memory("VmHWM") - before) / 2**10)
    except OSError:
        sender.send(float("nan"))


def process_memory(name: str) -> int:
    """What Linux says this process has, in KiB: ``"VmRSS"`` now, ``"VmHWM"`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
