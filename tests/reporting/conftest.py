"""Settings for tests of reports."""

import pytest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Names in a report are relative to where it is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
