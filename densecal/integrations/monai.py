"""MONAI's losses by their names and signatures, with MONAI's numbers for hard labels and the right ones for soft labels.

``from densecal.integrations.monai import DiceCELoss`` in place of ``from monai.losses import DiceCELoss`` is the whole change. What comes with it: labels
to ignore, half precision, ``torch.compile``, soft labels, named parts by ``.terms``. MONAI itself is not imported.

:class:`MetricHandler` goes the other way: any metric of this package in a MONAI workflow, or on an Ignite engine. :class:`LossHandler` tells a loss of the
epochs there, if it learns as training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from densecal.checks import check_choice, check_non_negative
from densecal.integrations.named_values import check_takes_probs, named_values
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import probabilities
from densecal.ops.overlap import overlap_sums
from densecal.ops.reduction import REDUCTIONS, reduce
from densecal.ops.soft_cross_entropy import soft_cross_entropy
from densecal.targets.base import SoftTarget, Target
from densecal.targets.one_hot import OneHotTarget, one_hot_target
from densecal.terms.base import Term
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.erf_gaussian import ErfGaussianPenalty
from densecal.terms.neighbour import NeighbourPenalty

__all__ = ["DiceCELoss", "DiceLoss", "LossHandler", "MetricHandler", "NACLLoss", "TverskyLoss"]


class NACLLoss(CompoundLoss):
    """Neighbour-aware calibration loss, as ``monai.losses.NACLLoss``: the one-hot labels are padded with zeros at the border.

    :class:`densecal.losses.NACLLoss` has borders where the class shares sum to 1, other kernels, anisotropic windows and class weights.

    Args:
        classes: Number of classes.
        dim: 2 or 3, and 1 as well.
        kernel_size: Odd side of the ``"mean"`` window, in pixels. ``"gaussian"`` does not read it.
        kernel_ops: ``"mean"``, or ``"gaussian"``: the integral of a Gaussian over each pixel, cut at 4 sigma and not normalised.
        distance_type: ``"l1"`` or ``"l2"`` (squared).
        alpha: Weight of the penalty, >= 0.
        sigma: Standard deviation of ``"gaussian"``, in pixels.
        ignore_index: Label to leave out (MONAI has none).

    Raises:
        ValueError: If an option is unknown, ``kernel_size`` even, or the logits have another number of classes or dimensions.

    Example:
        >>> NACLLoss(classes=2, dim=2)(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long))  # log 2 + 0.1 * mean share, 49 / 81 / 2
        tensor(0.7234)
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        kernel_size: int = 3,
        kernel_ops: Literal["mean", "gaussian"] = "mean",
        distance_type: Literal["l1", "l2"] = "l1",
        alpha: float = 0.1,
        sigma: float = 1.0,
        *,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        check_choice("kernel_ops", kernel_ops, ("mean", "gaussian"))
        check_choice("distance_type", distance_type, ("l1", "l2"))
        check_choice("dim", dim, (1, 2, 3))
        penalty: Term
        if kernel_ops == "mean":
            penalty = NeighbourPenalty(distance=distance_type, kernel_size=kernel_size, border="zeros")
        else:
            penalty = ErfGaussianPenalty(distance=distance_type, sigma=sigma)
        super().__init__(
            OneHotTarget(ignore_index=ignore_index),
            {"ce": {"weight": 1.0, "term": CrossEntropy()}, "neighbour": {"weight": alpha, "term": penalty}},
        )
        self.classes, self.dim = classes, dim

    def terms(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        if logits.ndim != self.dim + 2 or logits.shape[1] != self.classes:
            raise ValueError(f"Expected logits of {self.classes} classes and {self.dim} spatial dimensions, but got {tuple(logits.shape)}.")
        return super().terms(logits, target, context=context)


class DiceLoss(CompoundLoss):
    """Dice or Jaccard loss, as ``monai.losses.DiceLoss``; for soft labels its value with ``soft_label=True``, which is 0 at prediction = target.

    Args:
        include_background: Count channel 0.
        to_onehot_y: The labels are a label map.
        sigmoid: Predictions are logits of regions.
        softmax: Predictions are logits of classes. With neither, they are probabilities.
        other_act: Makes probabilities, in [0, 1], of the predictions instead.
        squared_pred: Cardinalities are sums of squares.
        jaccard: Jaccard for Dice.
        reduction: ``"mean"`` or ``"sum"`` over images and channels, or ``"none"``.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0.
        batch: One score per channel over the whole batch.
        weight: One weight per counted channel, or one for all; not used where there is one channel.
        soft_label: For MONAI's signature. The form here is right for soft labels, and the same for hard ones, either way.
        ignore_index: Label to leave out, in a label map, or in any channel of labels with channels. An image without any other is not averaged.

    Raises:
        ValueError: If more than one activation is chosen, ``reduction`` is unknown, or shapes or numbers of weights do not fit.

    Example:
        >>> DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0.0, smooth_dr=0.0)(torch.zeros(1, 2, 4), torch.tensor([[[0, 0, 1, 1]]]))
        tensor(0.5000)
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        term = _Overlap(
            activation=_activation(sigmoid, softmax, other_act),
            include_background=include_background,
            squared=squared_pred,
            alpha=1.0 if jaccard else 0.5,
            beta=1.0 if jaccard else 0.5,
            # 2 tp / (2 tp + fp + fn): the smoothing of the fraction's halves.
            smooth_nr=smooth_nr / 2,
            smooth_dr=smooth_dr / 2,
            batch=batch,
            reduction=reduction,
            weight=weight,
            keep_axes=True,
        )
        super().__init__(_Labels(to_onehot_y, ignore_index), {"dice": {"weight": 1.0, "term": term}})


class TverskyLoss(CompoundLoss):
    """Tversky loss, as ``monai.losses.TverskyLoss``; for soft labels its value with ``soft_label=True``.

    Args:
        include_background: Count channel 0.
        to_onehot_y: The labels are a label map.
        sigmoid: Predictions are logits of regions.
        softmax: Predictions are logits of classes. With neither, they are probabilities.
        other_act: Makes probabilities, in [0, 1], of the predictions instead.
        alpha: Weight of false positives, >= 0.
        beta: Weight of false negatives, >= 0.
        reduction: ``"mean"`` or ``"sum"`` over images and channels, or ``"none"``.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0.
        batch: One score per channel over the whole batch.
        soft_label: For MONAI's signature, as in :class:`DiceLoss`.
        ignore_index: Label to leave out.

    Raises:
        ValueError: As :class:`DiceLoss`.

    Example:
        >>> loss = TverskyLoss(softmax=True, to_onehot_y=True, alpha=1.0, beta=1.0, smooth_nr=0.0, smooth_dr=0.0)
        >>> loss(torch.zeros(1, 2, 4), torch.tensor([[[0, 0, 1, 1]]]))
        tensor(0.6667)
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: Literal["mean", "sum", "none"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        term = _Overlap(
            activation=_activation(sigmoid, softmax, other_act),
            include_background=include_background,
            alpha=alpha,
            beta=beta,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            reduction=reduction,
        )
        super().__init__(_Labels(to_onehot_y, ignore_index), {"tversky": {"weight": 1.0, "term": term}})


class DiceCELoss(CompoundLoss):
    """Dice plus cross-entropy, as ``monai.losses.DiceCELoss``. With one channel the second part is binary cross-entropy.

    Args:
        include_background: Count channel 0 in the Dice part.
        to_onehot_y: The labels are a label map.
        sigmoid: The Dice part takes a sigmoid. The cross-entropy of several channels is that of a softmax all the same, as in MONAI.
        softmax: The Dice part takes a softmax.
        other_act: Makes probabilities, in [0, 1], for the Dice part instead.
        squared_pred: Cardinalities are sums of squares.
        jaccard: Jaccard for Dice.
        reduction: ``"mean"`` or ``"sum"``.
        smooth_nr: Added to the numerator, >= 0.
        smooth_dr: Added to the denominator, >= 0.
        batch: One Dice per channel over the whole batch.
        weight: One weight per channel, background included; of the positive pixels where there is one channel.
        lambda_dice: Weight of the Dice part, >= 0.
        lambda_ce: Weight of the cross-entropy, >= 0.
        label_smoothing: Share spread over the classes in the cross-entropy, in [0, 1].
        ignore_index: Label to leave out (MONAI has none here).

    Raises:
        ValueError: As :class:`DiceLoss`, and for weights below 0.

    Example:
        >>> loss = DiceCELoss(softmax=True, to_onehot_y=True)
        >>> {name: round(part.item(), 3) for name, part in loss.terms(torch.zeros(1, 2, 4), torch.tensor([[[0, 0, 1, 1]]])).items()}
        {'dice': 0.5, 'ce': 0.693}
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int | None = None,
    ) -> None:
        check_choice("reduction", reduction, ("mean", "sum"))
        check_non_negative("lambda_dice", lambda_dice)
        check_non_negative("lambda_ce", lambda_ce)
        dice = _Overlap(
            activation=_activation(sigmoid, softmax, other_act),
            include_background=include_background,
            squared=squared_pred,
            alpha=1.0 if jaccard else 0.5,
            beta=1.0 if jaccard else 0.5,
            smooth_nr=smooth_nr / 2,
            smooth_dr=smooth_dr / 2,
            batch=batch,
            reduction=reduction,
            weight=weight if weight is None or include_background else weight[1:],
        )
        ce = _CrossEntropy(weight, label_smoothing, reduction)
        super().__init__(_Labels(to_onehot_y, ignore_index), {"dice": {"weight": lambda_dice, "term": dice}, "ce": {"weight": lambda_ce, "term": ce}})


class MetricHandler:
    """A metric of this package on an Ignite engine, such as MONAI's ``SupervisedEvaluator``: its value is in ``engine.state.metrics`` at the end of an epoch.

    In a MONAI workflow it is a ``key_val_metric`` or one of ``additional_metrics``, under the name given there, or one of ``val_handlers``, under its own
    ``name``. Put it before ``MetricsSaver`` or ``StatsHandler``. It takes whole batches and, as MONAI decollates them, lists of images of any sizes. Over
    several processes the value is that of all of them together.

    Args:
        metric: The metric; it is reset when an epoch starts, and moved to the device of the predictions.
        name: Where the value goes, unless :meth:`attach` says. A metric with several named values writes each under ``<name>_<its name>``.
        output_transform: Takes ``engine.state.output`` and returns what the metric's ``update`` takes, in its order: predictions, labels, perhaps a mask; each
            a tensor with a batch axis, or a list of tensors without one. ``monai.handlers.from_engine(["pred", "label"])`` is one. By default the entries
            ``"pred"`` and ``"label"`` of a dict, or of a list of dicts.
        from_logits: The predictions are logits, which become probabilities as the metric's ``activation`` says (softmax where it has none). False: they are
            probabilities, as after ``Activationsd(keys="pred", softmax=True)``.
        save_details: Feed the metric image by image and keep the value of each in ``engine.state.metric_details``, for ``MetricsSaver``:
            ``(images, values)``, as for example the calibration error within each image. Not for metrics with several named values.
        before_postprocessing: Look at what the network gave, before the workflow's ``postprocessing``, and then mostly ``from_logits``. MONAI's recipes
            end theirs with ``AsDiscreted``, after which no confidence is left to measure.

    Raises:
        TypeError: If ``metric`` is not a ``torchmetrics.Metric``.
        ValueError: If ``from_logits`` and the metric takes logits itself.

    Example:
        >>> from ignite.engine import Engine
        >>> from densecal.metrics import ExpectedCalibrationError
        >>> engine = Engine(lambda engine, batch: {"pred": batch, "label": torch.tensor([[0, 1]])})
        >>> MetricHandler(ExpectedCalibrationError(), "ece").attach(engine)
        >>> engine.run([torch.tensor([[[0.8, 0.8], [0.2, 0.2]]])]).metrics["ece"]  # confidence 0.8, one of two right
        0.300...
    """

    def __init__(
        self,
        metric: Metric,
        name: str | None = None,
        *,
        output_transform: Callable[[Any], Sequence[Any]] | None = None,
        from_logits: bool = False,
        save_details: bool = False,
        before_postprocessing: bool = False,
    ) -> None:
        if not isinstance(metric, Metric):
            raise TypeError(f"Expected `metric` to be a torchmetrics.Metric, as those of densecal.metrics, but got {type(metric).__name__}.")
        if from_logits:
            check_takes_probs("`metric`", metric)
        self.metric, self.name, self.from_logits, self.save_details = metric, name, from_logits, save_details
        self.output_transform = _pred_and_label if output_transform is None else output_transform
        self.before_postprocessing = before_postprocessing
        self.details: list[Tensor] = []

    def attach(self, engine: Any, name: str | None = None) -> None:
        """Follow the epochs of an engine.

        Args:
            engine: Ignite engine.
            name: Where the value goes in ``engine.state.metrics``; by default the handler's own name.

        Raises:
            ImportError: If Ignite is not installed.
            ValueError: If there is no name, or ``before_postprocessing`` is asked for of an engine that is no MONAI workflow.
        """
        Events = _events("MetricHandler")
        self.name = self.name if name is None else name
        if self.name is None:
            raise ValueError(
                "Expected a name for the metric's value, but got none. Give MetricHandler a `name`, or attach it as a key or additional metric."
            )
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        if self.before_postprocessing:
            _before_postprocessing(engine, self._update)
        else:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Any) -> None:
        self.metric.reset()
        self.details = []

    @torch.no_grad()
    def _update(self, engine: Any) -> None:
        for prediction, *rest in self._parts(self.output_transform(engine.state.output)):
            if self.metric.device != prediction.device:
                self.metric.to(prediction.device)
            if self.from_logits:
                prediction = probabilities(prediction, getattr(self.metric, "activation", "softmax"))
            if self.save_details:
                value = self.metric(prediction, *rest)  # adds the image and returns its own value
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"Expected one value or one per class for `save_details`, but {type(self.metric).__name__} has several named ones."
                    )
                self.details.append(value.reshape(1, -1))
            else:
                self.metric.update(prediction, *rest)

    def _finish(self, engine: Any) -> None:
        assert self.name is not None  # attach() has checked
        values = named_values(self.name, self.metric.compute())
        engine.state.metrics |= {key: one.item() if one.ndim == 0 else one.cpu() for key, one in values.items()}
        if self.save_details:
            if not hasattr(engine.state, "metric_details"):
                engine.state.metric_details = {}
            engine.state.metric_details[self.name] = self._all_details()

    def _parts(self, output: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """What goes into one update each: a batch, or an image where images come in a list or are looked at one by one."""
        if self.save_details or any(isinstance(part, (list, tuple)) for part in output):
            yield from zip(*(part.split(1) if isinstance(part, Tensor) else [one.unsqueeze(0) for one in part] for part in output), strict=True)
        else:
            yield tuple(output)

    def _all_details(self) -> Tensor:
        """Of all processes, rank by rank, as MONAI gathers the names of files."""
        details = torch.cat(self.details) if self.details else torch.zeros(0, 1, dtype=torch.float64, device=self.metric.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            details = torch.cat([part for part in gather_all_tensors(details) if len(part)] or [details])
        return details.cpu()


class LossHandler:
    """Tells a loss of the epochs, steps and validations of a MONAI trainer, as ``densecal-train`` does. Losses that learn as training goes on, or whose
    weights and levels follow a schedule, stand still without it; the others need no handler.

    Put it into ``train_handlers`` behind ``ValidationHandler``, so that an epoch's validation is over when the epoch ends for the loss, and before
    ``CheckpointSaver``, whose ``save_dict`` may hold the loss beside the network.

    Args:
        loss: The loss, or a module around it such as ``DeepSupervisionLoss``. There is nothing to tell a loss of another library.
        validator: The evaluator whose numbers and logits the loss learns from, where it learns from any. What a loss looks for, such as ``"accuracy"``, is
            taken from the evaluator's metrics by that name.

    Raises:
        ValueError: If the loss needs side inputs, for a trainer hands over predictions and labels alone, or a validator that is not given.

    Example:
        >>> from ignite.engine import Engine
        >>> from densecal.schedules import Linear
        >>> loss = CompoundLoss(OneHotTarget(), {"ce": {"weight": Linear(1.0, 0.0), "term": CrossEntropy()}})
        >>> trainer = Engine(lambda engine, batch: print(f"epoch {engine.state.epoch}: {loss(*batch):.3f}"))
        >>> LossHandler(loss).attach(trainer)
        >>> _ = trainer.run([(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]))], max_epochs=3)
        epoch 1: 0.693
        epoch 2: 0.347
        epoch 3: 0.000
    """

    def __init__(self, loss: nn.Module, *, validator: Any = None) -> None:
        self.losses = [module for module in loss.modules() if isinstance(module, CompoundLoss)]
        self.validator = validator
        for one in self.losses:
            if one.needs:
                raise ValueError(
                    f"Expected a loss of predictions and labels alone, which is all that a MONAI trainer hands over, but {type(one).__name__} needs "
                    f"{', '.join(one.needs)}. Train it with densecal-train, or in a loop of your own."
                )
            if validator is None and (one.needs_validation or one.wants_validation_logits):
                raise ValueError(f"Expected a `validator`, from which {type(one).__name__} learns. Give the evaluator of ValidationHandler.")

    def attach(self, engine: Any) -> None:
        """Follow a trainer.

        Args:
            engine: ``SupervisedTrainer``, or any Ignite engine that trains.

        Raises:
            ImportError: If Ignite is not installed.
        """
        Events = _events("LossHandler")
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_end)
        if self.validator is not None:
            if any(loss.wants_validation_logits for loss in self.losses):
                _before_postprocessing(self.validator, self._validation_batch)
            self.validator.add_event_handler(Events.COMPLETED, self._validated)

    def _epoch(self, engine: Any) -> None:
        for loss in self.losses:
            loss.on_epoch(engine.state.epoch - 1, engine.state.max_epochs)

    def _step(self, engine: Any) -> None:
        for loss in self.losses:
            loss.on_step(engine.state.iteration - 1, engine.state.max_epochs * engine.state.epoch_length)

    def _epoch_end(self) -> None:
        for loss in self.losses:
            loss.on_epoch_end()

    def _validation_batch(self, engine: Any) -> None:
        for loss in self.losses:
            loss.on_validation_batch(*_pred_and_label(engine.state.output))

    def _validated(self, engine: Any) -> None:
        for loss in self.losses:
            loss.on_validation(engine.state.metrics)


def _events(who: str) -> Any:
    try:
        from ignite.engine import Events
    except ImportError as error:
        raise ImportError(f"{who} follows an Ignite engine, and Ignite is not installed. Run `pip install pytorch-ignite`.") from error
    return Events


def _before_postprocessing(engine: Any, handler: Callable[[Any], None]) -> None:
    """Call a handler between the network and the postprocessing of a MONAI workflow."""
    try:
        from monai.engines import IterationEvents

        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, handler)
    except (ImportError, ValueError) as error:  # of an engine that does not have the event
        raise ValueError(
            f"Expected a MONAI workflow, such as SupervisedEvaluator, to look at before its postprocessing, but got {type(engine).__name__}."
        ) from error


def _pred_and_label(output: Any) -> tuple[Any, Any]:
    if isinstance(output, Mapping):
        return output["pred"], output["label"]
    return [one["pred"] for one in output], [one["label"] for one in output]


class _Labels(Target):
    """MONAI's reading of labels: a label map of several classes with ``to_onehot_y``, else one channel per class or region, taken as it is."""

    def __init__(self, to_onehot_y: bool, ignore_index: int | None) -> None:
        super().__init__(ignore_index=DEFAULT_IGNORE_INDEX if ignore_index is None else ignore_index)
        self.to_onehot_y = to_onehot_y

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        is_map = num_classes > 1 and label.shape[1] == 1
        if is_map and not self.to_onehot_y:
            raise ValueError(f"Expected labels with {num_classes} channels, but got one. Set `to_onehot_y=True` for a label map.")
        return one_hot_target(
            label,
            num_classes,
            activation="softmax" if is_map else "sigmoid",
            ignore_index=self.ignore_index,
            spatial_dims=spatial_dims,
            dtype=dtype,
        )


