"""What the integers of a label map mean: one object that every loader, metric and plot asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["DEFAULT_IGNORE_INDEX", "LabelSchema"]

DEFAULT_IGNORE_INDEX = -100
"""PyTorch's value. Padding is filled with it, so that a padded pixel is never counted, even where a data set has no ignore label."""

# Okabe and Ito's colours, told apart by readers with any kind of colour vision, after a neutral background.
_DEFAULT_PALETTE = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


@dataclass(frozen=True)
class LabelSchema:
    """Names, numbers and colours of the classes of a data set.

    Args:
        names: Class names; class ``c`` is ``names[c]``.
        ignore_index: Label that marks pixels without a class. -100, PyTorch's default, for data sets that have none.
        background: Class that is left out of foreground means, or ``None`` where every class counts (street scenes).
        palette: One ``(red, green, blue)`` of 0 to 255 per class. The default repeats a colour-blind safe list.

    Raises:
        ValueError: If there are fewer than two names, a name repeats, ``ignore_index`` is a class, ``background`` is not, or the palette has
            another length than ``names``.

    Example:
        >>> schema = LabelSchema(("background", "anterior", "posterior"))
        >>> schema.num_classes, schema.foreground
        (3, (1, 2))
    """

    names: tuple[str, ...]
    ignore_index: int = DEFAULT_IGNORE_INDEX
    background: int | None = 0
    palette: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        if len(names) < 2:
            raise ValueError(f"Expected at least two class names, but got {list(names)}. A binary task has a background and a foreground class.")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Expected every class name once, but got {repeated} more than once.")
        if 0 <= self.ignore_index < len(names):
            raise ValueError(f"Expected `ignore_index` outside the classes 0 to {len(names) - 1}, but got {self.ignore_index}.")
        if self.background is not None and not 0 <= self.background < len(names):
            raise ValueError(f"Expected `background` to be a class of 0 to {len(names) - 1} or None, but got {self.background}.")
        palette: Sequence[Sequence[int]] = self.palette or [_DEFAULT_PALETTE[c % len(_DEFAULT_PALETTE)] for c in range(len(names))]
        if len(palette) != len(names):
            raise ValueError(f"Expected one palette colour for each of the {len(names)} classes, but got {len(palette)}.")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "palette", tuple(tuple(int(v) for v in colour) for colour in palette))

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def foreground(self) -> tuple[int, ...]:
        """The classes that foreground means run over."""
        return tuple(c for c in range(self.num_classes) if c != self.background)
