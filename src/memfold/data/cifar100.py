"""CIFAR-100 with its 100 fine labels: 50,000 + 10,000 colour 32x32 images (Krizhevsky 2009)."""

from memfold.data.images.cifar_binary import CifarDataModule
from memfold.data.source_files import Remote

__all__ = ["CIFAR100"]

_CLASS_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree
orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum
rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class CIFAR100(CifarDataModule):
    """The folder cifar-100-binary."""

    name = "cifar100"
    num_classes = 100
    class_names = tuple(_CLASS_NAMES.split())
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
