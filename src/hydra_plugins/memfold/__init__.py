"""The options of every strategy and their defaults, for Hydra: they stand on its class alone.

`conf/compression/NAME.yaml` takes them in with `defaults: [/options_of_NAME@_here_]`.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["StrategyOptions"]

_TOP_LEVEL = {
    "ratio": "${ratio}",
    "budget_bytes": "${budget_bytes}",
    "bits": "${artifact.bits}",
    "seed": "${seed}",
}


class StrategyOptions(SearchPathPlugin):
    """Make them known before a configuration is composed, whoever composes it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Store a configuration for each strategy, if this is a program that has some."""
        folders = [(entry.path or "").removeprefix("file://") for entry in search_path.get_path()]
        if not any(Path(folder, "compression").is_dir() for folder in folders):
            return
        # Only here: other programs that use Hydra need no PyTorch.
        from memfold.strategies import strategy_class, strategy_names

        for name in strategy_names():
            options = _defaults(strategy_class(name)) | _TOP_LEVEL
            ConfigStore.instance().store(f"options_of_{name}", options, provider="memfold")


def _defaults(strategy: type) -> dict[str, Any]:
    given = {field.name: field.default for field in fields(strategy)}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in given.items()}
