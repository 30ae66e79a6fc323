"""A backbone that fails for some seeds."""

import os
import signal

import torch

from training.networks import DropoutNet


class Fragile(DropoutNet):
    """Raises for seed 5, is killed for seed 12, and ends its process without a word for seed 20."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(in_channels, image_size, num_classes)
        seed = torch.initial_seed()
        if seed == 5:
            raise RuntimeError("seed 5 cannot be trained")
        if seed == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == 20:
            os._exit(7)
