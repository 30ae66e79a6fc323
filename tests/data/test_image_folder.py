"""Pictures of the user: splits, sizes, damage, statistics."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memfold.data.image_folder import ImageFolder
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError


def draw(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 40, (*size, 3)) + 5 * level
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and light, of 20 pictures each."""
    for number in range(20):
        draw(tmp_path / "in" / "dark" / f"{number:02}.png", number % 5)
        draw(tmp_path / "in" / "light" / f"{number:02}.jpg", 30 + number % 5)
    return tmp_path / "in"


def ready(folder: Path, **options: object) -> ImageFolder:
    data = ImageFolder(
        folder=str(folder), root=str(folder.parent / "cache"), batch_size=4, **options
    )
    data.setup()
    return data


def test_class_folders_alone(folder: Path) -> None:
    data = ready(folder, val_fraction=0.25, test_fraction=0.2)
    assert data.spec == DataSpec(Images(3, 8, 8), Classes(2, ("dark", "light")))
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    parts = [loader.samples.positions for loader in loaders]
    assert [len(part) for part in parts] == [24, 8, 8]
    assert sorted(torch.cat(parts).tolist()) == list(range(40))
    for loader in loaders[1:]:
        labels = torch.cat([labels for _, labels in loader])
        assert torch.bincount(labels).tolist() == [4, 4]


def test_folders_for_splits(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("dark", "light"):
            level = 0 if name == "dark" else 30
            draw(tmp_path / "own" / split / name / "a.png", level)
            draw(tmp_path / "own" / split / name / "b.png", level + 1)
    data = ready(tmp_path / "own")
    assert len(data.train_dataloader().samples) == 4
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 4
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 4
    draw(tmp_path / "own" / "val" / "grey" / "a.png", 3)
    with pytest.raises(InputError, match="is no class of the training images: dark, light"):
        ready(tmp_path / "own")


def test_statistics_are_those_of_the_training_split(folder: Path) -> None:
    data = ready(folder)
    images = torch.cat([images for images, _ in data.scoring_batches(0)])
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], rel=1e-3)


def test_any_size_is_scaled_and_grey_is_one_channel(folder: Path) -> None:
    draw(folder / "dark" / "wide.png", 1, size=(10, 30))
    data = ready(folder, image_size=6, channels=1)
    assert data.spec.inputs == Images(1, 6, 6)
    assert next(iter(data.test_dataloader()))[0].shape == (4, 1, 6, 6)


def test_a_run_keeps_what_was_measured(folder: Path, tmp_path: Path) -> None:
    first = ready(folder)
    first.write_facts(tmp_path)
    second = ImageFolder(folder=str(tmp_path / "gone"))
    second.read_facts(tmp_path)
    assert second.spec == first.spec
    assert (second.mean, second.std) == (first.mean, first.std)


def test_damaged_pictures_are_named_counted_and_left_out_if_wanted(folder: Path) -> None:
    for number in (3, 4):
        file = folder / "dark" / f"0{number}.png"
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(InputError, match=r"03\.png: .*; 1 more of 40 files cannot .*skip_damaged"):
        ready(folder)
    data = ready(folder, skip_damaged=True)
    assert len(data.load_train()) == 38


