"""What pruning methods that look at data have in common."""

from dataclasses import dataclass

from memfold.compression.strategy import set_number
from memfold.errors import InputError
from memfold.strategies.pruning.base import PruningAtInit

__all__ = ["SampledPruning"]


@dataclass(frozen=True, kw_only=True)
class SampledPruning(PruningAtInit):
    """Score the weights on some samples of the training set."""

    num_samples: int = 1000
    """Samples that the scores look at: all there are when there are fewer."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: An option is out of range.
        """
        super().__post_init__()
        set_number(self, "num_samples", int)
        number = self.num_samples
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(
                "compression.num_samples must be a whole number of at least 1, "
                f"got {self.num_samples!r}"
            )
