"""Tiny-ImageNet: 200 classes of ImageNet, 100,000 + 10,000 colour 64x64 images (CS231n).

The published test labels are secret: as everywhere, the published validation set is the test
set, and the validation set comes out of the training set.
"""

import re
from pathlib import Path

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.decoded_files import ImageFile, cached_images
from memfold.data.images.image_set import ImageSet
from memfold.data.source_files import Remote, fetch, find, first_line, unpack, writable_folder
from memfold.errors import InputError
from memfold.files import read_text

__all__ = ["TinyImageNet"]

_FOLDER = "tiny-imagenet-200"
_NAME = re.compile(r"\w[\w.-]{0,100}")  # of a file or a folder, and no path
_REMOTE = Remote(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de"
)


class TinyImageNet(ImageDataModule):
    """The folder tiny-imagenet-200, or the .zip that holds it; decoded once (about 1.4 GB)."""

    name = "tiny_imagenet"
    num_channels = 3
    image_size = 64
    num_classes = 200
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    published_sizes = (100_000, 10_000)

    def prepare_data(self) -> None:
        """Download, unpack and decode what is not there yet."""
        if find(self.root, self.name, _FOLDER) is None:
            archive = fetch(self.root, self.name, _REMOTE, download=self.download)
            unpack(archive, _FOLDER, writable_folder(self.root, self.name))
        self.load_train()
        self.load_test()

    def load_train(self) -> ImageSet:
        """Return the images of train/<class>/images, class by class in the order of their ids."""
        folder = self._folder()
        files = []
        for label, class_id in enumerate(_class_ids(folder)):
            files.extend(_training_files(folder / "train" / class_id, label))
        return self._decoded(files)

    def load_test(self) -> ImageSet:
        """Return the images of val/images, in the order of val_annotations.txt."""
        folder = self._folder()
        labels = {class_id: label for label, class_id in enumerate(_class_ids(folder))}
        annotations = folder / "val" / "val_annotations.txt"
        files = []
        for number, line in enumerate(_read_lines(annotations), 1):
            filename, _, rest = line.partition("\t")
            class_id = rest.partition("\t")[0]
            if class_id not in labels or not _NAME.fullmatch(filename):
                raise InputError(
                    f"{annotations}: line {number} is {line[:80]!r}, expected a file name, a tab "
                    "and one of the ids in wnids.txt"
                )
            files.append(ImageFile(folder / "val" / "images" / filename, labels[class_id]))
        return self._decoded(files)

    def _decoded(self, files: list[ImageFile]) -> ImageSet:
        parent = writable_folder(self.root, self.name)
        return cached_images(files, self.layout, parent)[0]

    def _folder(self) -> Path:
        folder = find(self.root, self.name, _FOLDER)
        if folder is None:
            raise InputError(
                f"data.root={self.root}: no {_FOLDER} in {self.root / self.name} or {self.root}; "
                "set data.root or MEMFOLD_DATA to a folder that has it (it comes from "
                f"{_REMOTE.url})"
            )
        return folder


def _class_ids(folder: Path) -> list[str]:
    """Return the WordNet ids of the classes, sorted: their place is the label."""
    class_ids = sorted(_read_lines(folder / "wnids.txt"))
    odd = [class_id for class_id in class_ids if not _NAME.fullmatch(class_id)]
    if odd:
        raise InputError(f"{folder / 'wnids.txt'}: {odd[0][:80]!r} is no id, such as n01443537")
    if len(class_ids) > TinyImageNet.num_classes or len(set(class_ids)) < len(class_ids):
        raise InputError(
            f"{folder / 'wnids.txt'}: {len(class_ids)} ids, expected at most "
            f"{TinyImageNet.num_classes} different ones"
        )
    return class_ids


def _training_files(class_folder: Path, label: int) -> list[ImageFile]:
    """List the images of one class, sorted; they must be those that its list of boxes names."""
    images = class_folder / "images"
    names = sorted(path.name for path in images.glob("*.JPEG"))
    if not names:
        raise InputError(f"{images}: no .JPEG files, expected the images of a class")
    boxes = class_folder / f"{class_folder.name}_boxes.txt"
    if boxes.exists():
        missing = {line.partition("\t")[0] for line in _read_lines(boxes)} - set(names)
        if missing:
            raise InputError(
                f"{images}: {len(missing)} of the images in {boxes.name} are missing, such as "
                f"{min(missing)}; delete {_FOLDER} to unpack it again"
            )
    return [ImageFile(images / name, label) for name in names]


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {first_line(error)}; expected a text file") from error
    if not lines:
        raise InputError(f"{path}: is empty")
    return lines
