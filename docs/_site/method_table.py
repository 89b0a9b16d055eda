"""The methods of the README's table, the one list of them."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Method", "read_methods"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Method:
    """A row: its name, its papers as Markdown, its classes, its configs."""

    name: str
    papers: str
    entries: tuple[Any, ...]
    configs: tuple[str, ...]
    how: str

    @property
    def slug(self) -> str:
        """Its name in addresses: that of its first config or, without one, of its class."""
        return self.configs[0].partition("=")[2] if self.configs else self.entries[0].__name__.lower()

    @property
    def family(self) -> str:
        """``targets``, ``terms`` or ``perturbation``: the package of its first part; ``losses`` where it has none of its own."""
        packages = [entry.__module__.split(".")[1] for entry in self.entries]
        return next((package for package in packages if package != "losses"), "losses")


def read_methods() -> list[Method]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Methods\n")[2].partition("\n## ")[0]
    methods = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if len(cells) == 4 and "`" in cells[2]:
            name, papers, classes, how = cells
            entries = [getattr(importlib.import_module(f"densecal.{package}"), entry) for package, entry in re.findall(r"`(\w+)\.(\w+)`", classes)]
            methods.append(Method(name, papers, tuple(entries), tuple(re.findall(r"`(\w+=\w+)`", how)), how))
    return methods
