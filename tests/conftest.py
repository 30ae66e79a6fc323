"""Settings for all tests."""

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a red test is a changed program, not a new draw.
settings.register_profile("memfold", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("memfold")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small networks gain nothing from threads, and lose much when other tests run beside them.

    For the session: the last bits depend on it, and modules have fixtures that run before a test's.
    """
    torch.set_num_threads(1)
