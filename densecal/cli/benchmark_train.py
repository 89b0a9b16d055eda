"""``densecal-benchmark train``: a whole training step of a U-Net with each loss, beside one with PyTorch's cross-entropy.

One network and one optimizer take the steps of all contenders, round by round in a shuffled order, so that what a machine does meanwhile meets all of them
alike. What counts is the ratio within a round.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from densecal.cli.benchmark_losses import BASELINE, CONTENDERS, DTYPES, Contender, disagreement, label_map, on_device, peak_memory, timed
from densecal.cli.measuring import Sink, add_run_arguments, begin, quantiles, versions, where
from densecal.ops.backend import why_not_triton

__all__ = ["Row", "add_arguments", "run"]

MEASURES = ("cross-entropy", "SVLS", "NACL", "MbLS", "Dice + CE", "CE + Dice on SVLS")


@dataclass
class Row:
    """What was measured of a contender: ms of a step and its ratio to that of the baseline in the same round, at 20, 50 and 80 %; peak in MiB."""

    measure: str
    library: str
    step: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    memory: float = math.nan
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="1,14,64,64,64", help="of the logits, N,C,*spatial with two or three spatial dims (default: %(default)s)")
    parser.add_argument("--channels", default="16,32,64,128", help="features of the U-Net at each level (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=list(DTYPES), default="float32", help="of the network; below single precision by autocast (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="measures with this in their name, and PyTorch's cross-entropy (default: all)")
    add_run_arguments(parser, "train", repeats=10, unit="rounds")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Print a table; whether all contenders of a measure agree."""
    (shape,) = begin(args, parser, [args.shape])
    try:
        channels = [int(n) for n in args.channels.split(",")]
    except ValueError:
        parser.error(f"--channels: expected numbers with commas between, but got {args.channels}")
    if len(shape) < 4 or len(channels) < 2 or min(channels) < 1:
        parser.error("expected a shape N,C,*spatial with two or three spatial dims, and two or more levels")
    if any(side % 2 ** (len(channels) - 1) for side in shape[2:]):
        parser.error(f"--shape: expected sides that {len(channels)} levels can halve, multiples of {2 ** (len(channels) - 1)}, but got {args.shape}")
    if importlib.util.find_spec("monai") is None:
        parser.error("the U-Net is MONAI's, which is not installed: pip install monai")
    sink = Sink(args.out, "train")
    title = f"{' x '.join(map(str, shape))}, {args.precision}"
    sink.line(f"{where(args.device, args.threads)}, {versions('torch', 'triton', 'monai')}, {args.repeats} rounds.\n")
    sink.line(
        "Step: zero gradients, forward, loss, backward, AdamW; ms at 20 / 50 / 80 %. Ratio: to the step with PyTorch's cross-entropy of the same round. "
    )
    sink.line("Memory: peak above what there was before a step, in MiB.\n")
    sink.line(f"## {title}\n")
    sink.line("| loss | library | step | ratio | memory |")
    sink.line("|---|---|---|---|---|")
    rows = list(_measure(args, shape, channels, sink))
    timed_rows = [row for row in rows if row.step]
    sink.bars(
        [f"{row.measure}: {row.library}" for row in timed_rows],
        {"step": [row.step[1] for row in timed_rows]},
        f"{title}, {where(args.device, args.threads)}",
    )
    return not any("differs" in row.note for row in rows)


def _measure(args: argparse.Namespace, shape: Sequence[int], channels: Sequence[int], sink: Sink) -> Iterator[Row]:
    device, num_classes, spatial = args.device, shape[1], shape[2:]
    step = _Step(shape, channels, DTYPES[args.precision], device)
    small = (2, num_classes, *(min(side, 9 + axis) for axis, side in enumerate(spatial)))
    losses: dict[Contender, Callable[[Tensor, Tensor], Tensor]] = {}
    rows: dict[Contender, Row] = {}
    for contender in _chosen(args):
        rows[contender] = Row(contender.measure, contender.library, note=disagreement(contender, small, device))
        if not rows[contender].note:
            losses[contender] = on_device(contender.make(num_classes, len(spatial)), device)
    times: dict[Contender, list[float]] = {contender: [] for contender in losses}
    order, shuffle = list(losses), random.Random(0)
    for repeat in range(args.repeats + 2):  # the first two warm up
        shuffle.shuffle(order)
        for contender in order:
            seconds = timed(functools.partial(step, losses[contender]), device)
            if repeat > 1:
                times[contender].append(seconds)
    for contender, row in rows.items():
        if contender in losses:
            row.step = [1e3 * q for q in quantiles(times[contender])]
            row.ratio = list(quantiles([own / base for own, base in zip(times[contender], times[BASELINE], strict=True)]))
            row.memory = peak_memory(functools.partial(step, losses[contender]), device) / 2**20
        cells = [row.measure, row.library, " / ".join(f"{t:.4g}" for t in row.step), " / ".join(f"{r:.3f}" for r in row.ratio)]
        about = {"shape": list(shape), "channels": list(channels), "precision": args.precision, "device": where(device, args.threads)}
        sink.row([*cells, f"{row.memory:.0f}{row.note}"], about | asdict(row))
        yield row


def _chosen(args: argparse.Namespace) -> list[Contender]:
    has_kernels = why_not_triton(torch.device(args.device)) is None
    # Ours as `backend="auto"` would have it.
    other = "densecal, torch" if has_kernels else "densecal, triton"
    chosen = [c for c in CONTENDERS if c.measure in MEASURES and c.library != other and importlib.util.find_spec(c.module)]
    return [c for c in chosen if c is BASELINE or args.only.lower() in c.measure.lower()]


class _Step:
    """A step of training on one batch of made-up images."""

    def __init__(self, shape: Sequence[int], channels: Sequence[int], dtype: torch.dtype, device: str) -> None:
        from densecal.models import unet

        n, num_classes, *spatial = shape
        torch.manual_seed(0)
        self.network: nn.Module = unet(1, num_classes, spatial_dims=len(spatial), channels=channels).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.images = torch.randn(n, 1, *spatial, device=device)
        self.labels = label_map(shape, "regions", device)
        self.autocast: Any = torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)

    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            logits = self.network(self.images)
        loss(logits, self.labels).backward()
        self.optimizer.step()
