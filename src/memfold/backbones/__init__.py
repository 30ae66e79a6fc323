"""Networks for any data: a backbone is one file, and one `conf/backbone/NAME.yaml`.

A backbone is a callable that gives an nn.Module. What it has to know of the data it asks for by the
names of its parameters (`facts.py`); its other parameters are its options.
"""

from memfold.backbones.cnn import CNN
from memfold.backbones.custom import build_custom
from memfold.backbones.gpt import GPT
from memfold.backbones.hf import build_hf
from memfold.backbones.lstm import LSTM
from memfold.backbones.mlp import MLP, TableMLP, build_mlp
from memfold.backbones.resnet18 import ResNet18
from memfold.backbones.resnet20 import ResNet20
from memfold.backbones.tables import TableTransformer
from memfold.backbones.timm import build_timm
from memfold.backbones.vgg11_bn import VGG11BN
from memfold.backbones.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "LSTM",
    "MLP",
    "VGG11BN",
    "ResNet18",
    "ResNet20",
    "TableMLP",
    "TableTransformer",
    "ViT",
    "build_custom",
    "build_hf",
    "build_mlp",
    "build_timm",
]
