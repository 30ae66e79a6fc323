"""Tiny Shakespeare: 1,115,394 bytes of plays with 65 symbols (Karpathy 2015, char-rnn)."""

from memfold.data.source_files import Remote, fetch
from memfold.data.text.data_module import Text, TextDataModule, part_by_position
from memfold.data.text.raw_bytes import read_bytes

__all__ = ["Shakespeare"]

_REMOTE = Remote(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_VAL_FRACTION = _TEST_FRACTION = 0.05


class Shakespeare(TextDataModule):
    """The first 90 % to train on, then 5 % and 5 %."""

    name = "shakespeare"

    def prepare_data(self) -> None:
        """Download the file if it is missing."""
        fetch(self.root, self.name, _REMOTE, download=self.download)

    def read_text(self) -> dict[str, Text]:
        """Read the file, and part it."""
        file = fetch(self.root, self.name, _REMOTE, download=False)
        content = read_bytes(file, _REMOTE.checksum)
        return part_by_position(Text(content), _VAL_FRACTION, _TEST_FRACTION)
