"""``densecal-benchmark metrics``: time and memory of calibration errors beside other libraries and code written by hand.

A contender takes images one after the other and then gives its number, as in a validation. Contenders of one measure give the same: their numbers are held
against each other on a small image before anything is timed, and those that differ are not timed. Contenders take turns, so that a machine that slows down slows
all of them; what is printed are quantiles. Memory is what a process of its own takes at its peak above what it took before the first image; on a GPU, what the
allocator handed out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densecal.cli.measuring import Sink, add_run_arguments, begin, give_back, process_memory, quantiles, versions, where
from densecal.metrics import ExpectedCalibrationError
from densecal.ops.backend import why_not_triton

__all__ = ["CONTENDERS", "Bincount", "Contender", "Row", "add_arguments", "run"]

NUM_BINS = 15


@dataclass(frozen=True)
class Contender:
    """One way to compute a calibration error.

    Args:
        measure: What is computed; contenders of one measure are compared.
        library: Who computes it; others are held against the first of a measure.
        make: Number of classes -> metric with ``update`` and ``compute``.
        module: What has to be importable.
        from_logits: Handed logits, not probabilities.
        prepare: Predictions and label map in the form that the metric takes, made before the clock starts.
    """

    measure: str
    library: str
    make: Callable[[int], Any]
    module: str = "densecal"
    from_logits: bool = False
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda values, label: (values, label)


def _other(module: str, name: str, **options: Any) -> Callable[..., Any]:
    return lambda **more: getattr(importlib.import_module(module), name)(**options, **more)


def _one_hot(probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return probs, torch.stack([label == c for c in range(probs.shape[1])], dim=1).float()


def _flat(probs: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return probs.movedim(1, -1).flatten(0, -2).contiguous(), label.flatten()


class _Monai:
    """MONAI's interface is a call per batch and ``aggregate``."""

    def __init__(self) -> None:
        self.metric = _other("monai.metrics", "CalibrationErrorMetric")(num_bins=NUM_BINS)

    def update(self, probs: Tensor, label: Tensor) -> None:
        self.metric(y_pred=probs, y=label)

    def compute(self) -> Tensor:
        value: Tensor = self.metric.aggregate()
        return value


