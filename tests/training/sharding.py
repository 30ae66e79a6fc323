"""FSDP without a GPU, which Lightning does not offer."""

from contextlib import AbstractContextManager

import torch
from lightning.pytorch.strategies import FSDPStrategy, fsdp
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)


class CpuFSDPStrategy(FSDPStrategy):
    """Shards over gloo processes."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=self.kwargs["use_orig_params"]
        )


def _gather_without_moving(
    module: nn.Module, world_size: int, rank0_only: bool = True
) -> AbstractContextManager:
    """Stand in for Lightning's: torch frees what it moves to the CPU, even if it was there."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


fsdp._get_full_state_dict_context = _gather_without_moving
