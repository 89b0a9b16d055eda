"""What benchmarks share: where and with what they ran, quantiles, memory, and rows that are printed and kept as they come."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Sink", "add_run_arguments", "begin", "give_back", "process_memory", "quantiles", "versions", "where"]


def add_run_arguments(parser: argparse.ArgumentParser, name: str, *, repeats: int, unit: str = "measurements") -> None:
    """How often, where, and into which folder; ``name`` is that of its files."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{unit} (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help=f"folder: rows are added to {name}.md and {name}.jsonl as they come, and drawn in {name}-1.png and so on"
    )


def begin(args: argparse.Namespace, parser: argparse.ArgumentParser, shapes: Sequence[str]) -> list[tuple[int, ...]]:
    """Check the arguments, set the number of threads, and return the shapes ``N,C,*spatial`` as numbers."""
    try:
        numbers = [tuple(int(n) for n in shape.split(",")) for shape in shapes]
    except ValueError:
        parser.error(f"--shape: expected numbers with commas between, but got {' '.join(shapes)}")
    if args.repeats < 1 or any(not 3 <= len(shape) <= 5 or min(shape) < 1 or shape[1] < 2 for shape in numbers):
        parser.error("expected a shape N,C,*spatial with at least 2 classes, and at least one repeat")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device")
    torch.set_num_threads(args.threads)
    return numbers


def where(device: str, threads: int) -> str:
    """The device in words.

    Example:
        >>> where("cpu", 2)
        'CPU, 2 threads'
    """
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {threads} thread{'s' if threads != 1 else ''}"


def versions(*packages: str) -> str:
    """Names and versions of packages, of those that are installed.

    Example:
        >>> versions("numpy").split()[0]
        'numpy'
    """
    found = []
    for package in packages:
        try:
            version = getattr(sys.modules.get(package), "__version__", None) or importlib.metadata.version(package)  # its own tells the build, too
            found.append(f"{package} {version}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """At 20, 50 and 80 %.

    Example:
        >>> quantiles([1.0, 2.0, 3.0])
        (1.4, 2.0, 2.6)
    """
    tensor = torch.tensor(values, dtype=torch.float64)
    low, middle, high = tensor.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return low, middle, high


def process_memory(name: str) -> int:
    """What Linux says this process has, in KiB: ``"VmRSS"`` now, ``"VmHWM"`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def give_back(device: str) -> None:
    """Give back to the system what was freed, or it would count as there before."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # the C library of Linux has it
            ctypes.CDLL(None).malloc_trim(0)


class Sink:
    """Prints lines and, where there is a folder, adds them to ``NAME.md`` and rows to ``NAME.jsonl`` there at once."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self.folder, self.name = folder, name
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        print(text, flush=True)
        self._add("md", text)

    def row(self, cells: Sequence[str], record: Mapping[str, Any]) -> None:
        """A row of the table, and all that is known of it."""
        self.line(f"| {' | '.join(cells)} |")
        self._add("jsonl", json.dumps(dict(record)))

    def bars(self, names: Sequence[str], parts: Mapping[str, Sequence[float]], title: str) -> None:
        """Bars of ms, each stacked of its parts, in ``NAME-1.png`` and so on; without Matplotlib the rows are there to be drawn elsewhere."""
        self.line("")
        if self.folder is None or not names or importlib.util.find_spec("matplotlib") is None:
            return
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
        left = [0.0] * len(names)
        for (label, values), colour in zip(parts.items(), ("#0072b2", "#e69f00"), strict=False):
            axes.barh(names, values, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="ms, median")
        figure.suptitle(title, fontsize="medium")
        if len(parts) > 1:
            axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
        taken = len(list(self.folder.glob(f"{self.name}-*.png")))
        figure.savefig(self.folder / f"{self.name}-{taken + 1}.png", dpi=150)
        pyplot.close(figure)

    def _add(self, ending: str, text: str) -> None:
        if self.folder is not None:
            with (self.folder / f"{self.name}.{ending}").open("a") as file:
                file.write(text + "\n")
