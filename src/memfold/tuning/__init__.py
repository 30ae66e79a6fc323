"""Search for good settings: trials that are normal runs, in a study that can be resumed.

Only `study`, `trial` and `workers` import Optuna, which is in the extra `tune`.
"""
