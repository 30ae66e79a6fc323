"""The language reference that comes with every CPython: 465,000 characters, no download.

It is `pydoc_data.topics`, what `help("if")` shows: a document for each topic. Its text changes a
little from version to version of Python, which is in a run's result.
"""

from memfold.data.text.data_module import Text, TextDataModule, part_by_position

__all__ = ["PythonDocs"]

_VAL_FRACTION = _TEST_FRACTION = 0.05


class PythonDocs(TextDataModule):
    """The topics in the order of their names: the first 90 % to train on, then 5 % and 5 %."""

    name = "python_docs"

    def read_text(self) -> dict[str, Text]:
        """Read the topics of the Python that runs."""
        from pydoc_data.topics import topics

        documents = [f"{topics[name].strip()}\n\n".encode() for name in sorted(topics)]
        return part_by_position(Text.of(documents), _VAL_FRACTION, _TEST_FRACTION)
