"""What several tests of sharing watch."""

from weakref import ref

import pytest

from memfold.strategies.sharing.slot_source import SlotSource


@pytest.fixture
def built(monkeypatch):
    """Weak references to every weight that is built."""
    known = []
    read = SlotSource.read

    def watched(source, index, dtype):
        weight = read(source, index, dtype)
        known.append(ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(SlotSource, "read", watched)
    return known
