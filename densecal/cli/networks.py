"""Networks for images as choices of the group ``model``: ``model=unet_resnet18`` for every architecture and encoder, without a file for each."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from densecal.registry import MODELS
from densecal.resources import configs_dir

__all__ = ["NetworkPairs", "register_network_pairs"]

_GROUP = "model/"


class NetworkPairs(ConfigSource):
    """Writes the config of a pair when Hydra asks for it: that of ``smp``, with the options of the architecture and their defaults.

    Hydra looks into its sources in turn, so a file of the same name goes first. The names are not listed: they would bury the others.
    """

    @staticmethod
    def scheme() -> str:
        return "densecal-networks"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", "model")

    def is_config(self, config_path: str) -> bool:
        name = config_path.removesuffix(".yaml")
        return name.startswith(_GROUP) and name.removeprefix(_GROUP) in MODELS

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        from densecal.models import architecture_options

        architecture, _, encoder = config_path.removeprefix(_GROUP).removesuffix(".yaml").partition("_")
        config = OmegaConf.load(configs_dir() / "model" / "smp.yaml")
        pair = {"architecture": architecture, "encoder": encoder, "options": architecture_options(architecture)}
        return ConfigResult(config=OmegaConf.merge(config, pair), path=self.full_path(), provider=self.provider, header={"package": None})


class NetworkPairsSearchPath(SearchPathPlugin):
    """Puts :class:`NetworkPairs` among Hydra's sources."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("densecal", f"{NetworkPairs.scheme()}://")


def register_network_pairs() -> None:
    """Make the pairs known to Hydra, once for the process."""
    for plugin in (NetworkPairs, NetworkPairsSearchPath):
        Plugins.instance().register(plugin)
