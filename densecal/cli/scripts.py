"""What ``densecal-train`` and the other commands start: the ``main`` of their module, or a line that says what to install."""

from __future__ import annotations

import importlib
from collections.abc import Callable

__all__ = ["benchmark", "calibrate", "check", "compare", "corrupt", "evaluate", "find_label_errors", "predict", "soft_labels", "train"]


def _command(name: str, module: str) -> Callable[[], None]:
    def main() -> None:
        try:
            start = importlib.import_module(f"densecal.cli.{module}").main
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "densecal"):
                raise
            raise SystemExit(f"{name}: the package {package!r} is not installed. It comes with `pip install 'densecal[train]'`.") from None
        start()

    main.__doc__ = f"``{name}``; see :mod:`densecal.cli.{module}`."
    return main


benchmark = _command("densecal-benchmark", "benchmark")
calibrate = _command("densecal-calibrate", "calibrate")
check = _command("densecal-check", "check_data")
compare = _command("densecal-compare", "compare")
corrupt = _command("densecal-corrupt", "corrupt_labels")
evaluate = _command("densecal-evaluate", "evaluate")
find_label_errors = _command("densecal-find-label-errors", "find_label_errors")
predict = _command("densecal-predict", "predict")
soft_labels = _command("densecal-soft-labels", "soft_labels")
train = _command("densecal-train", "train")
