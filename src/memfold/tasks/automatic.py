"""The task that the data ask for."""

from memfold.data.spec import Classes, DataSpec, NextToken
from memfold.errors import InputError
from memfold.tasks.classification import Classification
from memfold.tasks.language_modelling import LanguageModelling
from memfold.tasks.regression import Regression
from memfold.tasks.task import Smoothing, Task

__all__ = ["task_for"]


def task_for(spec: DataSpec, *, label_smoothing: Smoothing) -> Task:
    """Return the task for the target of `spec`.

    Args:
        spec: What the data are.
        label_smoothing: Of classes and tokens, in training; numbers have none.

    Raises:
        InputError: An option is wrong, or the task does not have it.
    """
    if isinstance(spec.target, Classes):
        return Classification(spec, label_smoothing=label_smoothing)
    if isinstance(spec.target, NextToken):
        return LanguageModelling(spec, label_smoothing=label_smoothing)
    if label_smoothing:
        raise InputError(
            f"task.label_smoothing={label_smoothing}: the data ask for task=regression, whose "
            "targets are no labels"
        )
    return Regression(spec)
