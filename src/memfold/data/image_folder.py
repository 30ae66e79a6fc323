"""Images of the user: a folder for each class."""

import os.path
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from memfold.data.batching import Chosen, Samples
from memfold.data.images.augmentation import TrainingImages
from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.decoded_files import (
    FORMATS,
    ImageFile,
    Layout,
    UnusableFiles,
    cached_images,
)
from memfold.data.images.image_set import ImageSet
from memfold.data.source_files import first_line, writable_folder
from memfold.data.spec import DataSpec
from memfold.data.splits import split_training
from memfold.errors import InputError
from memfold.files import open_regular, read_text
from memfold.options import Interval, check_arguments
from memfold.seeding import derive_seed

__all__ = ["ImageFolder"]

FACTS = "data.json"
"""In the folder of a run on such images: what they are like."""
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_SPLITS = ("train", "val", "test")
_AT_A_TIME = 4096  # images, for their statistics


class Facts(BaseModel):
    """What a run keeps of the images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    class_names: tuple[str, ...]
    image_size: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageFolder(ImageDataModule):
    """`train/CLASS/*.png`, with `val/` and `test/` or without; or `CLASS/*.png`.

    What has no folder of its own is parted off: the validation split from the training images, and
    where there is no `test/` the test split before that. Images are decoded once, into a cache
    beside the data sets; mean and standard deviation are those of the training split.
    """

    name = "image_folder"

    def __init__(
        self,
        *,
        folder: str,
        image_size: Annotated[int, Interval("[1, 4096]")] | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: Annotated[float, Interval("(0, 1)")] = 0.1,
        skip_damaged: bool = False,
        **options: Any,
    ) -> None:
        """Check the options; no file is touched.

        Args:
            folder: Of the images.
            image_size: Height and width that images are scaled to, the shorter side, and cropped in
                the middle, in pixels; null: they all are squares of one size, that of the first.
            channels: 3 for colour, 1 for grey.
            test_fraction: Share of all images for the test where there is no `test/`, in (0, 1).
            skip_damaged: Whether images that cannot be used are left out, and counted.
            **options: See `ImageDataModule`.

        Raises:
            InputError: An option has the wrong type or is out of its range.
        """
        super().__init__(**options)
        check_arguments(ImageFolder.__init__, locals(), "data.")
        self.folder = Path(folder).expanduser()
        self.test_fraction = test_fraction
        self.skip_damaged = skip_damaged
        self.num_channels = channels
        self._wanted_size = image_size
        self._parts: dict[str, tuple[ImageSet, Tensor]] = {}
        self._sources: dict[str, Sequence[ImageFile]] = {}

    @property
    def spec(self) -> DataSpec:
        """Images of one size, in the classes that the folders name."""
        self._look()
        return super().spec

    @property
    def layout(self) -> Layout:
        """What an image file becomes."""
        is_resized = self._wanted_size is not None
        return Layout(self.image_size, self.num_channels, is_resized=is_resized)

    @property
    def source(self) -> dict[str, object]:
        """The folder."""
        return {"folder": os.path.abspath(self.folder)}

    def prepare_data(self) -> None:
        """Decode what is not decoded yet."""
        self._load()

    def load_train(self) -> ImageSet:
        """Return the images of the training folder, those for the test among them if it has any."""
        return self._load()["train"][0]

    def load_test(self) -> ImageSet:
        """Return the images of the folder that has the test split."""
        return self._load()["test"][0]

    def test_files(self) -> list[Path]:
        """Return the files of the test split, in the order of its batches."""
        _, positions = self._load()["test"]
        files = self._sources.get("test", self._sources["train"])
        return [files[position].path for position in positions.tolist()]

    def read_train(self) -> tuple[Samples, Samples]:
        """Choose the training and the validation images, and measure the former."""
        parts = self._load()
        images, train = parts["train"]
        if "val" in parts:
            val = Chosen(*parts["val"])
        else:
            inner, validation = split_training(
                images.labels[train],
                val_fraction=self.val_fraction,
                train_subset=self.train_subset,
                seed=self.split_seed,
            )
            train, val = train[inner], Chosen(images, train[validation])
        self._measure(images.images, train)
        return Chosen(TrainingImages(images, self.crop_padding), train), val

    def read_test(self) -> Samples:
        """Choose the test images."""
        return Chosen(*self._load()["test"])

    def own_files(self) -> Mapping[str, Path]:
        """See `DataModule.own_files`."""
        found = ((split, file) for split, files in self._look().items() for file in files)
        return {f"{split}/{file.label}/{file.path.name}": file.path for split, file in found}

    def write_facts(self, folder: Path) -> None:
        """Keep with a run what was measured."""
        facts = Facts(
            class_names=self.class_names,
            image_size=self.image_size,
            channels=3 if self.num_channels == 3 else 1,
            mean=self.mean,
            std=self.std,
        )
        (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def read_facts(self, folder: Path) -> None:
        """Take what a run has measured.

        Raises:
            InputError: It cannot be read.
        """
        file = folder / FACTS
        try:
            facts = Facts.model_validate_json(read_text(file))
        except (OSError, ValueError, ValidationError) as error:
            raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        self.class_names, self.image_size = facts.class_names, facts.image_size
        self.num_classes, self.num_channels = len(facts.class_names), facts.channels
        self.mean, self.std = facts.mean, facts.std

    def _look(self) -> dict[str, list[ImageFile]]:
        """List the files of each split that has a folder; find the classes and the size."""
        if hasattr(self, "num_classes") and not self.folder.is_dir():
            return {}  # a run has said it
        if not self.folder.is_dir():
            raise InputError(f"data.folder={self.folder}: there is no such folder")
        folders = _folders(self.folder)
        split_folders = {split: folders[split] for split in _SPLITS if split in folders}
        if "train" in split_folders:
            if others := [path for name, path in folders.items() if name not in _SPLITS]:
                raise InputError(
                    f"{others[0]}: beside train/ there may be val/ and test/, no other"
                )
        elif split_folders:
            raise InputError(
                f"data.folder={self.folder}: has {' and '.join(split_folders)}, no train"
            )
        else:
            split_folders = {"train": self.folder}
        self.class_names = tuple(_folders(split_folders["train"]))
        if len(self.class_names) < 2:
            raise InputError(
                f"data.folder={self.folder}: {len(self.class_names)} class folder(s) in "
                f"{split_folders['train']}, at least two are needed: CLASS/*.png or *.jpg"
            )
        self.num_classes = len(self.class_names)
        files = {split: _files(path, self.class_names) for split, path in split_folders.items()}
        self.image_size = self._wanted_size or _size_of(files["train"], self.skip_damaged)
        self.check_padding()
        return files

    def _load(self) -> dict[str, tuple[ImageSet, Tensor]]:
        """Return, for each split that there is, a set of images and which of them are meant."""
        if self._parts:
            return self._parts
        files = self._look()
        parent = writable_folder(self.root, self.name)
        try:
            decoded = {
                split: cached_images(some, self.layout, parent, skips_damaged=self.skip_damaged)
                for split, some in files.items()
            }
        except UnusableFiles as error:
            hint = "" if self._wanted_size else "data.image_size=N scales images; "
            raise InputError(f"{error}; {hint}data.skip_damaged=true leaves these out") from error
        found = {split: images for split, (images, _) in decoded.items()}
        self._sources = {split: usable for split, (_, usable) in decoded.items()}
        self._refuse_rare_classes(found["train"].labels, 1 + len(_SPLITS) - len(found))
        self._parts = {
            split: (images, torch.arange(len(images))) for split, images in found.items()
        }
        if "test" not in found:
            images = found["train"]
            rest, test = split_training(
                images.labels,
                val_fraction=self.test_fraction,
                train_subset=None,
                seed=derive_seed(self.split_seed, "test"),
                key="test_fraction",
            )
            self._parts |= {"train": (images, rest), "test": (images, test)}
        return self._parts

    def _refuse_rare_classes(self, labels: Tensor, num_splits: int) -> None:
        """Refuse a class of which training might see no image."""
        counts = torch.bincount(labels, minlength=self.num_classes)
        fewest = int(counts.argmin())
        if counts[fewest] < num_splits:
            raise InputError(
                f"data.folder={self.folder}: class {self.class_names[fewest]!r} has "
                f"{counts[fewest]} image(s) that can be used; {num_splits} are needed, one for "
                "each split that is made of them"
            )

    def _measure(self, images: Tensor, train: Tensor) -> None:
        sums = torch.zeros(2, self.num_channels, dtype=torch.float64)
        for some in train.split(_AT_A_TIME):
            pixels = images[some].double() / 255
            sums += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
        mean, square = sums / (len(train) * self.image_size**2)
        std = (square - mean.square()).clamp(min=1e-12).sqrt()
        self.mean, self.std = tuple(mean.tolist()), tuple(std.tolist())


def _folders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by their names, sorted; not the hidden ones of programs."""
    paths = sorted(path for path in folder.iterdir() if path.is_dir())
    return {path.name: path for path in paths if not path.name.startswith(".")}


