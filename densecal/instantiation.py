"""Objects from the ``_target_`` nodes of configs, handed what whoever builds them knows and a config need not repeat."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["UntrustedConfig", "accepted", "check_trusted", "instantiate", "parameters"]

_KNOWN = (
    *(f"densecal.{name}." for name in ("inference", "losses", "models", "perturbation", "schedules", "targets", "tasks", "terms")),
    *("torch.nn.", "torch.optim.", "monai.losses.", "monai.networks.", "segmentation_models_pytorch."),
)
"""Where networks, losses and optimizers come from; what a config from elsewhere may name lies there."""


class UntrustedConfig(ValueError):
    """A config from elsewhere names code that is no network, loss or optimizer of a package that densecal knows."""


def check_trusted(config: Mapping[str, Any] | DictConfig, source: Any) -> None:
    """Hold every ``_target_`` of a config that came with a run against what is known to do no harm; nothing is imported but the packages that are known.

    A checkpoint's tensors cannot run code. Its config could, by naming any function of any package as the network.

    Args:
        config: The config.
        source: Where it is from, for the error.

    Raises:
        UntrustedConfig: If it names anything else.

    Example:
        >>> check_trusted({"model": {"_target_": "torch.nn.Conv2d"}}, "run")
        >>> check_trusted({"model": {"_target_": "os.system", "command": "true"}}, "run")
        Traceback (most recent call last):
        densecal.instantiation.UntrustedConfig: run: its config names 'os.system' as model, ...
    """
    content = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    for path, node in _targets(content, ""):
        if not _is_known(node):
            raise UntrustedConfig(
                f"{source}: its config names {node['_target_']!r} as {path}, which is no network, loss or optimizer of densecal, torch, MONAI or "
                "segmentation-models-pytorch. It was not run. If you trust whoever made it, add trust_config=true."
            )


def _targets(node: Any, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield path, node
    for name, child in children:
        yield from _targets(child, f"{path}.{name}" if path else str(name))


def _is_known(node: Mapping[Any, Any]) -> bool:
    target = node["_target_"]
    if target == "lightning.Trainer":
        return True
    if not isinstance(target, str) or not target.startswith(_KNOWN) or "trust_config" in node:
        return False
    try:
        found = hydra.utils.get_object(target)
    except Exception:
        return True  # there is no such thing, as whoever builds it will say
    # A name that begins well may end elsewhere: densecal.models.images.torch.load.
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not f"{found.__module__}.".startswith(_KNOWN):
        return False
    return target.startswith("densecal.") or (inspect.isclass(found) and issubclass(found, (nn.Module, Optimizer, LRScheduler)))


def parameters(target: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a class or function takes by name."""
    return [p.name for p in inspect.signature(target).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def accepted(target: str, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that the constructor of a ``_target_`` has: what the task knows and a config need not repeat."""
    names = parameters(hydra.utils.get_object(target))
    return {name: value for name, value in arguments.items() if name in names}


def instantiate(node: DictConfig, **known: Any) -> Any:
    """Instantiate a ``_target_`` node, handing it what it takes of what is ``known``.

    Nodes inside of it are handed what they take and do not say: a term of a composition its number of classes.
    """
    return hydra.utils.instantiate(node, **_known_inside(node, known), _convert_="all")


def _known_inside(node: DictConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``_target_`` node takes of ``known`` and, under their names, what the nodes inside it take and do not say, such as a term's ``num_classes``."""
    found = accepted(node["_target_"], **known) if "_target_" in node else {}
    for name, child in node.items():
        if isinstance(child, DictConfig) and (inside := _known_inside(child, {key: value for key, value in known.items() if key not in child})):
            found[str(name)] = inside
    return found
