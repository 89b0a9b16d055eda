"""What the integers of a label map mean: one object that every loader, metric and plot asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """Names, numbers and colours of the classes of a data set, or of the regions that are made of them.

    Classes exclude each other: a pixel has one, and a network has a channel for each under a softmax. Regions may overlap, or there may be a single one against the
    rest: each is a question of its own, a channel under a sigmoid.

    Args:
        names: Class names, class ``c`` is ``names[c]``; or names of the regions.
        ignore_index: Label that marks pixels without a class. -100, PyTorch's default, for data sets that have none.
        background: Class that is left out of foreground means, or ``None`` where every class counts (street scenes). Regions have none.
        palette: One ``(red, green, blue)`` of 0 to 255 per class or region. The default repeats a colour-blind safe list.
        activation: ``"softmax"`` for classes, ``"sigmoid"`` for regions.
        regions: The classes of a label map that make up each region; empty for classes, and where labels come as one map per region.

    Raises:
        ValueError: If there are fewer than two classes or no region, a name repeats, ``ignore_index`` is a class (or, of regions, 0 or 1), ``background`` is not,
            or palette or regions are not as many as the names.

    Example:
        >>> schema = LabelSchema(("background", "anterior", "posterior"))
        >>> schema.num_classes, schema.foreground
        (3, (1, 2))
        >>> whole = LabelSchema(("hippocampus",), background=None, activation="sigmoid", regions=((1, 2),))
        >>> whole.num_classes, whole.has_structure
        (1, True)
    """

    names: tuple[str, ...]
    ignore_index: int = DEFAULT_IGNORE_INDEX
    background: int | None = 0
    palette: tuple[tuple[int, int, int], ...] = ()
    activation: Literal["softmax", "sigmoid"] = "softmax"
    regions: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        if self.activation not in ("softmax", "sigmoid"):
            raise ValueError(f"Expected `activation` to be one of ('softmax', 'sigmoid'), but got {self.activation!r}.")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Expected every class name once, but got {repeated} more than once.")
        if self.activation == "softmax":
            self._check_classes(names)
        else:
            self._check_regions(names)
        default = _DEFAULT_PALETTE if self.activation == "softmax" else _DEFAULT_PALETTE[1:]
        palette: Sequence[Sequence[int]] = self.palette or [default[c % len(default)] for c in range(len(names))]
        if len(palette) != len(names):
            raise ValueError(f"Expected one palette colour for each of the {len(names)} classes, but got {len(palette)}.")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "palette", tuple(tuple(int(v) for v in colour) for colour in palette))
        object.__setattr__(self, "regions", tuple(tuple(int(c) for c in region) for region in self.regions))

    def _check_classes(self, names: Sequence[str]) -> None:
        if len(names) < 2:
            raise ValueError(f"Expected at least two class names, but got {list(names)}. A binary task has a background and a foreground class.")
        if 0 <= self.ignore_index < len(names):
            raise ValueError(f"Expected `ignore_index` outside the classes 0 to {len(names) - 1}, but got {self.ignore_index}.")
        if self.background is not None and not 0 <= self.background < len(names):
            raise ValueError(f"Expected `background` to be a class of 0 to {len(names) - 1} or None, but got {self.background}.")
        if self.regions:
            raise ValueError(f"Expected `regions` with activation='sigmoid' alone, but got {self.regions} with 'softmax'.")

    def _check_regions(self, names: Sequence[str]) -> None:
        if not names:
            raise ValueError("Expected at least one region, but got none.")
        if 0 <= self.ignore_index <= 1:
            raise ValueError(f"Expected `ignore_index` other than the 0 and 1 of a region, but got {self.ignore_index}.")
        if self.background is not None:
            raise ValueError(f"Expected no `background` with activation='sigmoid', where every region counts, but got {self.background}.")
        if self.regions and len(self.regions) != len(names):
            raise ValueError(f"Expected `regions` to say what each of {list(names)} is made of, but got {len(self.regions)} of them.")

    @property
    def num_classes(self) -> int:
        """Number of classes or regions: the channels of a network."""
        return len(self.names)

    @property
    def num_outcomes(self) -> int:
        """Number of outcomes that exclude each other: the classes; of a region two, outside and inside. Its inverse is the lowest confidence there can be."""
        return len(self.names) if self.activation == "softmax" else 2

    @property
    def has_structure(self) -> bool:
        """Whether there is a structure before a background: classes of which one is the background, or regions."""
        return self.background is not None or self.activation == "sigmoid"

    @property
    def foreground(self) -> tuple[int, ...]:
        """The classes that foreground means run over."""
        return tuple(c for c in range(self.num_classes) if c != self.background)
