"""CIFAR-100 with its 100 fine labels: 50,000 + 10,000 colour 32x32 images (Krizhevsky 2009)."""

from memfold.data.images.cifar_binary import CifarDataModule
from memfold.data.source_files import Remote

__all__ = ["CIFAR100"]


class CIFAR100(CifarDataModule):
    """The folder cifar-100-binary."""

    name = "cifar100"
    num_classes = 100
    mean = (0.5071, 0.4866, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    published_sizes = (50_000, 10_000)
    folder = "cifar-100-binary"
    remote = Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "md5:03b5dce01913d631647c71ecec9e9cb8",
    )
    train_files = ("train.bin",)
    test_file = "test.bin"
    num_label_bytes = 2
