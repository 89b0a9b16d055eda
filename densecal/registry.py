"""Find a method by its name.

A file that registers a class under a name is all it takes to add one: the registry imports the modules of its package the first time it is asked.

Example:
    >>> from densecal.registry import Registry
    >>> registry = Registry("target", "densecal.targets")
    >>> @registry.register("doubled")
    ... class Doubled: ...
    >>> registry.create("doubled").__class__.__name__
    'Doubled'
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["CALIBRATORS", "LOSSES", "METRICS", "MODELS", "TARGETS", "TERMS", "Registry", "near_matches"]

F = TypeVar("F", bound=Callable[..., Any])


def near_matches(name: str, valid: Iterable[str], *, more: Iterable[str] = ()) -> str:
    """Sentence for an error text: the nearest valid names, then all of them.

    Args:
        name: What was given.
        valid: The names.
        more: Further names, too many to list.

    Example:
        >>> near_matches("slvs", ["nacl", "svls"])
        "Did you mean 'svls'? Valid: nacl, svls."
        >>> near_matches("slvs", ["nacl"], more=["svls", "acls"])
        "Did you mean 'svls'? Valid: nacl, and 2 more."
    """
    names, others = sorted(valid), list(more)
    near = difflib.get_close_matches(name, [*names, *others], n=3)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{hint}Valid: {', '.join(names)}{f', and {len(others)} more' if others else ''}."


class Registry:
    """Names of one kind of thing (targets, terms, losses, ...) and what they build.

    Args:
        kind: The word for error texts.
        package: Package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Callable[..., Any]] = {}
        self._families: list[tuple[Callable[[], Iterable[str]], Callable[[str], Callable[..., Any] | None]]] = []
        self._discovered = False

    def register(self, name: str) -> Callable[[F], F]:
        """Class or function decorator: file it under ``name``."""

        def decorate(entry: F) -> F:
            known = self._entries.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
                raise ValueError(f"The {self.kind} name {name!r} is taken by {known.__module__}.{known.__qualname__}.")
            self._entries[name] = entry
            return entry

        return decorate

    def register_family(self, names: Callable[[], Iterable[str]]) -> Callable[[F], F]:
        """Function decorator: a function from a name to what it builds, or None, for names that are too many to be registered one by one.

        Args:
            names: Returns them.
        """

        def decorate(find: F) -> F:
            self._families.append((names, find))
            return find

        return decorate

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self._discover()
        if name in self._entries:
            return self._entries[name]
        for _, find in self._families:
            if (entry := find(name)) is not None:
                return entry
        raise ValueError(f"Unknown {self.kind} {name!r}. {near_matches(name, self._entries, more=self.family_names())}")

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._entries or any(find(name) is not None for _, find in self._families)

    def family_names(self) -> Iterator[str]:
        """The names of all families."""
        self._discover()
        return itertools.chain.from_iterable(names() for names, _ in self._families)

    def create(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Build what is registered under ``name``; arguments go to its constructor."""
        return self[name](*args, **kwargs)

    def list(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell-style pattern, sorted; with a pattern of one's own, names of families too."""
        self._discover()
        names = self._entries if pattern == "*" else itertools.chain(self._entries, self.family_names())
        return sorted(fnmatch.filter(names, pattern))

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._discovered = True


TARGETS = Registry("target", "densecal.targets")
TERMS = Registry("term", "densecal.terms")
LOSSES = Registry("loss", "densecal.losses")
METRICS = Registry("metric", "densecal.metrics")
MODELS = Registry("model", "densecal.models")
CALIBRATORS = Registry("calibrator", "densecal.posthoc")
