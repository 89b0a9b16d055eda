"""A calibrator in one file, from which nothing is unpickled."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densecal.files import write_atomically
from densecal.posthoc.base import Calibrator
from densecal.registry import CALIBRATORS

__all__ = ["load_calibrator", "save_calibrator"]

_FORMAT = 1
_KEY = "densecal"


def save_calibrator(calibrator: Calibrator, path: Path | str, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a fitted calibrator, whole or not at all: its buffers as safetensors, its name and options as JSON in the header.

    Args:
        calibrator: One that is registered.
        path: A ``.safetensors`` file.
        facts: What else to keep, plain JSON: the cases it was fitted on, the checkpoint it belongs to.

    Returns:
        ``path``.

    Raises:
        ValueError: If it is not fitted, or not registered under a name.

    Example:
        >>> import tempfile, torch
        >>> from densecal.posthoc import TemperatureScaling
        >>> scaling = TemperatureScaling(2).fit([(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]]))])
        >>> path = save_calibrator(scaling, Path(tempfile.mkdtemp()) / "temperature.safetensors", {"cases": ["a"]})
        >>> loaded, facts = load_calibrator(path)
        >>> type(loaded).__name__, float(loaded.temperature) == float(scaling.temperature), facts
        ('TemperatureScaling', True, {'cases': ['a']})
    """
    from safetensors.torch import save

    if not int(calibrator.num_pixels):
        raise ValueError(f"Expected a fitted {type(calibrator).__name__}. Call `fit` first.")
    name = next((name for name in CALIBRATORS.list() if CALIBRATORS[name] is type(calibrator)), None)
    if name is None:
        raise ValueError(f"Expected a registered calibrator, but got {type(calibrator).__name__}. Keep its `state_dict()` instead.")
    options = {key: getattr(calibrator, key) for key in inspect.signature(type(calibrator)).parameters}
    content = {"format": _FORMAT, "method": name, "options": options, "facts": dict(facts or {})}
    tensors = {key: value.contiguous() for key, value in calibrator.state_dict().items()}
    return write_atomically(Path(path), save(tensors, {_KEY: json.dumps(content)}))


def load_calibrator(path: Path | str) -> tuple[Calibrator, dict[str, Any]]:
    """Read what :func:`save_calibrator` wrote.

    Returns:
        The calibrator, on the CPU, and the facts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no calibrator of densecal's.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"calibration: no file {path}. Fit one with densecal-calibrate.")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, and this version reads {_FORMAT}")
        calibrator = CALIBRATORS.create(content["method"], **content["options"])
        calibrator.load_state_dict(tensors)
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if not isinstance(error, KeyError) else "it names no method"
        raise ValueError(f"{path}: is no calibrator of densecal's ({reason}). Fit it again with densecal-calibrate.") from error
    return calibrator, content["facts"]
