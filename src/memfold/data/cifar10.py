"""CIFAR-10: 50,000 + 10,000 colour 32x32 images (Krizhevsky 2009)."""

from memfold.data.images.cifar_binary import CifarDataModule
from memfold.data.source_files import Remote

__all__ = ["CIFAR10"]


class CIFAR10(CifarDataModule):
    """The folder cifar-10-batches-bin."""

    name = "cifar10"
    num_classes = 10
    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    published_sizes = (50_000, 10_000)
    folder = "cifar-10-batches-bin"
    remote = Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
    )
    train_files = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    test_file = "test_batch.bin"
    num_label_bytes = 1
