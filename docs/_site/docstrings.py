r"""Docstrings as Markdown: formulas in the notation that MathJax reads, and roles such as ``:class:`X``` as links into the reference.

As an extension of Griffe it does so for the reference; the method cards use :func:`to_markdown`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import griffe

__all__ = ["Docstrings", "to_markdown"]

BLOCK = re.compile(r"^(?P<indent> *)\.\. math::[ \n]+(?P<formula>\S.*?)(?=\n\s*\n|\Z)", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r":math:`(?P<formula>[^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|obj):`~?(?P<name>[\w.]+)`")


def to_markdown(text: str, resolve: Callable[[str], str]) -> str:
    r"""Translate what docstrings here use of reStructuredText.

    Args:
        text: Of a docstring.
        resolve: From a name in a role to the full path of what it means.

    Example:
        >>> print(to_markdown("A mean:\n\n.. math:: a &= b \\\\\n          c &= d\n\nof :math:`a`.", str))
        A mean:
        <BLANKLINE>
        $$
        \begin{aligned}
        a &= b \\
        c &= d
        \end{aligned}
        $$
        <BLANKLINE>
        of \(a\).
    """

    def block(match: re.Match[str]) -> str:
        formula = "\n".join(line.strip() for line in match["formula"].splitlines())
        if "&" in formula or r"\\" in formula:
            formula = f"\\begin{{aligned}}\n{formula}\n\\end{{aligned}}"
        return textwrap.indent(f"$$\n{formula}\n$$", match["indent"])

    def link(match: re.Match[str]) -> str:
        # A name that has no page stays as it is: the reference shows what is public.
        return f'<autoref optional identifier="{resolve(match["name"])}"><code>{match["name"].removeprefix("densecal.")}</code></autoref>'

    return ROLE.sub(link, INLINE.sub(r"\\(\g<formula>\\)", BLOCK.sub(block, text)))


def resolver(scope: griffe.Object) -> Callable[[str], str]:
    """From a name as a docstring of ``scope`` uses it to a full path."""

    def resolve(name: str) -> str:
        try:
            return scope.resolve(name)
        except (griffe.NameResolutionError, griffe.AliasResolutionError):
            return name

    return resolve


class Docstrings(griffe.Extension):
    """Translate every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        self._translate(pkg)

    def _translate(self, scope: griffe.Object) -> None:
        if scope.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", scope.docstring.value, flags=re.MULTILINE)  # the name under which Griffe knows the section
            scope.docstring.value = to_markdown(text, resolver(scope))
        for member in scope.members.values():
            if not member.is_alias:
                self._translate(member)
