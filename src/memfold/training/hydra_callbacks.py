"""Hydra callbacks: what happens before Hydra touches a folder."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memfold.errors import InputError
from memfold.files import make_folder
from memfold.overrides import unresolved
from memfold.processes.external_launch import refuse_lone_node
from memfold.processes.ranks import is_rank_zero
from memfold.runs.folder import HYDRA_FOLDER, refuse_odd_files, refuse_used_folder
from memfold.runs.locks import lock_for_job

__all__ = ["RunFolderGuard", "exiting"]


class RunFolderGuard(Callback):
    """Lock the run folder, or refuse it, before Hydra writes its own files there.

    Hydra turns exceptions of callbacks into warnings, hence the exit.
    """

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Take `hydra.run.dir`, unless the run in it is to be resumed; check the nodes."""
        _refuse_lone_node(config)
        if config.resume is None and is_rank_zero():
            # Hydra itself reports a name that cannot be resolved.
            with suppress(OmegaConfBaseException):
                _take(Path(config.hydra.run.dir))


def _refuse_lone_node(config: DictConfig) -> None:
    with exiting():
        given = unresolved(config.hydra.overrides.hydra)
        has_folder = any(text.startswith("hydra.run.dir=") for text in given)
        num_nodes = OmegaConf.select(config, "trainer.num_nodes")
        refuse_lone_node(num_nodes, has_folder=has_folder, environment=os.environ)


def _take(folder: Path) -> None:
    """Lock `folder`; exit unless it can be made, no job runs in it, and none has left results."""
    with exiting():
        make_folder(folder)
        if (folder / HYDRA_FOLDER).exists():
            refuse_odd_files(folder)
        lock_for_job(folder)
        refuse_used_folder(folder)


@contextmanager
def exiting() -> Iterator[None]:
    """End this process after any error: Hydra would warn, and go on without the checks."""
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
