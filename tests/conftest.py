"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run: a red test is a changed program, not a new draw.
settings.register_profile("memfold", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("memfold")
