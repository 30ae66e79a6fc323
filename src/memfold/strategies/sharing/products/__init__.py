"""Products with a matrix that lies in windows of a shared vector, without building it."""

from memfold.strategies.sharing.products.costs import Choice, Way, choose
from memfold.strategies.sharing.products.layout import RowLayout, Windows
from memfold.strategies.sharing.products.prepared import Prepared
from memfold.strategies.sharing.products.products import Method, RowProducts

__all__ = [
    "Choice",
    "Method",
    "Prepared",
    "RowLayout",
    "RowProducts",
    "Way",
    "Windows",
    "choose",
]
