"""The handwritten digits that come with scikit-learn: 1,797 grey 8x8 images, no download.

They are the test set of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin &
Kaynak 1998). scikit-learn publishes no split: a fixed stratified fifth is the test set here.
"""

import torch
from sklearn.datasets import load_digits

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.image_set import ImageSet
from memfold.data.splits import stratified_order

__all__ = ["Digits"]

_NUM_TEST = 360
_TEST_SEED = 0
"""Fixed for good: no option may move a sample between training and test."""

_HIGHEST_VALUE = 16


class Digits(ImageDataModule):
    """1,437 training and 360 test images."""

    name = "digits"
    num_channels = 1
    image_size = 8
    num_classes = 10
    class_names = tuple("0123456789")
    mean = (0.3057,)
    std = (0.3759,)
    published_sizes = (1437, 360)

    def load_train(self) -> ImageSet:
        """Return the 1,437 images outside the test set."""
        return self._load(is_test=False)

    def load_test(self) -> ImageSet:
        """Return the fixed 360 test images."""
        return self._load(is_test=True)

    def _load(self, *, is_test: bool) -> ImageSet:
        pixels, classes = load_digits(return_X_y=True)
        labels = torch.from_numpy(classes).long()
        # Values 0..16 become 0..255, so that this set too is uint8 with a white of 255.
        values = torch.from_numpy(pixels) * (255 / _HIGHEST_VALUE)
        images = values.round().to(torch.uint8).view(-1, 1, 8, 8)
        order = stratified_order(labels, _TEST_SEED)
        chosen = order[:_NUM_TEST] if is_test else order[_NUM_TEST:]
        chosen = chosen.sort().values
        return ImageSet(images[chosen], labels[chosen])
