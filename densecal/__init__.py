"""Segmentation models whose confidence means what it says.

Everything here finds its parts by name: ``list_losses()`` says which names there are, ``create_loss("svls", sigma=2.0)`` builds one. The packages
behind the names are imported when they are first asked for.
"""

from __future__ import annotations

from typing import Any

from densecal.registry import CALIBRATORS, LOSSES, METRICS, MODELS, TARGETS

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "create_calibrator",
    "create_loss",
    "create_metric",
    "create_model",
    "create_target",
    "list_calibrators",
    "list_losses",
    "list_metrics",
    "list_models",
    "list_targets",
]


def create_loss(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a loss, an ``nn.Module`` with ``forward(logits, target) -> Tensor``.

    Args:
        name: One of :func:`list_losses`.
        args: Positional arguments of its constructor.
        kwargs: Keyword arguments of its constructor.

    Raises:
        ValueError: If there is no such loss; the text names the nearest.

    Example:
        >>> import torch
        >>> create_loss("svls", ignore_index=255)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
        tensor(0.6931)
    """
    return LOSSES.create(name, *args, **kwargs)


def create_target(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a target, which turns labels into a distribution per pixel. Arguments and errors as :func:`create_loss`.

    Example:
        >>> import torch
        >>> create_target("label_smoothing", smoothing=0.2)(torch.tensor([[0]]), 2).probs[0, :, 0]
        tensor([0.9000, 0.1000])
    """
    return TARGETS.create(name, *args, **kwargs)


def create_metric(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a ``torchmetrics.Metric``. Arguments and errors as :func:`create_loss`."""
    return METRICS.create(name, *args, **kwargs)


def create_calibrator(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a post-hoc calibrator, fitted after training and applied to logits or probabilities. Arguments and errors as :func:`create_loss`.

    Example:
        >>> create_calibrator("temperature", num_classes=3).temperature
        tensor(1., dtype=torch.float64)
    """
    return CALIBRATORS.create(name, *args, **kwargs)


def create_model(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a network that returns raw logits ``(N, C, *spatial)``; needs the extra ``train``.

    Args:
        name: One of :func:`list_models`, or for images ``<architecture>_<encoder>``: ``"unet_resnet18"``, ``"deeplabv3plus_resnet101"``, ``"segformer_mit_b0"``, or
            with an encoder of timm's ``"unet_tu-convnext_tiny"``; :func:`densecal.models.smp` has the arguments.
        args: Positional arguments of its constructor.
        kwargs: Keyword arguments of its constructor.

    Raises:
        ValueError: If there is no such network; the text names the nearest.

    Example:
        >>> import torch
        >>> create_model("unet_resnet18", in_channels=3, num_classes=11)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 11, 64, 64])
    """
    return MODELS.create(name, *args, **kwargs)


def list_losses(pattern: str = "*") -> list[str]:
    """Names of the losses that match a shell-style pattern.

    Example:
        >>> list_losses("n*")
        ['nacl']
    """
    return LOSSES.list(pattern)


def list_targets(pattern: str = "*") -> list[str]:
    """Names of the targets that match a shell-style pattern."""
    return TARGETS.list(pattern)


def list_calibrators(pattern: str = "*") -> list[str]:
    """Names of the post-hoc calibrators that match a shell-style pattern."""
    return CALIBRATORS.list(pattern)


def list_metrics(pattern: str = "*") -> list[str]:
    """Names of the metrics that match a shell-style pattern."""
    return METRICS.list(pattern)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell-style pattern; needs the extra ``train``.

    There are some 17 000 pairs of an architecture and an encoder for images; they are left out without a pattern.

    Example:
        >>> list_models()
        ['dynunet', 'segresnet', 'smp', 'swin_unetr', 'unet']
        >>> list_models("fpn_mit_b*")
        ['fpn_mit_b0', 'fpn_mit_b1', 'fpn_mit_b2', 'fpn_mit_b3', 'fpn_mit_b4', 'fpn_mit_b5']
    """
    return MODELS.list(pattern)
