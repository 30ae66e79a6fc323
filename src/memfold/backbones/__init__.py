"""Networks that the data set sizes: any input channels, image size and number of classes.

A backbone is a callable `(in_channels, image_size, num_classes, **options) -> nn.Module`. The
first three come from the data set; the options, with their defaults, from
`conf/backbone/NAME.yaml`.
"""

from memfold.backbones.cnn import CNN
from memfold.backbones.custom import build_custom
from memfold.backbones.mlp import MLP
from memfold.backbones.resnet18 import ResNet18
from memfold.backbones.resnet20 import ResNet20
from memfold.backbones.vgg11_bn import VGG11BN

__all__ = ["CNN", "MLP", "VGG11BN", "ResNet18", "ResNet20", "build_custom"]
