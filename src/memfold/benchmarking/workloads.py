"""The models that are measured, each with random data of its usual size and a loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from memfold.backbones import GPT, VGG11BN, ResNet20
from memfold.errors import InputError

__all__ = ["WORKLOADS", "Loss", "Workload", "workload"]

Loss = Callable[[Tensor, Tensor], Tensor]

_IMAGE = (3, 32, 32)
_NUM_CLASSES = 10
_NUM_TOKENS = 4096
_NUM_BYTES = 256
_CONTEXT = 128
_PATCH = 4
_WIDTH = 384
_NUM_LAYERS = 6


@dataclass(frozen=True)
class Workload:
    """A model with what it is trained on."""

    summary: str
    """What it is, for `--list`."""
    build: Callable[[], nn.Module]
    """Makes the model on the default device in the default dtype, from the global generator."""
    batch: Callable[[int, Generator], tuple[Tensor, Tensor]]
    """Draws inputs and targets, batch first, on the CPU."""
    loss: Loss
    """(output, target) -> scalar."""
    batch_size: int = 128
    """Unless another one is asked for."""
    min_calls: int = 5
    """Timed calls in inference, at least."""


class ViTLike(nn.Module):
    """Pre-norm encoder over 64 patches of 4 x 4 pixels; the head reads their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(_IMAGE[0], _WIDTH, _PATCH, stride=_PATCH)
        self.positions = nn.Embedding((_IMAGE[1] // _PATCH) ** 2, _WIDTH)
        self.encoder = _encoder()
        self.head = nn.Linear(_WIDTH, _NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to logits (B, 10)."""
        x_BTD = self.patches(images).flatten(2).transpose(1, 2)
        x_BTD = x_BTD + self.positions(torch.arange(x_BTD.shape[1], device=images.device))
        return self.head(self.encoder(x_BTD).mean(dim=1))


class GPTLike(nn.Module):
    """Pre-norm encoder with a causal mask; the head is the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_NUM_TOKENS, _WIDTH)
        self.positions = nn.Embedding(_CONTEXT, _WIDTH)
        self.encoder = _encoder()
        self.head = nn.Linear(_WIDTH, _NUM_TOKENS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, 4096)."""
        length, device = tokens.shape[1], tokens.device
        x_BTD = self.tokens(tokens) + self.positions(torch.arange(length, device=device))
        mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        x_BTD = self.encoder(x_BTD, mask=mask, is_causal=True)
        # Embeddings have unit variance; without the factor the first logits would be too large.
        return self.head(x_BTD * _WIDTH**-0.5)


def workload(name: str) -> Workload:
    """Look a workload up by name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in WORKLOADS:
        raise InputError(f"--models {name}: unknown; models: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def _encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        _WIDTH,
        nhead=6,
        dim_feedforward=4 * _WIDTH,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    norm = nn.LayerNorm(_WIDTH)
    return nn.TransformerEncoder(layer, _NUM_LAYERS, norm=norm, enable_nested_tensor=False)


def _mlp(widths: Sequence[int]) -> Workload:
    def build() -> nn.Module:
        model = nn.Sequential()
        for num_inputs, num_outputs in pairwise(widths):
            model.extend([nn.Linear(num_inputs, num_outputs), nn.ReLU()])
        return model[:-1]

    def batch(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(size, widths[0], generator=generator)
        return inputs, torch.randint(widths[-1], (size,), generator=generator)

    return Workload(f"MLP {'-'.join(map(str, widths))}", build, batch, F.cross_entropy)


def _linear(width: int) -> Workload:
    def batch(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        draws = torch.randn(2, size, width, generator=generator)
        return draws[0], draws[1]

    return Workload(
        f"one linear layer {width} x {width} without bias",
        lambda: nn.Linear(width, width, bias=False),
        batch,
        F.mse_loss,
        min_calls=20,
    )


def _resnet20(image: tuple[int, int, int]) -> Workload:
    def batch(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return _images(size, generator, image)

    return Workload(
        f"ResNet-20, {image[1]} x {image[2]} images",
        lambda: ResNet20(image[0], image[1], _NUM_CLASSES),
        batch,
        F.cross_entropy,
    )


def _images(
    size: int, generator: Generator, image: tuple[int, int, int] = _IMAGE
) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(size, *image, generator=generator)
    return inputs, torch.randint(_NUM_CLASSES, (size,), generator=generator)


def _sequences(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(_NUM_TOKENS, (size, _CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _bytes(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(_NUM_BYTES, (size, _CONTEXT + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


WORKLOADS: dict[str, Workload] = {
    "mlp_tiny": _mlp((32, 64, 64, 10)),
    "mlp38m": _mlp((1024, 4096, 4096, 4096, 16)),
    "mlp50m": _mlp((784, 4096, 4096, 4096, 4096, 10)),
    "lenet300": _mlp((784, 300, 100, 10)),
    "resnet20": _resnet20(_IMAGE),
    "resnet20_8": _resnet20((1, 8, 8)),
    "gpt_small": Workload(
        "GPT of 0.8 million weights: 4 layers, width 128, bytes, context 128",
        lambda: GPT(_NUM_BYTES, _CONTEXT),
        _bytes,
        _token_loss,
        batch_size=16,
    ),
    "vgg11": Workload(
        "VGG-11 with BatchNorm, 32 x 32 images",
        lambda: VGG11BN(_IMAGE[0], _IMAGE[1], _NUM_CLASSES),
        _images,
        F.cross_entropy,
    ),
    "vit": Workload(
        "ViT-like: 6 layers, width 384, 64 patches an image",
        ViTLike,
        _images,
        F.cross_entropy,
        batch_size=64,
    ),
    "gpt": Workload(
        "GPT-like: 6 layers, width 384, 4096 tokens, context 128",
        GPTLike,
        _sequences,
        _token_loss,
        batch_size=32,
    ),
    "linear4096": _linear(4096),
    "linear8192": _linear(8192),
}
"""By name."""
