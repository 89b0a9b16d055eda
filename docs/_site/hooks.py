"""Pages that are made from the code when the site is built, and links that leave the site."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib
import torch
from method_cards import FAMILIES, card, gallery
from method_pictures import picture
from method_table import ROOT, read_methods
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Files of the repository that are pages of the site as they are: where they lie -> where they go.
OUTSIDE = {"README.md": "overview.md", "datasets/README.md": "data.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# Public packages and modules, in the order in which data flow. One that is not there yet has no page.
REFERENCE = (
    ("densecal", "By name"),
    ("densecal.labels", "Label maps"),
    ("densecal.targets", "Targets"),
    ("densecal.perturbation", "Perturbation"),
    ("densecal.terms", "Terms"),
    ("densecal.losses", "Losses"),
    ("densecal.schedules", "Schedules"),
    ("densecal.metrics", "Metrics"),
    ("densecal.posthoc", "Post-hoc calibration"),
    ("densecal.models", "Networks"),
    ("densecal.data", "Data"),
    ("densecal.tasks", "Training"),
    ("densecal.inference", "Inference"),
    ("densecal.report", "Reports"),
    ("densecal.integrations.monai", "MONAI"),
    ("densecal.integrations.nnunet", "nnU-Net"),
    ("densecal.integrations.lightning", "Lightning"),
    ("densecal.integrations.huggingface", "Hugging Face"),
    ("densecal.integrations.smp", "segmentation-models-pytorch"),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the places of the navigation that the code knows."""
    methods = read_methods()
    sections: list[Any] = ["methods/index.md"]
    for family, (title, _) in FAMILIES.items():
        sections.append(
            {title: [{method.name[0].upper() + method.name[1:]: f"methods/{method.slug}.md"} for method in methods if method.family == family]}
        )
    reference = [{title: reference_page(name)} for name, title in REFERENCE if exists(name)]
    places = {"METHODS": sections, "REFERENCE": reference}
    config.nav = [{title: places.get(value, value) if isinstance(value, str) else value for title, value in entry.items()} for entry in config.nav]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    methods = read_methods()
    pictures = {method.slug: drawn for method in methods if (drawn := picture(method)) is not None}
    made: dict[str, str | bytes] = {f"methods/{slug}.svg": drawn for slug, drawn in pictures.items()}
    made |= {f"methods/{method.slug}.md": card(method, has_picture=method.slug in pictures) for method in methods}
    made["methods/index.md"] = gallery(methods)
    made |= {reference_page(name): reference(name) for name, _ in REFERENCE if exists(name)}
    made |= {page: (ROOT / path).read_text(encoding="utf-8") for path, page in OUTSIDE.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository that are no pages become their names."""
    source = next((path for path, made in OUTSIDE.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")

    def plain(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match["path"]))
        if not (ROOT / target).exists():
            return match[0]  # a page that is made, or a mistake, which strict mode reports
        made = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return (
            f"`{target}`"
            if made is None
            else f"{match['image']}[{match['text']}]({os.path.relpath(made, os.path.dirname(page.file.src_uri) or '.')}{match['anchor']})"
        )

    return re.sub(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<path>[^)#:\s]+)(?P<anchor>(?:#[^)\s]*)?)\)", plain, markdown)


def reference_page(name: str) -> str:
    return f"reference/{name}.md"


def reference(name: str) -> str:
    """The page of a package or module. A function that has the name of its file hides behind the file, so it is asked for by itself."""
    parts = [f"# `{name}`", f"::: {name}"]
    for entry in importlib.import_module(name).__all__:
        if exists(f"{name}.{entry}"):
            parts.append(
                f"[](){{#{name}.{entry}}}\n\n::: {name}.{entry}.{entry}\n    options:\n      show_root_heading: true\n      show_root_full_path: false\n      show_root_toc_entry: true"
            )
    return "\n\n".join(parts) + "\n"


def exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that is none
        return False
