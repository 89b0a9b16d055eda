"""``densecal-benchmark``: ours beside others' on the same input in one run; time and memory of metrics, losses, targets and training steps, and
the speed of loading images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from densecal.cli import benchmark_losses, benchmark_metrics, benchmark_targets, benchmark_train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; exit status 1 if those compared do not give the same."""
    parser = argparse.ArgumentParser(prog="densecal-benchmark", description="Speed beside other libraries and code written by hand.")
    subjects = parser.add_subparsers(dest="subject", required=True)
    metrics = subjects.add_parser("metrics", help="time and memory of calibration errors", description="Calibration errors of several libraries.")
    benchmark_metrics.add_arguments(metrics)
    loading = subjects.add_parser("data", help="images per second", description="Our loader of images and the same pipeline written by hand.")
    _add_data_arguments(loading)
    losses = subjects.add_parser("losses", help="time and memory, forward and backward", description="Losses of several libraries.")
    benchmark_losses.add_arguments(losses)
    targets = subjects.add_parser("targets", help="time and memory of smoothed labels", description="Distributions that label maps are smoothed to.")
    benchmark_targets.add_arguments(targets)
    train = subjects.add_parser("train", help="time and memory of a training step", description="Steps of a U-Net with losses of several libraries.")
    benchmark_train.add_arguments(train)
    args = parser.parse_args(argv)
    if args.subject == "metrics":
        same = benchmark_metrics.run(args, metrics)
    elif args.subject == "losses":
        same = benchmark_losses.run(args, losses)
    elif args.subject == "targets":
        same = benchmark_targets.run(args, targets)
    elif args.subject == "train":
        same = benchmark_train.run(args, train)
    else:
        from densecal.cli.benchmark_data import run  # not all that trains is needed for metrics

        same = run(args, loading)
    if not same:
        raise SystemExit(1)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="folder of CamVid in SegNet's form (default: made-up images in a temporary folder)")
    parser.add_argument("--images", type=int, default=48, help="made-up images (default: %(default)s)")
    parser.add_argument("--size", default="512,1024", help="rows,columns of the made-up images (default: %(default)s)")
    parser.add_argument("--format", choices=["png", "jpg"], default="png", help="of the made-up images (default: %(default)s)")
    parser.add_argument("--patch", default="384,384", help="rows,columns of a patch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="patches per batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements, each an epoch (default: %(default)s)")


if __name__ == "__main__":
    main()
