"""WikiText-2, raw: two million words of good Wikipedia articles (Merity et al. 2016).

"Pointer sentinel mixture models", arXiv 1609.07843. The splits are the published ones.
"""

from memfold.data.source_files import Remote, fetch
from memfold.data.text.data_module import SPLITS, Text, TextDataModule
from memfold.data.text.raw_bytes import read_zipped

__all__ = ["WikiText2"]

_REMOTE = Remote(
    "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
    "sha256:ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
)
_MEMBERS = ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")


class WikiText2(TextDataModule):
    """The published training, validation and test files."""

    name = "wikitext2"

    def prepare_data(self) -> None:
        """Download the archive if it is missing."""
        fetch(self.root, self.name, _REMOTE, download=self.download)

    def read_text(self) -> dict[str, Text]:
        """Read the files in the archive."""
        archive = fetch(self.root, self.name, _REMOTE, download=False)
        return {
            split: Text(read_zipped(archive, f"wikitext-2-raw/{member}"))
            for split, member in zip(SPLITS, _MEMBERS, strict=True)
        }
