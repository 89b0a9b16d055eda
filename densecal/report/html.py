"""Pages out of templates: self-contained, and forbidden by their own content policy to ask for anything outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

import densecal

__all__ = ["describe_facts", "merge_notes", "render"]

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("densecal.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, **context: Any) -> str:
    """A page from ``templates/<template>.html.j2``; every text is escaped, :class:`markupsafe.Markup` is not."""
    script, style = (_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0] for name in ("sort.js", "style.css"))  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _ENVIRONMENT.get_template(f"{template}.html.j2")
    return page.render(script=Markup(script), script_digest=digest, style=Markup(style), version=densecal.__version__, **context)


def describe_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and words of each fact, the title left out; ``run`` holds JSON values."""
    return [(name, _describe(value)) for name, value in run.items() if name != "title"]


def merge_notes(notes: Sequence[str], facts: Mapping[str, Any]) -> list[str]:
    """Notes from both places, each once."""
    more = facts.get("notes") or ()
    return list(dict.fromkeys([*notes, *([more] if isinstance(more, str) else more)]))


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_describe(item)}" for key, item in value.items())
    if isinstance(value, list):
        items = [_describe(item) for item in value]
        return ("; " if any("," in item for item in items) else ", ").join(items)
    if value is None or isinstance(value, bool):
        return {None: "not known", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
