"""Callbacks that let a test look at every process of a run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from memfold.compression import compression_of


class StructureProbe(Callback):
    """Write hashes of the structure and of all tensors of this process."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compression = compression_of(pl_module.net)
        assert compression is not None
        hashes = {
            "structure": _hash(compression.structure()),
            "values": _hash(compression.value_tensors()),
            "state": _hash(pl_module.state_dict()),
        }
        file = self._folder / f"rank_{trainer.global_rank}.json"
        file.write_text(json.dumps(hashes))


def _hash(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return whole.hexdigest()
