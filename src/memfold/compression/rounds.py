"""Strategies that train a model several times, each time from the same point of the first.

With `rounds = rounds_of(model)`, any training loop can do it:

1. Round 0 trains the model as it is, and keeps a copy of its state dict and of the optimizer's and
   the schedule's state once `rounds.rewind_step(total_steps)` optimizer steps are done.
2. For every further round, up to `rounds.num_rounds`: `begin = rounds.next_round(number)` decides,
   from the weights just trained, what the round trains; the kept states are loaded; and
   `begin(optimizer)` puts the decision into effect. Then the training goes on from that step, with
   the same batches as in round 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from memfold.compression.state import compression_of

__all__ = ["Begin", "Rounds", "rounds_of"]

Begin = Callable[[Optimizer | None], None]


class Rounds(ABC):
    """What a compression says about its rounds. One that does not derive from it has one round."""

    @property
    @abstractmethod
    def num_rounds(self) -> int:
        """How many times the model is trained."""

    @abstractmethod
    def rewind_step(self, total_steps: int) -> int:
        """Return the number of optimizer steps after which every later round starts.

        Args:
            total_steps: Optimizer steps in one round.

        Raises:
            InputError: It is not below `total_steps`: later rounds would train nothing.
        """

    @abstractmethod
    def next_round(self, number: int) -> Begin:
        """Decide what round `number` trains, from the weights at the end of the round before.

        Args:
            number: Counted from 0; at least 1.

        Returns:
            What puts the decision into effect, to be called with the model and the optimizer
            rewound; the optimizer may be `None`.
        """


def rounds_of(model: nn.Module) -> Rounds | None:
    """Return the rounds that a compressed model is trained in, `None` when there is only one.

    Args:
        model: A compressed model, or a module that holds one.

    Raises:
        InputError: It holds several.
    """
    compression = compression_of(model)
    return compression if isinstance(compression, Rounds) and compression.num_rounds > 1 else None
