"""Choices of Hydra's groups that are not files of ``configs/``: data set cards, and networks for images by architecture and encoder.

Hydra asks its sources in turn, so a file of the same name goes first; a choice is read or written when it is asked for.
"""

from __future__ import annotations

from abc import abstractmethod

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugin, Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from densecal.registry import MODELS
from densecal.resources import configs_dir

__all__ = ["Cards", "NetworkPairs", "register_sources"]


class _Group(ConfigSource):
    """A group whose choices are made on demand."""

    group: str

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", self.group)

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith(f"{self.group}/") and self.has(self._name(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        config = self.make(self._name(config_path))
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header={"package": None})

    def _name(self, config_path: str) -> str:
        return config_path.removeprefix(f"{self.group}/").removesuffix(".yaml")

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a choice."""

    @abstractmethod
    def make(self, name: str) -> DictConfig:
        """Its config."""


class Cards(_Group):
    """The cards that densecal brings, by name and alias: ``data=camvid``."""

    group = "data"

    @staticmethod
    def scheme() -> str:
        return "densecal-cards"

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        from densecal.data.card import card_names

        if config_path.strip("/"):
            return card_names() if config_path.strip("/") == self.group and results_filter != ObjectType.GROUP else []
        return [self.group] if results_filter != ObjectType.CONFIG else []

    def has(self, name: str) -> bool:
        from densecal.data.card import card_names

        return name in card_names()

    def make(self, name: str) -> DictConfig:
        from densecal.data.card import load_card

        return OmegaConf.structured(load_card(name))


class NetworkPairs(_Group):
    """Every architecture of segmentation-models-pytorch with every encoder: ``model=unet_resnet18`` is ``smp`` with the options of the architecture and their defaults.

    The names are not listed: they would bury the others.
    """

    group = "model"

    @staticmethod
    def scheme() -> str:
        return "densecal-networks"

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def has(self, name: str) -> bool:
        return name in MODELS

    def make(self, name: str) -> DictConfig:
        from densecal.models import architecture_options

        architecture, _, encoder = name.partition("_")
        pair = {"architecture": architecture, "encoder": encoder, "options": architecture_options(architecture)}
        config = OmegaConf.merge(OmegaConf.load(configs_dir() / "model" / "smp.yaml"), pair)
        assert isinstance(config, DictConfig)
        return config


_SOURCES: tuple[type[_Group], ...] = (Cards, NetworkPairs)


class SourcesSearchPath(SearchPathPlugin):
    """Puts them among Hydra's sources."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for source in _SOURCES:
            search_path.append("densecal", f"{source.scheme()}://")


def register_sources() -> None:
    """Make the sources known to Hydra, once for the process."""
    plugins: tuple[type[Plugin], ...] = (*_SOURCES, SourcesSearchPath)
    for plugin in plugins:
        Plugins.instance().register(plugin)
