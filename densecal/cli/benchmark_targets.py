"""``densecal-benchmark targets``: time and memory of the distribution that a label map is smoothed to, beside one-hot labels and a convolution.

Contenders of one measure make the same: each is held against the formula in double precision, on a small input, before anything is timed. Contenders take
turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.cli.benchmark_losses import DTYPES, boundary_share, convolved_target, label_map, peak_memory, timed
from densecal.cli.measuring import Sink, add_run_arguments, begin, give_back, quantiles, versions, where
from densecal.ops.backend import why_not_triton
from densecal.targets import SoftTarget, boundary_smoothing_target, label_smoothing_target, one_hot_target, svls_target

__all__ = ["CONTENDERS", "Contender", "Row", "add_arguments", "disagreement", "pooled_boundary", "run"]

Make = Callable[[Tensor, int, torch.dtype], Tensor]
"""Labels ``(N, *spatial)``, number of classes and type -> distribution ``(N, C, *spatial)``."""

CLOSE = 2e-3
"""By how much shares may differ on the small input: convolutions on a GPU may round to ten bits."""


def pooled_boundary(labels: Tensor, num_classes: int, *, smoothing: float = 0.5, kernel_size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Boundary smoothing by one-hot labels and max-pooling: a pixel is smoothed where the largest and smallest label of its window differ.

    Example:
        >>> pooled_boundary(torch.tensor([[0, 0, 1]]), 2)
        tensor([[[1.0000, 0.7500, 0.2500],
                 [0.0000, 0.2500, 0.7500]]])
    """
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[labels.ndim - 1]
    values = labels.unsqueeze(1).float()
    highest, lowest = (sign * pool(sign * values, kernel_size, 1, kernel_size // 2) for sign in (1, -1))
    share = smoothing * (highest != lowest).to(dtype)
    return (1 - share) * F.one_hot(labels, num_classes).movedim(-1, 1).to(dtype) + share / num_classes


def _torch_one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    return F.one_hot(labels, num_classes).movedim(-1, 1).to(dtype)


def _monai_one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    one_hot: Tensor = importlib.import_module("monai.networks").one_hot(labels.unsqueeze(1), num_classes, dtype=dtype)
    return one_hot


def _smoothed(one_hot: Make) -> Make:
    return lambda labels, num_classes, dtype: 0.9 * one_hot(labels, num_classes, dtype) + 0.1 / num_classes


def _by_torch(target: SoftTarget) -> Tensor:
    """As it is made of soft labels, or under ``torch.compile``: windows along one axis after the other."""
    target.backend = "torch"
    return target.recipe(target.one_hot, target.valid, target.activation)


@dataclass(frozen=True)
class Contender:
    """One way to make a distribution.

    Args:
        measure: What is made; contenders of one measure make the same.
        library: Who makes it.
        make: How.
        module: What has to be importable.
        ours: Whether it is densecal's, which takes labels of any type.
    """

    measure: str
    library: str
    make: Make
    module: str = "torch"
    ours: bool = False


TARGETS: dict[str, Callable[..., SoftTarget]] = {
    "one-hot": one_hot_target,
    "label smoothing": functools.partial(label_smoothing_target, smoothing=0.1),
    "boundary smoothing": functools.partial(boundary_smoothing_target, smoothing=0.5),
    "SVLS": svls_target,
    "SVLS, 5 wide": functools.partial(svls_target, kernel_size=5),
}


def _densecal(measure: str) -> Contender:
    return Contender(measure, "densecal", lambda labels, num_classes, dtype: TARGETS[measure](labels, num_classes, dtype=dtype).probs, ours=True)


def _separable(measure: str) -> Contender:
    return Contender(
        measure, "densecal, from one-hot", lambda labels, num_classes, dtype: _by_torch(TARGETS[measure](labels, num_classes, dtype=dtype)), ours=True
    )


CONTENDERS = (
    _densecal("one-hot"),
    Contender("one-hot", "PyTorch", _torch_one_hot),
    Contender("one-hot", "MONAI", _monai_one_hot, "monai"),
    _densecal("label smoothing"),
    _separable("label smoothing"),
    Contender("label smoothing", "PyTorch's one-hot", _smoothed(_torch_one_hot)),
    Contender("label smoothing", "MONAI's one-hot", _smoothed(_monai_one_hot), "monai"),
    _densecal("boundary smoothing"),
    _separable("boundary smoothing"),
    Contender("boundary smoothing", "one-hot and max-pooling", lambda y, c, dtype: pooled_boundary(y, c, dtype=dtype)),
    _densecal("SVLS"),
    _separable("SVLS"),
    Contender("SVLS", "one-hot and convolution", lambda y, c, dtype: convolved_target(y, c, dtype=dtype)),
    _densecal("SVLS, 5 wide"),
    _separable("SVLS, 5 wide"),
    Contender("SVLS, 5 wide", "one-hot and convolution", lambda y, c, dtype: convolved_target(y, c, kernel_size=5, dtype=dtype)),
)


@dataclass
class Row:
    """What was measured of a contender: ms at 20, 50 and 80 %, its ratio to densecal's, memory in multiples of the target."""

    measure: str
    library: str
    time: list[float] = field(default_factory=list)
    ratio: float = math.nan
    memory: float = math.nan
    gigabytes_per_second: float = math.nan
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", default=["2,14,64,64,64"], help="of the target, N,C,*spatial; one or more (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="of the target; one or more (default: %(default)s)")
    parser.add_argument("--label-dtype", choices=["int64", "uint8"], default="int64", help="of the labels densecal is handed (default: %(default)s)")
    kinds = "about 5%% boundary, or random blocks of 8; one or both (default: %(default)s)"
    parser.add_argument("--labels", nargs="+", choices=["regions", "blocks"], default=["regions"], help=kinds)
    parser.add_argument("--only", default="", help="measures with this in their name (default: all)")
    add_run_arguments(parser, "targets", repeats=10)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Print a table for each kind of labels, type and shape; whether all contenders of a measure agree."""
    shapes = begin(args, parser, args.shape)
    sink = Sink(args.out, "targets")
    sink.line(f"{where(args.device, args.threads)}, {versions('torch', 'triton', 'monai')}, {args.repeats} measurements.\n")
    if args.device.startswith("cuda") and (reason := why_not_triton(torch.device(args.device))) is not None:
        sink.line(f"No fused kernel: {reason}.\n")
    sink.line(
        "Times in ms, 20 / 50 / 80 %; ratio: of the median to densecal's; memory: peak above what there was before, in multiples of the target, which is in it; "
        "GB/s: labels read and the target written once in the median time.\n"
    )
    agree = True
    for kind, dtype, shape in itertools.product(args.labels, args.dtype, shapes):
        labels = label_map(shape, kind, args.device)
        title = f"{' x '.join(map(str, shape))}, {dtype}, {kind}"
        sink.line(f"## {title}\n")
        sink.line(
            f"A target of {math.prod(shape) * DTYPES[dtype].itemsize / 2**20:.1f} MiB; labels {args.label_dtype} for densecal and int64 for others; "
            f"{100 * boundary_share(labels):.1f} % of the pixels have a neighbour of another class.\n"
        )
        sink.line("| target | library | time | ratio | memory | GB/s |")
        sink.line("|---|---|---|---|---|---|")
        rows = list(_measure(args, shape, dtype, kind, labels, sink))
        agree = agree and not any("differs" in row.note for row in rows)
        measured = [row for row in rows if row.time]
        names = [f"{row.measure}: {row.library}" for row in measured]
        sink.bars(names, {"time": [row.time[1] for row in measured]}, f"{title}, {where(args.device, args.threads)}")
    return agree


def _measure(args: argparse.Namespace, shape: tuple[int, ...], dtype_name: str, kind: str, labels: Tensor, sink: Sink) -> Iterator[Row]:
    device, dtype, num_classes = args.device, DTYPES[dtype_name], shape[1]
    narrow = labels.to(getattr(torch, args.label_dtype))
    chosen = [c for c in CONTENDERS if args.only.lower() in c.measure.lower() and importlib.util.find_spec(c.module)]
    small = (2, num_classes, *(min(side, 9 + axis) for axis, side in enumerate(shape[2:])))
    rows = {c: Row(c.measure, c.library, note=disagreement(c, small, device)) for c in chosen}
    steps = {c: functools.partial(c.make, narrow if c.ours else labels, num_classes, dtype) for c in chosen}
    times: dict[Contender, list[float]] = {contender: [] for contender in chosen}
    for repeat in range(args.repeats + 2):  # the first two warm up: kernels compile, allocators grow
        for contender, row in rows.items():
            if row.note:
                continue
            try:
                seconds = timed(steps[contender], device)
            except RuntimeError as error:  # CUDA's out of memory is one, too
                row.note = f" {type(error).__name__}: {str(error).splitlines()[0][:80]}"
                times[contender].clear()
                give_back(device)
                continue
            if repeat > 1:
                times[contender].append(1e3 * seconds)
    size = math.prod(shape) * dtype.itemsize
    ours: dict[str, float] = {}
    for contender, row in rows.items():
        if measured := times[contender]:
            row.time = list(quantiles(measured))
            row.ratio = row.time[1] / ours.setdefault(row.measure, row.time[1])  # ours is the first of a measure
            row.memory = peak_memory(steps[contender], device) / size
            given = narrow if contender.ours else labels
            row.gigabytes_per_second = (size + given.numel() * given.element_size()) / row.time[1] / 1e6
        cells = [row.measure, row.library, " / ".join(f"{t:.3g}" for t in row.time)]
        cells += ["" if math.isnan(value) else f"{value:.2f}" for value in (row.ratio, row.memory)]
        cells += [("" if math.isnan(row.gigabytes_per_second) else f"{row.gigabytes_per_second:.1f}") + row.note]
        about = {"shape": list(shape), "dtype": dtype_name, "labels": kind, "device": where(device, args.threads), "torch": torch.__version__}
        sink.row(cells, about | asdict(row))
        yield row


@functools.cache
def disagreement(contender: Contender, small: Sequence[int], device: str) -> str:
    """What is wrong with a contender's distribution on a small input, against the formula in double precision; empty if nothing."""
    labels = label_map(small, "blocks", device)
    shares = TARGETS[contender.measure](labels, small[1]).shares
    expected = shares(labels, torch.ones_like(labels, dtype=torch.bool), small[1], torch.float64)
    found = contender.make(labels, small[1], torch.float32)
    if found.shape != expected.shape:
        return f" differs on a small input: shape {tuple(found.shape)}"
    error = (found.double() - expected).abs().max().item()
    return "" if error < CLOSE else f" differs on a small input: by up to {error:.2g}"
