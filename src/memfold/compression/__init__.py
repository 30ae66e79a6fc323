"""What every strategy stands on: which weights, their parts, and the model that computes them."""

from memfold.compression.clipping import clip_grad_norm_
from memfold.compression.compression import (
    Compression,
    before_step,
    compression_of,
    densify,
    release,
)
from memfold.compression.strategy import Context, Strategy

__all__ = [
    "Compression",
    "Context",
    "Strategy",
    "before_step",
    "clip_grad_norm_",
    "compression_of",
    "densify",
    "release",
]