def test_pictures_of_every_kind_are_upright_and_have_their_levels(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    turned = Image.Exif()
    turned[0x112] = 6  # the camera was held on its side
    grey = Image.fromarray((4 * levels).astype(np.uint8))
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(half).save(tmp_path / "in" / name / "0.JPG", exif=turned, quality=95)
        Image.fromarray(levels * 1024).save(tmp_path / "in" / name / "1.png")  # 16 bits
        grey.quantize(256).save(tmp_path / "in" / name / "2.png")
        grey.convert("RGB").convert("CMYK").save(tmp_path / "in" / name / "3.jpeg", quality=95)
        Image.merge("RGBA", [grey] * 3 + [Image.new("L", (8, 8), 9)]).save(
            tmp_path / "in" / name / "4.PNG"
        )
        grey.save(tmp_path / "in" / name / "5.bmp")
        grey.convert("RGB").save(tmp_path / "in" / name / "6.webp", lossless=True)
    images = ready(tmp_path / "in", val_fraction=0.3, test_fraction=0.3).load_train().images
    photo, deep, *others = images[:7].int()
    assert photo[:, :, 5:].min() > 200
    assert photo[:, :, :3].max() < 50
    expected = torch.from_numpy((4 * levels).astype(np.int32))
    assert torch.equal(deep, expected.expand(3, 8, 8))
    for other in others:
        assert (other - expected).abs().max() <= 8  # JPEG


def test_files_of_programs_are_no_pictures_and_links_are(folder: Path, tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "._00.png"):
        (folder / "dark" / name).write_bytes(b"x")
    (folder / ".ipynb_checkpoints").mkdir()
    draw(tmp_path / "elsewhere" / "a.png", 1)
    (folder / "dark" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "dark" / "ü\n.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert len(ready(folder).load_train()) == 42
    (folder / "dark" / "00.png").unlink()
    (folder / "dark" / "00.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"00\.png: FileNotFoundError"):
        ready(folder)
    assert len(ready(folder, skip_damaged=True).load_train()) == 41


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": 0}, r"data\.image_size must be .*, got 0"),
        ({"channels": 2}, r"data\.channels must be 1 or 3, got 2"),
        ({"test_fraction": 1.5}, r"data\.test_fraction must be .*, got 1\.5"),
        ({"skip_damaged": "no"}, r"data\.skip_damaged must be true or false"),
    ],
    ids=str,
)
def test_bad_options_name_the_key(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ImageFolder(folder="x", **options)


def test_bad_folders_give_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        ready(tmp_path / "none")
    draw(tmp_path / "one" / "dark" / "a.png", 1)
    with pytest.raises(InputError, match=r"1 class folder\(s\) .* at least two"):
        ready(tmp_path / "one")
    (tmp_path / "one" / "light").mkdir()
    with pytest.raises(InputError, match=r"class 'light' has 0 image\(s\) .*; 3 are needed"):
        ready(tmp_path / "one")
    draw(folder / "light" / "99.png", 1, size=(9, 8))
    with pytest.raises(InputError, match=r"9 x 8 pixels, expected 8 x 8; data\.image_size=N"):
        ready(folder)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^data\.root: nothing .* a folder of your own$"):
        ImageFolder(folder=str(folder), root=str(tmp_path / "file")).setup()
    with pytest.raises(InputError, match=r"data\.crop_padding=9 must be at most 8"):
        ready(folder, crop_padding=9)


def test_folders_that_would_be_left_out_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "dark" / "more").mkdir()
    with pytest.raises(InputError, match=r"dark/more: is a folder within a class"):
        ready(folder)
    (folder / "dark" / "more").rmdir()
    folder.rename(tmp_path / "test")
    with pytest.raises(InputError, match=r"has test, no train$"):
        ready(tmp_path)
    (tmp_path / "test").rename(tmp_path / "train")
    (tmp_path / "validation").mkdir()
    with pytest.raises(InputError, match=r"validation: beside train/ there may be val/ and test/"):
        ready(tmp_path)


def test_a_split_may_lack_a_class_that_is_trained(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "train")
    (tmp_path / "own").mkdir()
    (tmp_path / "train").rename(tmp_path / "own" / "train")
    draw(tmp_path / "own" / "val" / "light" / "a.png", 30)
    data = ready(tmp_path / "own")
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [[1]]
    (tmp_path / "own" / "val" / "light" / "a.png").unlink()
    with pytest.raises(InputError, match=r"val: has no \.jpg"):
        ready(tmp_path / "own")


def test_a_folder_that_differs_in_its_pixels_alone_has_a_cache_of_its_own(folder: Path) -> None:
    copy = folder.parent / "negative"
    for source in folder.rglob("*.*"):
        target = copy / source.relative_to(folder).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:
            image.save(source.with_suffix(".bmp"))
            Image.fromarray(255 - np.asarray(image)).save(target)
        source.unlink()
        os.utime(source.with_suffix(".bmp"), ns=(0, 0))
    first = ready(folder).load_train().images.int()
    for path in copy.rglob("*.bmp"):
        os.utime(path, ns=(0, 0))
    second = ready(copy).load_train().images.int()
    assert torch.equal(first, 255 - second)
    folder.rename(folder.parent / "spare")
    copy.rename(folder)
    assert torch.equal(ready(folder).load_train().images.int(), second)