class Bincount:
    """Top-label expected calibration error as one writes it down: softmax, the largest, and ``torch.bincount`` of the bins.

    Example:
        >>> metric = Bincount(2)
        >>> metric.update(torch.tensor([[[4.0, 0.0], [0.0, 4.0]]]), torch.tensor([[0, 0]]))
        >>> round(metric.compute().item(), 4)
        0.482
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self.num_bins = num_bins
        self.sums: Any = 0

    def update(self, logits: Tensor, label: Tensor) -> None:
        confidence, prediction = (values.flatten() for values in logits.softmax(1).max(1))
        index = (confidence * self.num_bins).ceil().long().clamp(1, self.num_bins) - 1
        right = (prediction == label.flatten()).double()
        weights = (None, confidence.double(), right)
        self.sums = self.sums + torch.stack([torch.bincount(index, w, minlength=self.num_bins).double() for w in weights])

    def compute(self) -> Tensor:
        count, confidence, right = self.sums
        return (confidence - right).abs().sum() / count.sum()


def _ours(measure: str, *, from_logits: bool = False, classwise: bool = False, **options: Any) -> tuple[Contender, ...]:
    """Ours by each backend; ``auto`` would be one of them."""

    def make(backend: Any) -> Callable[[int], Any]:
        def metric(num_classes: int) -> Any:
            more: dict[str, Any] = {"kind": "classwise", "num_classes": num_classes} if classwise else {}
            return ExpectedCalibrationError(num_bins=NUM_BINS, from_logits=from_logits, backend=backend, **more, **options)

        return metric

    return tuple(Contender(measure, f"densecal, {backend}", make(backend), from_logits=from_logits) for backend in ("triton", "torch"))


TOP_LABEL = "top-label ECE, pooled"
FROM_LOGITS = "top-label ECE of logits, pooled"
PER_IMAGE = "classwise ECE, mean over images"
POOLED = "classwise ECE, pooled"

_torchmetrics = _other("torchmetrics.classification", "MulticlassCalibrationError", n_bins=NUM_BINS)
_uncertainty = _other("torch_uncertainty.metrics", "CalibrationError", task="multiclass", num_bins=NUM_BINS)
_uncertainty_classwise = _other("torch_uncertainty.metrics", "ClasswiseCalibrationError", num_bins=NUM_BINS)

CONTENDERS = (
    *_ours(TOP_LABEL),
    Contender(TOP_LABEL, "torchmetrics", lambda c: _torchmetrics(num_classes=c), "torchmetrics"),
    Contender(TOP_LABEL, "torch-uncertainty", lambda c: _uncertainty(num_classes=c), "torch_uncertainty"),
    *_ours(FROM_LOGITS, from_logits=True),
    Contender(FROM_LOGITS, "softmax and torch.bincount", lambda c: Bincount(), "torch", from_logits=True),
    Contender(FROM_LOGITS, "torchmetrics", lambda c: _torchmetrics(num_classes=c), "torchmetrics", from_logits=True),
    *_ours(PER_IMAGE, classwise=True, pooling="image"),
    Contender(PER_IMAGE, "MONAI", lambda c: _Monai(), "monai", prepare=_one_hot),
    *_ours(POOLED, classwise=True),
    Contender(POOLED, "torch-uncertainty", lambda c: _uncertainty_classwise(num_classes=c), "torch_uncertainty", prepare=_flat),
)


@dataclass
class Row:
    """What was measured of a contender: ms at 20, 50 and 80 %, how often ours fits into that, MiB."""

    measure: str
    library: str
    times: list[float] = field(default_factory=list)
    ratio: float = math.nan
    memory: float = math.nan
    value: float = math.nan
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", nargs="+", default=["1,19,512,1024"], help="of the prediction of one image, N,C,*spatial; one or more (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=4, help="images per measurement (default: %(default)s)")
    parser.add_argument("--only", default="", help="measures with this in their name (default: all)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="how far numbers of one measure may differ on a small image (default: %(default)s)"
    )
    add_run_arguments(parser, "metrics", repeats=5)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Print a table for each shape; whether contenders of one measure agree on a small image, where sums in single precision do no harm."""
    shapes = begin(args, parser, args.shape)
    if args.images < 1:
        parser.error(f"--images: expected 1 or more, but got {args.images}")
    warnings.filterwarnings("ignore")
    no_kernels = why_not_triton(torch.device(args.device))
    chosen = [c for c in CONTENDERS if args.only.lower() in c.measure.lower() and not (no_kernels and c.library == "densecal, triton")]
    contenders = [c for c in chosen if importlib.util.find_spec(c.module)]
    for missing in sorted({c.library for c in chosen} - {c.library for c in contenders}):
        print(f"{missing} is not installed and left out", file=sys.stderr)
    sink = Sink(args.out, "metrics")
    about = versions("torch", "triton", "torchmetrics", "monai", "torch-uncertainty")
    sink.line(f"{where(args.device, args.threads)}, {about}, {args.repeats} measurements.\n")
    if no_kernels:
        sink.line(f"No fused kernels: {no_kernels}.\n")
    sink.line(
        "Times in ms, 20 / 50 / 80 %, of an update by every image and the result together; ratio: a library's median over densecal's; memory: the peak above what there "
        f"was before. Before that, on a small image, all contenders of a measure agree to {args.tolerance:g} unless the last column says otherwise.\n"
    )
    agree = True
    for shape in shapes:
        title = f"{args.images} images of {' x '.join(map(str, shape))}, {NUM_BINS} bins"
        sink.line(f"## {title}\n")
        sink.line("| measure | library | time | ratio | memory, MiB | value |")
        sink.line("|---|---|---|---|---|---|")
        rows = _measure(contenders, shape, args, sink)
        agree = agree and not any("differs" in row.note for row in rows)
        timed = [row for row in rows if row.times]
        names = [f"{row.measure}: {row.library}" for row in timed]
        sink.bars(names, {"time": [row.times[1] for row in timed]}, f"{title}, {where(args.device, args.threads)}")
    return agree