class _Overlap(Term):
    """1 - (tp + nr) / (tp + alpha fp + beta fn + dr) per image and channel, with MONAI's reductions."""

    def __init__(
        self,
        *,
        activation: Literal["sigmoid", "softmax"] | Callable[[Tensor], Tensor] | None,
        include_background: bool,
        alpha: float,
        beta: float,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        reduction: Literal["mean", "sum", "none"],
        squared: bool = False,
        weight: Sequence[float] | float | Tensor | None = None,
        keep_axes: bool = False,
    ) -> None:
        single = isinstance(weight, (int, float)) or (isinstance(weight, Tensor) and weight.ndim == 0)
        super().__init__(class_weights=[float(weight)] if single else weight)  # type: ignore[arg-type]
        for name, value in (("alpha", alpha), ("beta", beta), ("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
            check_non_negative(name, value)
        check_choice("reduction", reduction, REDUCTIONS)
        self.activation, self.include_background, self.squared = activation, include_background, squared
        self.alpha, self.beta, self.smooth_nr, self.smooth_dr = alpha, beta, smooth_nr, smooth_dr
        self.batch, self.keep_axes, self.single = batch, keep_axes, single
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        first = 0 if self.include_background or logits.shape[1] == 1 else 1
        probs, q = self._probs(logits)[:, first:], target.probs[:, first:].to(logits.dtype)
        tp, fp, fn = overlap_sums(probs, q, target.valid, norm="l2" if self.squared else "l1")  # each (N, C)
        counts = target.valid.flatten(1).any(dim=1, keepdim=True).expand_as(tp)
        if self.batch:
            tp, fp, fn, counts = tp.sum(0), fp.sum(0), fn.sum(0), counts.any(dim=0)
        denominator = tp + self.alpha * fp + self.beta * fn + self.smooth_dr
        empty = denominator == 0
        score = torch.where(empty, 1.0, (tp + self.smooth_nr) / torch.where(empty, 1.0, denominator))
        values = torch.where(counts, 1.0 - score, 0.0)
        if self.class_weights is not None and values.shape[-1] != 1:
            if not self.single and self.class_weights.shape[0] != values.shape[-1]:
                raise ValueError(
                    f"Expected {values.shape[-1]} values in `weight`, one per counted channel, but got {self.class_weights.shape[0]}. "
                    "With `include_background=False` the background has none."
                )
            values = values * self.class_weights.to(values.dtype)
        if self.reduction == "none" and self.keep_axes:
            return values.reshape(*values.shape, *[1] * (logits.ndim - 2))
        return reduce(values, counts.sum(), self.reduction)

    def _probs(self, logits: Tensor) -> Tensor:
        if callable(self.activation):
            return self.activation(logits)
        if self.activation == "sigmoid":
            return logits.sigmoid()
        # A softmax of one channel is 1 everywhere; MONAI leaves it out.
        return logits.softmax(dim=1) if self.activation == "softmax" and logits.shape[1] > 1 else logits


class _CrossEntropy(Term):
    """PyTorch's cross-entropy of several channels, label map or channels; binary cross-entropy of one."""

    def __init__(self, weight: Sequence[float] | Tensor | None, smoothing: float, reduction: Literal["mean", "sum"]) -> None:
        super().__init__(class_weights=weight)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1], but got {smoothing}.")
        self.smoothing = smoothing
        self.reduction: Literal["mean", "sum"] = reduction

    def forward(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> Tensor:
        weights, q, count = self.weights_for(logits), target.probs.to(logits.dtype), target.valid.sum().to(logits.dtype)
        if logits.shape[1] == 1:
            positive = None if weights is None else weights.to(logits.dtype)
            values = F.binary_cross_entropy_with_logits(logits, q, pos_weight=positive, reduction="none").squeeze(1)
            return reduce(torch.where(target.valid, values, 0.0), count, self.reduction)
        values = soft_cross_entropy(logits, (1.0 - self.smoothing) * q + self.smoothing / logits.shape[1], target.valid, class_weights=weights)
        if weights is not None and target.label_map is not None:
            count = torch.where(target.valid, weights.to(values.dtype)[target.label_map], 0.0).sum()
        return reduce(values, count, self.reduction)


def _activation(
    sigmoid: bool, softmax: bool, other_act: Callable[[Tensor], Tensor] | None
) -> Literal["sigmoid", "softmax"] | Callable[[Tensor], Tensor] | None:
    if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
        raise ValueError(
            "Expected at most one of `sigmoid`, `softmax` and `other_act`, but got more. Choose the one that turns the output into probabilities."
        )
    if other_act is not None:
        if not callable(other_act):
            raise TypeError(f"Expected `other_act` to be a function of the predictions, but got {type(other_act).__name__}.")
        return other_act
    return "sigmoid" if sigmoid else "softmax" if softmax else None
