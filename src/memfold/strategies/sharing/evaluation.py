"""Weights that are kept from one evaluation batch to the next."""

import torch
from torch import Tensor

from memfold.strategies.sharing.forward_pass import ForwardPass
from memfold.strategies.sharing.slot_source import version_of

__all__ = ["Evaluation"]


class Evaluation:
    """A pass that goes on as long as phi stays what it was."""

    def __init__(self, values: Tensor, forward_pass: ForwardPass) -> None:
        """Copy phi, of shape (m,): `.data` and other views change it and leave no trace."""
        self.forward_pass = forward_pass
        self._copy = values.detach().clone()
        self._version = version_of(values)

    def fits(self, values: Tensor) -> bool:
        """Whether `values` are the same tensor with the same numbers, in the same mode."""
        return (
            values is self.forward_pass.values
            and torch.is_inference_mode_enabled() == self.forward_pass.inference
            and values.dtype == self._copy.dtype
            and values.device == self._copy.device
            and version_of(values) == self._version
            and torch.equal(values, self._copy)
        )
