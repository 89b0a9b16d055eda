"""Objects from the ``_target_`` nodes of configs, handed what whoever builds them knows and a config need not repeat."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from omegaconf import DictConfig

__all__ = ["accepted", "instantiate", "parameters"]


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
