"""Settings for all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples in every run: a red test is a changed program, not a new draw.
settings.register_profile("memfold", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("memfold")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, and lose much when other tests run beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
