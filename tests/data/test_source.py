"""What data say of which they are."""

import os

import pytest

from memfold.data.data_module import DataModule
from memfold.data.diabetes import Diabetes
from memfold.data.digits import Digits
from memfold.data.image_folder import ImageFolder
from memfold.data.table import TableFile
from memfold.data.text_files import TextFiles
from memfold.data.tokens import TokenFiles


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (Digits(), {}),
        (Diabetes(fold=1, num_folds=3), {"folds": 3}),
        (TableFile(file="x.csv", target="a"), {"file": "x.csv", "target": "a"}),
        (
            TableFile(file="x.csv", target=["a"], fold=0),
            {"file": "x.csv", "target": "a", "folds": 5},
        ),
        (TableFile(file="../x.csv", target=["a", "b"]), {"file": "../x.csv", "target": ["a", "b"]}),
        (ImageFolder(folder="p/"), {"folder": "p"}),
        (TextFiles(files=["a", "b"]), {"files": ["a", "b"]}),
        (
            TokenFiles(files=["a"], val_files=["b"], test_files=["c"]),
            {"files": ["a"], "val_files": ["b"], "test_files": ["c"]},
        ),
    ],
)
def test_data_of_the_user_say_which_files_and_targets_with_absolute_paths(
    data: DataModule, source: dict[str, object]
) -> None:
    def absolute(key: str, value: object) -> object:
        if isinstance(value, list) and key != "target":
            return [os.path.abspath(item) for item in value]
        return os.path.abspath(str(value)) if key in ("file", "folder") else value

    assert data.source == {key: absolute(key, value) for key, value in source.items()}
