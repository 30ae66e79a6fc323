"""Tiny-ImageNet from its folder of JPEGs, and the cache of decoded images."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.writers import one_colour, write_tiny_imagenet
from memfold.data import source_files
from memfold.data.images import decoded_files
from memfold.data.images.decoded_files import ImageFile, Layout, cached_images
from memfold.data.tiny_imagenet import TinyImageNet
from memfold.errors import InputError

FOLDER = "tiny-imagenet-200"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tiny_imagenet(tmp_path / "tiny_imagenet" / FOLDER)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded."""
    names: list[str] = []
    decode = decoded_files.decode

    def counting(path: Path, image_size: int) -> object:
        names.append(path.name)
        return decode(path, image_size)

    monkeypatch.setattr(decoded_files, "decode", counting)
    return names


def module(root: Path) -> TinyImageNet:
    return TinyImageNet(root=str(root), download=False)


def test_images_and_labels(root: Path) -> None:
    train = module(root).load_train()
    assert train.images.shape == (18, 3, 64, 64)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    # one colour per file, which JPEG keeps within a level; sorted by name, grey ones included
    expected = [40 * label + number for label in range(3) for number in range(6)]
    means = train.images.double().mean(dim=(1, 2, 3))
    assert (means - torch.tensor(expected)).abs().max() <= 1
    test = module(root).load_test()
    assert test.labels.tolist() == [2, 1, 0]  # the order of the annotations
    assert (
        test.images.double().mean(dim=(1, 2, 3)) - torch.tensor([202, 201, 200])
    ).abs().max() <= 1


def test_the_folder_may_lie_straight_in_root(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path / FOLDER)
    assert len(module(tmp_path).load_train()) == 18