def _images(shape: Sequence[int], count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Seeded logits as networks make them, smooth in space and mostly sure, and labels drawn from them at a temperature of 1.5."""
    generator = torch.Generator().manual_seed(0)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 2]
    images = []
    for _ in range(count):
        coarse = torch.randn(shape[0], shape[1], *(max(2, n // 16) for n in shape[2:]), generator=generator)
        logits = 20 * torch.nn.functional.interpolate(coarse, shape[2:], mode=mode, align_corners=True) + 0.5 * torch.randn(
            tuple(shape), generator=generator
        )
        label = (logits / 1.5 - torch.empty_like(logits).exponential_(generator=generator).log_()).argmax(1)  # Gumbel's trick
        images.append((logits.to(device), label.to(device)))
    return images


def _prepared(contender: Contender, images: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [contender.prepare(logits if contender.from_logits else logits.softmax(1), label) for logits, label in images]


def _run(contender: Contender, images: Sequence[tuple[Tensor, Tensor]], num_classes: int, device: str) -> tuple[float, float]:
    """Seconds, and the value."""
    metric = contender.make(num_classes)
    metric = metric.to(device) if hasattr(metric, "to") else metric
    _wait(device)
    start = time.perf_counter()
    for values, label in images:
        metric.update(values, label)
    value = float(metric.compute())
    _wait(device)
    return time.perf_counter() - start, value


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _measure(contenders: Sequence[Contender], shape: tuple[int, ...], args: argparse.Namespace, sink: Sink) -> list[Row]:
    rows = {contender: Row(contender.measure, contender.library) for contender in contenders}
    first: dict[str, Contender] = {}
    for contender in contenders:
        first.setdefault(contender.measure, contender)
    side = round(4096 ** (1 / (len(shape) - 2)))
    small = _images((1, shape[1], *(min(n, side) for n in shape[2:])), 1, args.device)
    exact = {contender: _run(contender, _prepared(contender, small), shape[1], args.device)[1] for contender in contenders}
    for contender, row in rows.items():
        expected = exact[first[contender.measure]]
        if not abs(exact[contender] - expected) <= args.tolerance:
            row.note = f" differs on a small image: {exact[contender]:.6f}, {expected:.6f}"
    times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    images = _images(shape, args.images, args.device)
    for repeat in range(args.repeats + 1):  # the first is for warming up
        for contender, row in rows.items():
            if row.note:
                continue
            try:
                seconds, row.value = _run(contender, _prepared(contender, images), shape[1], args.device)
            except RuntimeError as error:  # CUDA's out of memory is one, too
                row.note = f" {type(error).__name__}: {str(error).splitlines()[0][:80]}"
                times[contender].clear()
                continue
            if repeat:
                times[contender].append(1e3 * seconds)
    about = {"shape": list(shape), "images": args.images, "device": where(args.device, args.threads), "torch": torch.__version__}
    for contender, row in rows.items():
        if times[contender]:
            row.times = list(quantiles(times[contender]))
            row.memory = _peak_memory(contender, shape, args) if args.device == "cpu" else _peak_on_device(contender, images, args.device)
        if row.times and (ours := rows[first[contender.measure]]).times:
            row.ratio = row.times[1] / ours.times[1]
        _put(sink, row, about)
    return list(rows.values())


def _put(sink: Sink, row: Row, about: dict[str, Any]) -> None:
    def number(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    times = " / ".join(f"{t:.3g}" for t in row.times)
    cells = [row.measure, row.library, times, number(row.ratio, ".1f"), number(row.memory, ".0f"), number(row.value, ".6f") + row.note]
    sink.row(cells, about | asdict(row))


def _peak_on_device(contender: Contender, images: Sequence[tuple[Tensor, Tensor]], device: str) -> float:
    """MiB that the allocator of a GPU handed out."""
    given = _prepared(contender, images)
    give_back(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(contender, given, images[0][0].shape[1], device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_memory(contender: Contender, shape: Sequence[int], args: argparse.Namespace) -> float:
    """MiB on a CPU, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(CONTENDERS.index(contender), tuple(shape), args.images, args.threads, sender))
    process.start()
    sender.close()
    try:
        memory: float = receiver.recv()
        return memory
    except EOFError:
        return math.nan
    finally:
        process.join()


def _measure_memory(place: int, shape: tuple[int, ...], count: int, threads: int, sender: Any) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    contender, num_classes = CONTENDERS[place], shape[1]
    small = _images((1, num_classes, *(8 for _ in shape[2:])), 1, "cpu")
    _run(contender, _prepared(contender, small), num_classes, "cpu")  # imports everything
    images = _prepared(contender, _images(shape, 1, "cpu")) * count
    give_back("cpu")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak anew
        before = process_memory("VmRSS")
        _run(contender, images, num_classes, "cpu")
        sender.send((process_memory("VmHWM") - before) / 2**10)
    except OSError:
        sender.send(math.nan)
