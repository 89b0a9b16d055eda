"""A target turns a label map into a distribution per pixel; a :class:`SoftTarget` carries it, and builds it only for those who read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from densecal.checks import check_choice
from densecal.labels import DEFAULT_IGNORE_INDEX, LabelSchema
from densecal.ops import slab_losses
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend, NotCovered, say_once, why_not_triton
from densecal.ops.label_losses import LabelShares
from densecal.ops.neighbourhood import Border, Kernel, normalized_convolution

if TYPE_CHECKING:
    from densecal.targets.one_hot import LabelMap

__all__ = ["Neighbourhood", "Recipe", "SoftTarget", "Target", "Uniform", "check_activation", "smooth_evenly"]


class Recipe:
    """How a target follows from the labels. The torch path calls it; fused kernels take what :meth:`label_shares` gives."""

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        """Distribution ``(N, C, *spatial)`` from one-hot or soft labels of that shape, both 0 where not ``valid`` ``(N, *spatial)``."""
        raise NotImplementedError

    def label_shares(self, spatial_dims: int) -> LabelShares:
        """The same distribution of a label map as a fused kernel takes it.

        Args:
            spatial_dims: Number of spatial axes of the label map.

        Raises:
            NotCovered: If none computes it.
        """
        raise NotCovered(f"no kernel computes the distribution {type(self).__name__}")


def smooth_evenly(one_hot: Tensor, valid: Tensor, activation: Activation, share: float | Tensor) -> Tensor:
    """Take ``share`` (a number, or a tensor that broadcasts against ``one_hot``) from each pixel and spread it over all outcomes."""
    # A region is there or it is not: two outcomes per channel.
    outcomes = one_hot.shape[1] if activation == "softmax" else 2
    return torch.where(valid.unsqueeze(1), (1.0 - share) * one_hot + share / outcomes, 0.0)


@dataclass(frozen=True)
class Uniform(Recipe):
    """The same share ``smoothing`` taken from every pixel and spread over all classes; 0 is the labels themselves."""

    smoothing: float | Tensor = 0.0

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        if not isinstance(self.smoothing, Tensor) and self.smoothing == 0:  # a tensor is not looked at: that would wait for the device
            return one_hot
        return smooth_evenly(one_hot, valid, activation, self.smoothing)

    def label_shares(self, spatial_dims: int) -> LabelShares:
        if (
            isinstance(self.smoothing, Tensor)
            and self.smoothing.ndim > 0
            and (self.smoothing.ndim != spatial_dims + 2 or any(n > 1 for n in self.smoothing.shape[1:]))
        ):
            raise NotCovered("a smoothing that varies within an image is in no kernel")
        if isinstance(self.smoothing, Tensor) and self.smoothing.requires_grad:
            raise NotCovered("the gradient of a smoothing is in no kernel")
        return LabelShares(smoothing=self.smoothing)


@dataclass(frozen=True)
class Neighbourhood(Recipe):
    """Shares of the classes in a window around each pixel."""

    kernel: Kernel
    border: Border = "replicate"

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        return normalized_convolution(one_hot, valid, self.kernel, border=self.border)

    def label_shares(self, spatial_dims: int) -> LabelShares:
        return LabelShares(kernel=self.kernel, border=self.border)


class SoftTarget:
    """Labels of a batch, which pixels count, and the recipe of the distribution.

    Args:
        labels: A label map as it came; ``None`` where the labels came as soft labels or regions.
        soft_labels: The given distribution ``(N, C, *spatial)``, 0 where not valid; ``None`` where there are ``labels``.
        valid: False where a pixel is ignored, ``(N, *spatial)``, bool; ``None`` where there are ``labels``, which know.
        num_classes: Number of classes or regions C.
        recipe: How ``probs`` follows from the labels.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        hard: Whether the labels said one class, or yes or no, for each pixel, before any smoothing.
        dtype: Floating type of ``probs``.
        backend: ``"torch"`` takes no kernel; otherwise one makes ``probs`` and ``one_hot`` of a label map on a GPU, where it covers the recipe. A loss
            gives its own to what its target makes.
    """

    def __init__(
        self,
        *,
        labels: LabelMap | None,
        soft_labels: Tensor | None,
        valid: Tensor | None,
        num_classes: int,
        recipe: Recipe,
        activation: Activation = "softmax",
        hard: bool = True,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        self.labels = labels
        self.num_classes = num_classes
        self.recipe = recipe
        self.activation: Activation = activation
        self.hard = hard
        self.dtype = dtype
        self.backend: Backend = backend
        self._valid = valid
        self._one_hot = soft_labels
        self._probs: Tensor | None = None
        self._shares: LabelShares | None = None

    def with_recipe(self, recipe: Recipe, *, hard: bool) -> SoftTarget:
        """The same labels and valid pixels under another recipe."""
        return SoftTarget(
            labels=self.labels,
            soft_labels=self._one_hot,
            valid=self._valid,
            num_classes=self.num_classes,
            recipe=recipe,
            activation=self.activation,
            hard=hard,
            dtype=self.dtype,
            backend=self.backend,
        )

    @property
    def label_map(self) -> Tensor | None:
        """Integer classes ``(N, *spatial)``, int64, 0 where not valid; ``None`` where the labels came as soft labels or regions."""
        return None if self.labels is None else self.labels.classes

    @property
    def valid(self) -> Tensor:
        """False where a pixel is ignored, ``(N, *spatial)``, bool."""
        if self._valid is None:
            assert self.labels is not None
            return self.labels.valid
        return self._valid

    @property
    def shares(self) -> LabelShares:
        """The distribution as a fused kernel takes it, the same object each time; :class:`densecal.ops.backend.NotCovered` where none does."""
        if self._shares is None:
            self._shares = self.recipe.label_shares(self.labels_as_given().given.ndim - 1)
        return self._shares

    def labels_as_given(self) -> LabelMap:
        """The label map for a fused kernel; :class:`densecal.ops.backend.NotCovered` where the labels are none."""
        if self.activation != "softmax":
            raise NotCovered(f"kernels do not compute activation={self.activation!r}")
        if self.labels is None:
            raise NotCovered("kernels read label maps, not soft labels")
        return self.labels

    @property
    def one_hot(self) -> Tensor:
        """The labels before smoothing, ``(N, C, *spatial)``: one-hot, or the soft labels as given; 0 where not valid."""
        if self._one_hot is None:
            self._one_hot = self._made_of_labels(LabelShares)
        if self._one_hot is None:
            label_map = self.label_map
            assert label_map is not None
            index = label_map.unsqueeze(1)
            zeros = torch.zeros(index.shape[0], self.num_classes, *index.shape[2:], dtype=self.dtype, device=index.device)
            self._one_hot = zeros.scatter_(1, index, self.valid.unsqueeze(1).to(self.dtype))
        return self._one_hot

    @property
    def probs(self) -> Tensor:
        """The distribution ``(N, C, *spatial)``; under softmax it sums to 1 over C where ``valid`` is True. 0 where not valid."""
        if self._probs is None:
            self._probs = self._made_of_labels(lambda: self.shares)
        if self._probs is None:
            self._probs = self.recipe(self.one_hot, self.valid, self.activation)
        return self._probs

    def _made_of_labels(self, which: Callable[[], LabelShares]) -> Tensor | None:
        """A distribution where it is made of a label map with nothing else of its size; None elsewhere."""
        if self.labels is None or torch.compiler.is_compiling():
            return None
        labels = self.labels.given
        if self.backend == "torch" and labels.device.type != "cpu":
            return None
        try:
            shares = which()
            if shares.is_one_hot and self._one_hot is not None:
                return self._one_hot
            made = _maker(labels.device, shares)(labels, self.num_classes, shares, ignore_index=self.labels.ignore_index, dtype=self.dtype)
        except NotCovered as uncovered:
            if labels.is_cuda:
                say_once(str(uncovered))
            return None
        if shares.is_one_hot:
            self._one_hot = made
        return made


def _maker(device: torch.device, shares: LabelShares) -> Callable[..., Tensor]:
    """Who makes a distribution of a label map: a kernel on a GPU, slabs on a CPU."""
    if device.type == "cpu":
        if shares.is_one_hot:
            raise NotCovered("zeros into which ones are scattered take a CPU less time")
        return slab_losses.label_shares
    if (reason := why_not_triton(device)) is not None:
        raise NotCovered(reason)
    from densecal.ops.triton.label_shares import label_shares

    return label_shares


class Target(nn.Module):
    """Base of all targets. A subclass gives ``forward`` and, if it needs side inputs, names them in ``needs``.

    Args:
        activation: ``"softmax"`` for classes of which a pixel has one, ``"sigmoid"`` for a single foreground or overlapping regions.
        ignore_index: Label that marks pixels to leave out.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, *, activation: Activation = "softmax", ignore_index: int = DEFAULT_IGNORE_INDEX) -> None:
        super().__init__()
        check_choice("activation", activation, ("softmax", "sigmoid"))
        self.activation: Activation = activation
        self.ignore_index = ignore_index

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        """Make the target.

        Args:
            label: Label map or soft labels; see :func:`densecal.targets.one_hot.one_hot_target` for the shapes.
            num_classes: Number of classes or regions C.
            spatial_dims: Number of spatial axes, where the shape of ``label`` leaves room for doubt.
            dtype: Floating type of the distribution.
            context: The side inputs named in ``needs``.
        """
        raise NotImplementedError

    def take_ignore_index(self, ignore_index: int, name: str, giver: str) -> None:
        """Ignore the label that a part around this target ignores, in targets inside of it too.

        Args:
            ignore_index: The label.
            name: What this target is called in the error text.
            giver: What the part around it is called there.

        Raises:
            ValueError: If a target was told to ignore another label.
        """
        for module in self.modules():
            if isinstance(module, Target):
                if module.ignore_index not in (DEFAULT_IGNORE_INDEX, ignore_index):
                    raise ValueError(
                        f"Expected one label to ignore, but {name} ignores {module.ignore_index} and {giver} {ignore_index}. Give it to one of them."
                    )
                module.ignore_index = ignore_index

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        """Called before epoch ``epoch`` of ``max_epochs``, counted from 0."""

    def on_step(self, step: int, max_steps: int) -> None:
        """Called before step ``step`` of ``max_steps`` of the optimizer, counted from 0; again where a step takes several batches."""

    def on_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        """Called while training, if ``wants_training_logits``, with the logits of each batch, once and at full resolution, before the step and without gradient.

        Args:
            logits: ``(N, C, *spatial)``, of at least single precision, 0 at ignored pixels.
            target: What the terms are handed.
            context: The side inputs named in ``needs``.
        """

    def on_epoch_end(self) -> None:
        """Called after an epoch and the validation that belongs to it."""

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        """Called after validation with its numbers."""

    @property
    def wants_training_logits(self) -> bool:
        """Whether :meth:`on_batch` does anything."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether nothing is learned from :meth:`on_batch` without a validation."""
        return False

    def numbers(self) -> dict[str, float]:
        """What to log of the present state, by name."""
        return {}

    def case_levels(self) -> dict[str, dict[str, float]]:
        """Numbers that training cases have each for themselves: name -> case id -> number."""
        return {}

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, ignore_index={self.ignore_index}"


def check_activation(loss: nn.Module, schema: LabelSchema) -> None:
    """Hold the targets in a loss against what a data set's labels are.

    Raises:
        ValueError: If one is for classes where there are regions, or the other way round.
    """
    other = next((module for module in loss.modules() if isinstance(module, Target) and module.activation != schema.activation), None)
    if other is not None:
        what = "The classes of a label map exclude each other." if schema.activation == "softmax" else "Regions are independent of each other."
        raise ValueError(
            f"Expected a loss with activation={schema.activation}, but got {other.activation} in its {type(other).__name__}. {what} Leave `activation` out of the "
            "loss's settings, or choose another loss."
        )