def test_a_zip_is_unpacked(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.make_archive(str(other / FOLDER), "zip", root / "tiny_imagenet", FOLDER)
    made = module(other)
    made.prepare_data()
    assert torch.equal(made.load_train().images, module(root).load_train().images)


def test_files_are_decoded_once(root: Path, decoded: list[str]) -> None:
    module(root).prepare_data()
    assert len(decoded) == 18 + 3
    module(root).prepare_data()
    again = module(root)
    again.setup("fit")
    again.setup("test")
    assert len(decoded) == 21
    assert not list(root.glob("**/.unfinished*"))


def test_writing_to_the_images_changes_no_file(root: Path) -> None:
    module(root).load_train().images.zero_()
    assert module(root).load_train().images.any()


def test_a_cache_of_changed_files_is_not_used(root: Path, decoded: list[str]) -> None:
    module(root).load_train()
    path = next((root / "tiny_imagenet" / FOLDER / "train").glob("*/images/*_0.JPEG"))
    one_colour(255).save(path, format="JPEG")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    train = module(root).load_train()
    assert len(decoded) == 36
    assert (train.images.flatten(1).min(dim=1).values >= 254).sum() == 1


def test_a_cache_that_was_cut_short_is_made_again(root: Path, decoded: list[str]) -> None:
    whole = module(root).load_train().images.clone()
    path = next(root.glob("tiny_imagenet/decoded-*/images.npy"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(module(root).load_train().images, whole)
    path.unlink()
    os.mkfifo(path)
    assert torch.equal(module(root).load_train().images, whole)
    assert len(decoded) == 3 * 18


def test_an_interruption_leaves_no_cache(
    root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoded_files, "move_into_place", interrupt)
        with pytest.raises(KeyboardInterrupt):
            module(root).load_train()
    assert [path.name for path in (root / "tiny_imagenet").iterdir()] == [FOLDER]
    assert len(module(root).load_train()) == 18


def test_two_processes_may_decode_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = decoded_files.move_into_place

    def after_another(finished: Path, target: Path) -> None:
        shutil.copytree(finished, target)
        move(finished, target)

    monkeypatch.setattr(decoded_files, "move_into_place", after_another)
    assert len(module(root).load_train()) == 18


def test_a_root_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files.os, "access", lambda path, mode: False)
    monkeypatch.setattr(source_files.pooch, "os_cache", lambda project: root / "cache" / project)
    assert len(module(root).load_train()) == 18
    assert [path.name for path in (root / "tiny_imagenet").iterdir()] == [FOLDER]
    assert len(list((root / "cache" / "memfold" / "tiny_imagenet").glob("decoded-*"))) == 1


def damage_jpeg(folder: Path) -> Path:
    path = folder / "train" / "n00000001" / "images" / "n00000001_2.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    return path


def wrong_size(folder: Path) -> Path:
    path = folder / "val" / "images" / "val_1.JPEG"
    one_colour(3, size=32).save(path, format="JPEG")
    return path


def missing_training_image(folder: Path) -> Path:
    (folder / "train" / "n00000002" / "images" / "n00000002_5.JPEG").unlink()
    return folder / "train" / "n00000002" / "images"


def missing_class(folder: Path) -> Path:
    shutil.rmtree(folder / "train" / "n00000002")
    return folder / "train" / "n00000002" / "images"


def missing_validation_image(folder: Path) -> Path:
    (folder / "val" / "images" / "val_2.JPEG").unlink()
    return folder / "val" / "images" / "val_2.JPEG"


def unknown_class(folder: Path) -> Path:
    path = folder / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn99999999\t0\n")
    return path


def no_annotations(folder: Path) -> Path:
    (folder / "val" / "val_annotations.txt").unlink()
    return folder / "val" / "val_annotations.txt"


def empty_ids(folder: Path) -> Path:
    (folder / "wnids.txt").write_text("\n")
    return folder / "wnids.txt"


def too_many_ids(folder: Path) -> Path:
    (folder / "wnids.txt").write_text("".join(f"n{number}\n" for number in range(201)))
    return folder / "wnids.txt"


def huge_header(folder: Path) -> Path:
    """14,000 x 14,000 pixels, says the frame header of a file of a few bytes."""
    path = folder / "val" / "images" / "val_1.JPEG"
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (14_000).to_bytes(2, "big") * 2
    path.write_bytes(content)
    return path


def large_header(folder: Path) -> Path:
    path = huge_header(folder)
    content = path.read_bytes()
    path.write_bytes(content.replace((14_000).to_bytes(2, "big"), (10_000).to_bytes(2, "big")))
    return path


def postscript(folder: Path) -> Path:
    path = folder / "val" / "images" / "val_1.JPEG"
    one_colour(3).save(path, format="EPS")
    return path


def pipe(folder: Path) -> Path:
    path = folder / "val" / "images" / "val_1.JPEG"
    path.unlink()
    os.mkfifo(path)
    return path


def pipe_of_ids(folder: Path) -> Path:
    (folder / "wnids.txt").unlink()
    os.mkfifo(folder / "wnids.txt")
    return folder / "wnids.txt"


def named(*, image: str | None = None, class_id: str | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / ("wnids.txt" if class_id else "val/val_annotations.txt")
        path.write_text(class_id or f"{image}\tn00000001\t0\n")
        return path

    return write


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (huge_header, "DecompressionBomb"),
        (large_header, "DecompressionBomb|10000 x 10000 pixels"),
        (postscript, "UnidentifiedImageError"),
        (pipe, "is no regular file"),
        (pipe_of_ids, "is no regular file"),
        (named(class_id="a\0b"), "'a.x00b' is no id"),
        (named(class_id="../../x"), "is no id"),
        (named(class_id="n" * 400), "'n{80}' is no id"),
        (named(image="a\0b"), "line 1 is 'a.x00b"),
        (named(image="../images/val_1.JPEG"), "line 1 is"),
        (named(image="n" * 400), "line 1 is"),
        (damage_jpeg, "expected a complete image"),
        (wrong_size, "32 x 32 pixels, expected 64 x 64"),
        (missing_training_image, "1 of the images in .*_boxes.txt are missing, such as .*_5.JPEG"),
        (missing_class, "no .JPEG files"),
        (missing_validation_image, "FileNotFoundError.*expected a complete image"),
        (unknown_class, "line 1 is 'val_0.*n99999999.*', expected a file name"),
        (no_annotations, "FileNotFoundError.*expected a text file"),
        (empty_ids, "is empty"),
        (too_many_ids, "201 ids, expected at most 200"),
    ],
)
def test_damage_gives_one_line(damage: object, reason: str, root: Path) -> None:
    path = damage(root / "tiny_imagenet" / FOLDER)
    with pytest.raises(InputError, match=reason) as raised:
        module(root).prepare_data()
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tiny-imagenet-200\.zip in .*tiny_imagenet or "):
        module(tmp_path).prepare_data()
    with pytest.raises(InputError, match=r"no tiny-imagenet-200 in .*tiny_imagenet or "):
        module(tmp_path).load_train()


def test_labels_and_sizes_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "x.JPEG"
    one_colour(9).save(path, format="JPEG")
    for label in (0, 1):
        decoded, _ = cached_images([ImageFile(path, label)], Layout(64), tmp_path / "cache")
        assert decoded.labels.tolist() == [label]
    with pytest.raises(InputError, match="64 x 64 pixels, expected 32 x 32"):
        cached_images([ImageFile(path, 0)], Layout(32), tmp_path / "cache")
