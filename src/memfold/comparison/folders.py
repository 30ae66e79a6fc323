"""The names of what a comparison leaves behind, for whoever writes and reads them."""

__all__ = ["CHOICES", "OTHERS", "RUNS"]

CHOICES = "choices"
"""Folder of the runs that are only tried on validation, beside `choices.csv`."""
OTHERS = "other_runs"
"""Folder of the runs that were compared by another plan, or with other choices."""
RUNS = "runs"
"""Folder of the runs that are compared."""
