"""What a network learns: losses, metrics, and the primary one; a task is one file.

A data set says what its targets are (`memfold.data.spec`), and `task=auto` takes the task for them.
"""

from memfold.tasks.automatic import task_for
from memfold.tasks.classification import Classification
from memfold.tasks.language_modelling import LanguageModelling
from memfold.tasks.regression import Regression
from memfold.tasks.task import Measure, Task, logits_of
from memfold.tasks.task_module import TaskModule

__all__ = [
    "Classification",
    "LanguageModelling",
    "Measure",
    "Regression",
    "Task",
    "TaskModule",
    "logits_of",
    "task_for",
]
