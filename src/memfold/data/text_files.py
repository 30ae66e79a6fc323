"""Text of the user: any files, in the order given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from memfold.data.text.data_module import SPLITS, Text, TextDataModule, part_by_position
from memfold.data.text.file_options import by_place, paths_of, source_of
from memfold.data.text.raw_bytes import read_bytes
from memfold.options import Interval, check_arguments

__all__ = ["TextFiles"]


class TextFiles(TextDataModule):
    """Files of text; parted by position, or with files of their own for validation and test."""

    name = "text"

    def __init__(
        self,
        *,
        files: Sequence[str],
        val_files: Sequence[str] | None = None,
        test_files: Sequence[str] | None = None,
        val_fraction: Annotated[float, Interval("(0, 1)")] = 0.05,
        test_fraction: Annotated[float, Interval("(0, 1)")] = 0.05,
        **options: Any,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            files: Paths of the text to train on, each a document.
            val_files: Of the validation text; null: `val_fraction` of `files`, towards the end.
            test_files: Of the test text, if `val_files` is given; null: `test_fraction` of `files`,
                at the end.
            val_fraction: Share of the bytes, in (0, 1).
            test_fraction: Share of the bytes, in (0, 1).
            **options: See `TextDataModule`.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(**options)
        check_arguments(TextFiles.__init__, locals(), "data.")
        self._paths = paths_of(
            files, val_files, test_files, val_fraction=val_fraction, test_fraction=test_fraction
        )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def own_files(self) -> Mapping[str, Path]:
        """See `DataModule.own_files`."""
        return by_place(self._paths)

    @property
    def source(self) -> dict[str, object]:
        """The files of each split."""
        return source_of(self._paths)

    def read_text(self) -> dict[str, Text]:
        """Read the files."""
        texts = [Text.of([read_bytes(path) for path in paths]) for paths in self._paths]
        if len(texts) == len(SPLITS):
            return dict(zip(SPLITS, texts, strict=True))
        return part_by_position(texts[0], self.val_fraction, self.test_fraction)
