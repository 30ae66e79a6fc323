"""text8: the first 100,000,000 bytes of a cleaned Wikipedia, 26 letters and blanks (Mahoney 2006).

http://mattmahoney.net/dc/textdata.html. The usual split: 90, 5 and 5 million.
"""

from memfold.data.source_files import Remote, fetch
from memfold.data.text.data_module import Text, TextDataModule, part_by_position
from memfold.data.text.raw_bytes import read_zipped

__all__ = ["Text8"]

_REMOTE = Remote(
    "http://mattmahoney.net/dc/text8.zip",
    "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
)
_VAL_FRACTION = _TEST_FRACTION = 0.05


class Text8(TextDataModule):
    """The first 90 % to train on, then 5 % and 5 %."""

    name = "text8"

    def prepare_data(self) -> None:
        """Download the archive if it is missing."""
        fetch(self.root, self.name, _REMOTE, download=self.download)

    def read_text(self) -> dict[str, Text]:
        """Read the file in the archive, and part it."""
        archive = fetch(self.root, self.name, _REMOTE, download=False)
        return part_by_position(Text(read_zipped(archive, "text8")), _VAL_FRACTION, _TEST_FRACTION)
