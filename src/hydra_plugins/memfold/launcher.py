"""How Hydra runs the jobs of a sweep on this machine: in the slots of `memfold.studies`."""

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["LocalSlots", "LocalSlotsByName"]


class LocalSlots(BasicLauncher):
    """Runs jobs, `n_jobs` at a time, each in a process tree of its own."""

    def __init__(self, n_jobs: int) -> None:
        """Prepare to run.

        Args:
            n_jobs: -1 for one per core; the sweep reads it from the configuration.
        """
        super().__init__()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs to their end.

        Args:
            job_overrides: Of each.
            initial_job_idx: The number of the first.
        """
        # Only here: other programs that use Hydra need no PyTorch.
        from memfold.train_command import running_sweep

        return running_sweep().run_jobs(job_overrides, initial_job_idx)


class LocalSlotsByName(SearchPathPlugin):
    """Gives them the names by which users of Hydra know launchers for one machine.

    A file in `conf/` would be checked against Hydra's own options of that name.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Store them, if this is memfold's program and not another that uses Hydra."""
        folders = [(entry.path or "").removeprefix("file://") for entry in search_path.get_path()]
        if any(Path(folder, "compression").is_dir() for folder in folders):
            for name, n_jobs in (("basic", 1), ("joblib", -1)):
                options = {"_target_": f"{__name__}.{LocalSlots.__name__}", "n_jobs": n_jobs}
                store = ConfigStore.instance().store
                store(name, options, group="hydra/launcher", provider="memfold")
