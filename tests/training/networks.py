"""Backbones for `backbone=custom`, and a callback."""

import os
import random
import signal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn


class DropoutNet(nn.Sequential):
    """Draws from the global generator in every training step."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(32, num_classes),
        )


class DrawingNet(DropoutNet):
    """Draws in training from PyTorch's, NumPy's and Python's generators."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            input = input * np.random.uniform(0.9, 1.1) * random.uniform(0.9, 1.1)
        return super().forward(input)


class Killed(nn.Module):
    """Ends its process as the out-of-memory killer does."""

    def __init__(self) -> None:
        super().__init__()
        os.kill(os.getpid(), signal.SIGKILL)


class Infinite(nn.Module):
    """Gives infinite logits from its third training step on."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)
        self.num_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_calls += self.training
        logits = self.linear(images.flatten(1))
        return logits * torch.inf if self.num_calls >= 3 else logits


class InfiniteOnRankOne(Infinite):
    """Gives infinite logits in the second of two processes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if os.environ.get("LOCAL_RANK") != "1":
            self.num_calls = -1
        return super().forward(images)


class DiesOnRankOne(InfiniteOnRankOne):
    """Ends the second of two processes in its third training step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        if self.num_calls >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return logits


class KillInRound(Callback):
    """Ends its process at a step of the second round of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        is_second = trainer.callback_metrics.get("round") == 1.0
        if is_second and trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)
