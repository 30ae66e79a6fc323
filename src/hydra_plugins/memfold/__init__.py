"""Options of classes and functions and their defaults, for Hydra: they stand in Python alone.

A YAML file takes them in with `defaults: [/options_of/package.module.Class@_here_]`, then sets what
is to be otherwise.
"""

import inspect

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_object
from omegaconf import OmegaConf

__all__ = ["OptionsOf", "OptionsOfPath"]

_PREFIX = "options_of/"
_OF_THE_RUN = {"seed": "${seed}"}
_OF_A_STRATEGY = {
    "ratio": "${ratio}",
    "budget_bytes": "${budget_bytes}",
    "bits": "${artifact.bits}",
    "train_bits": "${artifact.train_bits}",
    "train_bits_from": "${artifact.train_bits_from}",
    "block_size": "${artifact.block_size}",
    "coding": "${artifact.coding}",
    "untouched_bits": "${artifact.untouched_bits}",
    "merge_norms": "${artifact.merge_norms}",
}


class OptionsOf(ConfigSource):
    """`options_of/NAME`, for every NAME that can be imported: `_target_` and all defaults.

    NAME is imported when its configuration is composed, not before.
    """

    @staticmethod
    def scheme() -> str:
        """Return what stands before `://` in Hydra's search path."""
        return "options"

    def load_config(self, config_path: str) -> ConfigResult:
        """Look at a signature; options without a default are left out."""
        from memfold.compression import Strategy  # other programs that use Hydra need no PyTorch

        name = config_path.removeprefix(_PREFIX)
        described = get_object(name)
        parameters = inspect.signature(described).parameters.values()
        is_strategy = isinstance(described, type) and issubclass(described, Strategy)
        top_level = _OF_THE_RUN | (_OF_A_STRATEGY if is_strategy else {})
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        options = {
            key: list(value) if isinstance(value, tuple) else top_level.get(key, value)
            for key, value in defaults.items()
        }
        config = OmegaConf.create({"_target_": name, **options})
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def available(self) -> bool:
        """Return true: there is nothing to be missing."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return false: nothing of it can be chosen on the command line."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Tell whether a path is of this form."""
        return config_path.startswith(_PREFIX)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing, see `is_group`."""
        return []


class OptionsOfPath(SearchPathPlugin):
    """Put it on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append `OptionsOf`."""
        search_path.append("memfold", f"{OptionsOf.scheme()}://")
