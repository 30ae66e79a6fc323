"""Fashion-MNIST: 60,000 + 10,000 grey 28x28 images of clothing (Xiao et al. 2017)."""

from typing import ClassVar

from memfold.data.images.idx import IdxDataModule

__all__ = ["FashionMNIST"]


class FashionMNIST(IdxDataModule):
    """Four idx.gz files."""

    name = "fashion_mnist"
    num_channels = 1
    image_size = 28
    num_classes = 10
    class_names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean = (0.2860,)
    std = (0.3530,)
    published_sizes = (60_000, 10_000)
    url = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
    checksums: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }
    foreign_labels: ClassVar[dict[str, str]] = {
        "d53e105ee54ea40749a09fcbcd1e9432": "mnist",
        "ec29112dd5afa0611ce80d1b7f02629c": "mnist",
    }
