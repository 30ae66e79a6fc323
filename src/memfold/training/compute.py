"""What a run's network computes."""

from typing import Any

from memfold.data.spec import Tokens
from memfold.operations import forward_operations
from memfold.training.build import Experiment

__all__ = ["describe_compute"]

_NUM_SAMPLES = 8
"""Products of kept values fill up a batch to as many."""


def describe_compute(experiment: Experiment) -> dict[str, Any]:
    """Return the multiply-adds of a forward pass, for each token or, of other data, each sample."""
    # Real ones: some networks do more for one input than for another.
    example, _ = next(experiment.data.scoring_batches(seed=0))
    example = example[:_NUM_SAMPLES].to(experiment.module.device)
    example = experiment.trainer.precision_plugin.convert_input(example)
    is_text = isinstance(experiment.module.task.spec.inputs, Tokens)
    num_units = example.numel() if is_text else len(example)
    count = forward_operations(experiment.net, example) // num_units
    return {"compute": {"operations": count}}
