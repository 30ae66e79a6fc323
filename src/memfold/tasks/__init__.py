"""What a network is trained to do: losses and metrics."""

from memfold.tasks.classification import Classification

__all__ = ["Classification"]
