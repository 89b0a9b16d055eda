"""``densecal-benchmark losses``: time and memory of losses beside PyTorch's cross-entropy and other libraries, forward and backward.

Contenders of one measure compute the same number: values and gradients are held against densecal's own in double precision, on a small input, before
anything is timed. Contenders take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecal.cli.measuring import Sink, add_run_arguments, begin, give_back, process_memory, quantiles, versions, where
from densecal.losses import CompoundLoss, CrossEntropyLoss, LabelSmoothingLoss, MbLSLoss, NACLLoss, SVLSLoss
from densecal.ops.backend import Backend, why_not_triton
from densecal.ops.boundary import face_boundary
from densecal.ops.neighbourhood import svls_kernel
from densecal.targets import OneHotTarget, SVLSTarget
from densecal.terms import CrossEntropy, DiceSemimetric, JaccardMetric

__all__ = [
    "BASELINE",
    "CONTENDERS",
    "Contender",
    "Row",
    "add_arguments",
    "boundary_share",
    "convolved_svls",
    "convolved_target",
    "disagreement",
    "label_map",
    "on_device",
    "peak_memory",
    "run",
    "timed",
]

Loss = Callable[[Tensor, Tensor], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convolved_target(labels: Tensor, num_classes: int, *, kernel_size: int = 3, sigma: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The target of spatially varying label smoothing as its authors wrote it: one-hot labels and a depthwise convolution.

    Example:
        >>> convolved_target(torch.tensor([[0, 0, 1]]), 2)
        tensor([[[1.0000, 0.7500, 0.2500],
                 [0.0000, 0.2500, 0.7500]]])
    """
    dims = labels.ndim - 1
    window = svls_kernel(kernel_size, sigma, dims).dense().to(labels.device, dtype)
    one_hot = F.one_hot(labels, num_classes).movedim(-1, 1).to(dtype)
    padded = F.pad(one_hot, [kernel_size // 2] * 2 * dims, mode="replicate")
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return convolve(padded, window.expand(num_classes, 1, *window.shape), groups=num_classes)


def convolved_svls(logits: Tensor, labels: Tensor, *, kernel_size: int = 3, sigma: float = 1.0) -> Tensor:
    """Cross-entropy of :func:`convolved_target` as its authors wrote it: log-softmax and a product.

    Example:
        >>> logits, labels = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
        >>> torch.allclose(convolved_svls(logits, labels), SVLSLoss()(logits, labels))
        True
    """
    target = convolved_target(labels, logits.shape[1], kernel_size=kernel_size, sigma=sigma, dtype=logits.dtype)
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()


def _monai(name: str, **options: Any) -> Callable[[int, int], Loss]:
    def make(num_classes: int, spatial_dims: int) -> Loss:
        return getattr(importlib.import_module("monai.losses"), name)(**options)

    return make


def _monai_nacl(num_classes: int, spatial_dims: int) -> Loss:
    loss: Loss = importlib.import_module("monai.losses").NACLLoss(num_classes, spatial_dims)
    return loss


def _monai_dice_ce(num_classes: int, spatial_dims: int) -> Loss:
    loss = _monai("DiceCELoss", softmax=True, to_onehot_y=True)(num_classes, spatial_dims)
    return lambda logits, labels: loss(logits, labels.unsqueeze(1))


def _smp(name: str, **options: Any) -> Callable[[int, int], Loss]:
    return lambda num_classes, spatial_dims: getattr(importlib.import_module("segmentation_models_pytorch.losses"), name)(**options)


def _ours(make: Callable[..., nn.Module], **options: Any) -> Callable[[int, int], Loss]:
    return lambda num_classes, spatial_dims: make(**options)


def _compound(target: Callable[[], Any], **terms: tuple[float, Callable[[], Any]]) -> Callable[..., CompoundLoss]:
    def make(backend: Backend = "auto") -> CompoundLoss:
        return CompoundLoss(target(), {name: {"weight": weight, "term": term()} for name, (weight, term) in terms.items()}, backend=backend)

    return make


# MONAI's Dice: per image, every class, its two smoothing terms 1e-5, which are twice ours.
_dice_ce = _compound(
    OneHotTarget,
    ce=(1.0, CrossEntropy),
    dice=(1.0, lambda: DiceSemimetric(smooth=5e-6, active="all", weight_batch=0.0, weight_image=1.0)),
)
_svls_dice_ce = _compound(SVLSTarget, ce=(0.25, CrossEntropy), dml=(0.75, DiceSemimetric))
_svls_jaccard = _compound(SVLSTarget, jml=(1.0, JaccardMetric))


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Args:
        measure: What is computed; contenders of one measure give the same.
        library: Who computes it.
        make: Number of classes and of spatial dimensions -> loss of logits and label map.
        module: What has to be importable.
        ours: Whether it is densecal's.
    """

    measure: str
    library: str
    make: Callable[[int, int], Loss]
    module: str = "torch"
    ours: bool = False


def _densecal(measure: str, make: Callable[..., nn.Module], **options: Any) -> tuple[Contender, ...]:
    """Ours by each backend; ``auto`` would be one of them."""
    return tuple(Contender(measure, f"densecal, {backend}", _ours(make, backend=backend, **options), ours=True) for backend in ("triton", "torch"))


BASELINE = Contender("cross-entropy", "PyTorch", lambda num_classes, spatial_dims: F.cross_entropy)

CONTENDERS = (
    BASELINE,
    *_densecal("cross-entropy", CrossEntropyLoss),
    Contender("label smoothing", "PyTorch", lambda num_classes, spatial_dims: lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    *_densecal("label smoothing", LabelSmoothingLoss, smoothing=0.1),
    Contender("label smoothing", "smp", _smp("SoftCrossEntropyLoss", smooth_factor=0.1, ignore_index=-100), "segmentation_models_pytorch"),
    *_densecal("SVLS", SVLSLoss),
    Contender("SVLS", "one-hot and convolution", lambda num_classes, spatial_dims: convolved_svls),
    *_densecal("NACL", NACLLoss, border="zeros"),
    Contender("NACL", "MONAI", _monai_nacl, "monai"),
    *_densecal("MbLS", MbLSLoss),
    *_densecal("Dice + CE", _dice_ce),
    Contender("Dice + CE", "MONAI", _monai_dice_ce, "monai"),
    *_densecal("Jaccard on SVLS", _svls_jaccard),
    *_densecal("CE + Dice on SVLS", _svls_dice_ce),
)


@dataclass
class Row:
    """What was measured of a contender; times in ms at 20, 50 and 80 %, memory in multiples of the logits."""

    measure: str
    library: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    replay: float = math.nan
    ratio: float = math.nan
    memory: float = math.nan
    gigabytes_per_second: float = math.nan
    value: float = math.nan
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", default=["2,14,64,64,64"], help="of the logits, N,C,*spatial; one or more (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="of the logits; one or more (default: %(default)s)")
    parser.add_argument("--label-dtype", choices=["int64", "uint8"], default="int64", help="of the labels ours are handed (default: %(default)s)")
    kinds = "about 5%% boundary, or random blocks of 8; one or both (default: %(default)s)"
    parser.add_argument("--labels", nargs="+", choices=["regions", "blocks"], default=["regions"], help=kinds)
    parser.add_argument("--only", default="", help="measures with this in their name, and PyTorch's cross-entropy (default: all)")
    parser.add_argument("--profile", action="store_true", help="say which operations take densecal's time, beside each table")
    add_run_arguments(parser, "losses", repeats=10)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Print a table for each kind of labels, type and shape; whether all contenders of a measure agree."""
    shapes = begin(args, parser, args.shape)
    sink = Sink(args.out, "losses")
    for line in _header(args):
        sink.line(line)
    agree = True
    for kind, dtype, shape in itertools.product(args.labels, args.dtype, shapes):
        labels = label_map(shape, kind, args.device)
        title = f"{' x '.join(map(str, shape))}, {dtype}, {kind}"
        for line in _table_header(title, shape, DTYPES[dtype], labels, args.label_dtype):
            sink.line(line)
        rows = list(_measure(args, shape, dtype, kind, labels, sink))
        if args.profile:
            for line in _profiles(args, shape, DTYPES[dtype], labels, rows):
                sink.line(line)
        agree = agree and not any("differs" in row.note for row in rows)
        _draw(sink, rows, f"{title}, {where(args.device, args.threads)}")
    return agree


def label_map(shape: Sequence[int], kind: str, device: str = "cpu") -> Tensor:
    """Seeded labels ``(N, *spatial)`` in C classes: ``"blocks"`` of 8 pixels a side, or ``"regions"`` with few pixels at boundaries.

    Example:
        >>> label_map((1, 4, 64), "regions").shape
        torch.Size([1, 64])
    """
    n, num_classes, *spatial = shape
    generator = torch.Generator().manual_seed(0)
    if kind == "blocks":
        labels = torch.randint(0, num_classes, (n, *(-(-side // 8) for side in spatial)), generator=generator).to(device)
        for axis, side in enumerate(spatial, start=1):
            labels = labels.repeat_interleave(8, axis).narrow(axis, 0, side)
        return labels.contiguous()
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(spatial)]
    for cell in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        # The class with the largest of some smooth fields; few fields at a time, so that many classes do not need much memory.
        best = torch.full((n, *spatial), -torch.inf, device=device)
        labels = torch.zeros(n, *spatial, dtype=torch.long, device=device)
        generator.manual_seed(0)
        for c in range(num_classes):
            coarse = torch.randn(n, 1, *(side // cell + 2 for side in spatial), generator=generator).to(device)
            values = F.interpolate(coarse, spatial, mode=mode, align_corners=True)[:, 0]
            better = values > best
            best, labels = torch.where(better, values, best), torch.where(better, c, labels)
        if boundary_share(labels) <= 0.055:
            break
    return labels


def boundary_share(labels: Tensor) -> float:
    """Of pixels that share a face with another class."""
    valid = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
    return face_boundary(labels.unsqueeze(1), valid).float().mean().item()


def _header(args: argparse.Namespace) -> Iterator[str]:
    yield f"{where(args.device, args.threads)}, {versions('torch', 'triton')}, {args.repeats} measurements.\n"
    if args.device.startswith("cuda"):
        yield f"A copy from device to device moves {_copy_speed(args.device):.0f} GB/s.\n"
    if (reason := why_not_triton(torch.device(args.device))) is not None:
        yield f"No fused kernels: {reason}.\n"
    yield (
        "Times in ms, 20 / 50 / 80 %; replay: forward and backward from a CUDA graph; ratio: median of both to that of PyTorch's cross-entropy; memory: peak "
        "above what there was before, in multiples of the logits; GB/s: three passes over the logits and two over the labels in that time.\n"
    )


def _table_header(title: str, shape: Sequence[int], dtype: torch.dtype, labels: Tensor, label_dtype: str) -> Iterator[str]:
    yield f"## {title}\n"
    yield (
        f"Logits of {math.prod(shape) * dtype.itemsize / 2**20:.1f} MiB; labels {label_dtype} for densecal and int64 for others; "
        f"{100 * boundary_share(labels):.1f} % of the pixels have a neighbour of another class.\n"
    )
    yield "| measure | library | forward | backward | both | replay | ratio | memory | GB/s | value |"
    yield "|---|---|---|---|---|---|---|---|---|---|"


def _copy_speed(device: str) -> float:
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(6)][1:]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def _put(sink: Sink, row: Row, about: dict[str, Any]) -> None:
    def number(value: float, digits: int) -> str:
        return "" if math.isnan(value) else f"{value:.{digits}f}"

    times = [" / ".join(f"{t:.3g}" for t in values) for values in (row.forward, row.backward, row.both)]
    cells = [row.measure, row.library, *times, number(row.replay, 3), number(row.ratio, 2), number(row.memory, 2)]
    cells += [number(row.gigabytes_per_second, 0), number(row.value, 6) + row.note]
    sink.row(cells, about | asdict(row))


def _draw(sink: Sink, rows: Sequence[Row], title: str) -> None:
    timed = [row for row in rows if row.both]
    parts = {"forward": [row.forward[1] for row in timed], "backward": [row.backward[1] for row in timed]}
    sink.bars([f"{row.measure}: {row.library}" for row in timed], parts, title)


def _chosen(args: argparse.Namespace) -> list[Contender]:
    chosen = [c for c in CONTENDERS if c is BASELINE or args.only.lower() in c.measure.lower()]
    no_kernels = why_not_triton(torch.device(args.device)) is not None
    return [c for c in chosen if importlib.util.find_spec(c.module) and not (no_kernels and c.library == "densecal, triton")]


def _measure(args: argparse.Namespace, shape: tuple[int, ...], dtype_name: str, kind: str, labels: Tensor, sink: Sink) -> Iterator[Row]:
    dtype, device = DTYPES[dtype_name], args.device
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device).mul_(3).to(dtype).requires_grad_()
    narrow = labels.to(getattr(torch, args.label_dtype))
    losses = {c: on_device(c.make(shape[1], len(shape) - 2), device) for c in _chosen(args)}
    rows = {c: Row(c.measure, c.library) for c in losses}
    for contender, row in rows.items():
        row.note = disagreement(contender, (2, shape[1], *(min(side, 9 + axis) for axis, side in enumerate(shape[2:]))), device)
    times: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in losses}
    for repeat in range(args.repeats + 2):  # the first two warm up: kernels compile, allocators grow
        for contender, loss in losses.items():
            if rows[contender].note:
                continue
            try:
                forward, backward, value = _once(loss, logits, narrow if contender.ours else labels, device)
            except RuntimeError as error:  # CUDA's out of memory is one, too
                rows[contender].note = f" {type(error).__name__}: {str(error).splitlines()[0][:80]}"
                times[contender].clear()
                _free(logits)
                continue
            rows[contender].value = value
            if repeat > 1:
                times[contender].append((forward, backward))
    size = logits.numel() * logits.element_size()
    for contender, row in rows.items():
        if measured := times[contender]:
            given = narrow if contender.ours else labels
            row.forward, row.backward = ([1e3 * q for q in quantiles([t[i] for t in measured])] for i in (0, 1))
            row.both = [1e3 * q for q in quantiles([sum(t) for t in measured])]
            row.ratio = row.both[1] / (1e3 * statistics.median(sum(t) for t in times[BASELINE])) if times[BASELINE] else math.nan
            logits.grad = None
            row.memory = peak_memory(functools.partial(_once, losses[contender], logits, given, device), device) / size
            if contender.ours or contender is BASELINE:  # others may look at values, which a capture does not survive
                row.replay = _replay(losses[contender], logits, given, device)
            moved = 3 * size + 2 * given.numel() * given.element_size()
            if contender.ours and device.startswith("cuda"):
                row.gigabytes_per_second = moved / (row.both[1] / 1e3) / 1e9
        about = {"shape": list(shape), "dtype": dtype_name, "labels": kind, "device": where(args.device, args.threads), "torch": torch.__version__}
        _put(sink, row, about)
        yield row


def _profiles(args: argparse.Namespace, shape: Sequence[int], dtype: torch.dtype, labels: Tensor, rows: Sequence[Row]) -> Iterator[str]:
    """The operations that take most of ours, forward and backward, of losses that could be measured. On a CPU what Python does between them is under the name of the
    autograd function."""
    cuda = args.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    logits = torch.randn(shape, generator=torch.Generator(args.device).manual_seed(0), device=args.device).mul_(3).to(dtype).requires_grad_()
    labels = labels.to(getattr(torch, args.label_dtype))
    yield "\nShares of the time of densecal's operations:\n"
    for contender, row in zip(_chosen(args), rows, strict=True):
        if not (contender.ours and row.both):
            continue
        loss = on_device(contender.make(shape[1], len(shape) - 2), args.device)
        _once(loss, logits, labels, args.device)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                _once(loss, logits, labels, args.device)
        times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in profile.key_averages()}
        most = sorted(times, key=lambda key: -times[key])[:10]
        yield f"- {contender.measure}, {contender.library}: " + ", ".join(f"{key} {times[key] / sum(times.values()):.0%}" for key in most)


def on_device(loss: Loss, device: str) -> Loss:
    return loss.to(device) if isinstance(loss, nn.Module) else loss


def _once(loss: Loss, logits: Tensor, labels: Tensor, device: str) -> tuple[float, float, float]:
    logits.grad = None
    made: list[Tensor] = []
    forward = timed(lambda: made.append(loss(logits, labels)), device)
    backward = timed(made[0].backward, device)
    return forward, backward, made[0].item()


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds; on a GPU those between two events in its stream."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def _free(logits: Tensor) -> None:
    logits.grad = None
    give_back(str(logits.device))


def peak_memory(step: Callable[[], Any], device: str) -> float:
    """Bytes at the peak of a step, above what there was before; NaN where the system does not say."""
    give_back(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux then counts the peak anew
        before = process_memory("VmRSS")
        step()
        return 1024.0 * (process_memory("VmHWM") - before)
    except OSError:
        return math.nan


def _replay(loss: Loss, logits: Tensor, labels: Tensor, device: str) -> float:
    """Median ms of forward and backward replayed from a CUDA graph, which leaves out the time to launch them; NaN where that cannot be captured."""
    if not device.startswith("cuda"):
        return math.nan
    _free(logits)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                logits.grad = None
                loss(logits, labels).backward()
        torch.cuda.current_stream().wait_stream(side)
        logits.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss(logits, labels).backward()
        times = [timed(graph.replay, device) for _ in range(12)][2:]
        return 1e3 * statistics.median(times)
    except RuntimeError:
        return math.nan
    finally:
        _free(logits)


@functools.cache
def disagreement(contender: Contender, small: tuple[int, ...], device: str) -> str:
    """What is wrong with a contender's value and gradient on a small input, against densecal's by PyTorch in double precision; empty if nothing."""
    labels = label_map(small, "blocks", device)
    logits = 3 * torch.randn(small, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    reference = next(c for c in CONTENDERS if c.measure == contender.measure and c.library == "densecal, torch")
    (value, gradient), (expected, expected_gradient) = (
        _value_and_gradient(on_device(c.make(small[1], len(small) - 2), device), logits.to(dtype), labels)
        for c, dtype in ((contender, torch.float32), (reference, torch.float64))
    )
    largest = expected_gradient.abs().max()
    error = (gradient.double() - expected_gradient).abs().max() / largest
    if abs(value - expected) > 1e-4 * max(1.0, abs(expected)) or not error < 1e-3:
        return f" differs on a small input: {value:.6f}, {expected:.6f}, gradients by {error:.1g} of the largest"
    return ""


def _value_and_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels)
    value.backward()
    assert logits.grad is not None
    return value.item(), logits.grad
