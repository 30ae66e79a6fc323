"""Tiny files in the published formats."""

import gzip
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cycling_labels(count: int, num_classes: int) -> np.ndarray:
    return (np.arange(count) % num_classes).astype(np.uint8)


def idx_content(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(idx_content(values), compresslevel=1))


def write_idx_set(folder: Path, num_train: int = 40, num_test: int = 20) -> None:
    """Write images whose first pixel is their number, and labels that cycle through 0..9."""
    for prefix, count, seed in (("train", num_train, 0), ("t10k", num_test, 1)):
        images = random_bytes((count, 28, 28), seed)
        images[:, 0, 0] = np.arange(count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", cycling_labels(count, 10))


def cifar_records(count: int, num_label_bytes: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Return (count, label bytes + 3072); a coarse label is 255 less the class."""
    labels = cycling_labels(count, num_classes)[:, None]
    if num_label_bytes == 2:
        labels = np.concatenate([255 - labels, labels], axis=1)
    return np.concatenate([labels, random_bytes((count, 3072), seed)], axis=1)


def write_cifar10(folder: Path, num_records: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        (folder / f"{name}.bin").write_bytes(cifar_records(num_records, 1, 10, seed).tobytes())


def write_cifar100(folder: Path, num_train: int = 200, num_test: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(cifar_records(num_train, 2, 100, 0).tobytes())
    (folder / "test.bin").write_bytes(cifar_records(num_test, 2, 100, 1).tobytes())


def tar_folder(folder: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tarred:
        tarred.add(folder, arcname=folder.name)


def write_tiny_imagenet(folder: Path, num_classes: int = 3, per_class: int = 6) -> list[str]:
    """Write smooth JPEGs, the second image of each class grey; return the class ids."""
    class_ids = [f"n{number:08d}" for number in range(num_classes)]
    (folder / "val" / "images").mkdir(parents=True)
    # Not in order: labels must come from the sorted ids.
    (folder / "wnids.txt").write_text("".join(f"{class_id}\n" for class_id in class_ids[::-1]))
    annotations = []
    for label, class_id in enumerate(class_ids):
        images = folder / "train" / class_id / "images"
        images.mkdir(parents=True)
        names = [f"{class_id}_{number}.JPEG" for number in range(per_class)]
        for number, name in enumerate(names):
            picture = one_colour(40 * label + number)
            (picture.convert("L") if number == 1 else picture).save(images / name, format="JPEG")
        boxes = "".join(f"{name}\t0\t0\t63\t63\n" for name in names)
        (folder / "train" / class_id / f"{class_id}_boxes.txt").write_text(boxes)
        name = f"val_{label}.JPEG"
        one_colour(200 + label).save(folder / "val" / "images" / name, format="JPEG")
        annotations.append(f"{name}\t{class_id}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations[::-1]))
    return class_ids


def one_colour(value: int, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))