def _files(folder: Path, class_names: Sequence[str]) -> list[ImageFile]:
    found = []
    folders = _folders(folder)
    for name, path in folders.items():
        if name not in class_names:
            raise InputError(
                f"{path}: is no class of the training images: {', '.join(class_names)}"
            )
        if inner := list(_folders(path).values()):
            raise InputError(
                f"{inner[0]}: is a folder within a class; its images must be beside it"
            )
    for label, name in enumerate(class_names):
        paths = sorted(folders[name].iterdir()) if name in folders else []
        found += [
            ImageFile(path, label)
            for path in paths
            if path.suffix.lower() in _ENDINGS and not path.name.startswith(".")
        ]
    if not found:
        raise InputError(f"{folder}: has no {', '.join(_ENDINGS)} files in the folders of classes")
    return found


def _size_of(files: Sequence[ImageFile], skips_damaged: bool) -> int:
    """Return the height and width of the first image, or the first that can be read."""
    for file in files[:-1] if skips_damaged else ():
        with suppress(InputError):
            return _side(file.path)
    return _side(files[-1 if skips_damaged else 0].path)


def _side(path: Path) -> int:
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow's plug-ins report damage by any of them
        raise InputError(
            f"{path}: {first_line(error)}; expected an image (data.image_size=N takes any size, "
            "data.skip_damaged=true leaves out what is none)"
        ) from error
    if width != height:
        raise InputError(f"{path}: {height} x {width} pixels; data.image_size=N makes it a square")
    return height
