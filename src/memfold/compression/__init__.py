"""What every strategy stands on: which weights, their parts, and the model that computes them."""

from memfold.compression.clipping import clip_grad_norm_
from memfold.compression.compressed_model import (
    before_step,
    densify,
    extra_loss,
    prepare_step,
    release,
)
from memfold.compression.state import Compression, compression_of
from memfold.compression.strategy import Context, Strategy

__all__ = [
    "Compression",
    "Context",
    "Strategy",
    "before_step",
    "clip_grad_norm_",
    "compression_of",
    "densify",
    "extra_loss",
    "prepare_step",
    "release",
]
