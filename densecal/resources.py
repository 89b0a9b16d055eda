"""Where the configs and the data set cards are: in the installed package, else beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cards_dir", "configs_dir"]

_PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """Folder of the Hydra configs.

    Example:
        >>> configs_dir().name
        'configs'
    """
    return _resource("configs")


def cards_dir() -> Path:
    """Folder of the data set cards.

    Example:
        >>> (cards_dir() / "mni152.yaml").is_file()
        True
    """
    return _resource("datasets")


def _resource(name: str) -> Path:
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"Found neither {_PACKAGE / name} nor {_PACKAGE.parent / name}. Install densecal again.")
