"""MNIST: 60,000 + 10,000 grey 28x28 images of handwritten digits (LeCun et al. 1998)."""

from typing import ClassVar

from memfold.data.images.idx import IdxDataModule

__all__ = ["MNIST"]


class MNIST(IdxDataModule):
    """Four idx.gz files."""

    name = "mnist"
    num_channels = 1
    image_size = 28
    num_classes = 10
    class_names = tuple("0123456789")
    mean = (0.1307,)
    std = (0.3081,)
    published_sizes = (60_000, 10_000)
    url = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }
    foreign_labels: ClassVar[dict[str, str]] = {
        "25c81989df183df01b3e8a0aad5dffbe": "fashion_mnist",
        "bb300cfdad3c16e7a12a480ee83cd310": "fashion_mnist",
    }
