"""A strategy with parts of every kind and a term of the loss, for tests alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memfold.compression import strategy
from memfold.compression.compressed_model import check_replaceable
from memfold.compression.parts import ComputedWeights, Level
from memfold.compression.selection import CompressibleWeight
from memfold.compression.strategy import Context, Ratios, Strategy
from memfold.seeding import derive_seed

PENALTY = 1e-3
RANK = 24


@dataclass(frozen=True, kw_only=True)
class Basis(Strategy, name="three_levels"):
    """Weights with as many columns mix the rows of one basis: W = (1 + strength / 100) C_l B_g."""

    ratios: ClassVar[Ratios] = "one"

    def build(
        self, model: nn.Module, weights: tuple[CompressibleWeight, ...], context: Context
    ) -> "BasisWeights":
        check_replaceable(model, weights)
        mixed = BasisWeights(self, model, weights)
        like = weights[0].tensor.detach()

        def draw(what: str, index: int, *shape: int) -> Tensor:
            seed = derive_seed(self.seed, what, weights[index].name)
            generator = torch.Generator("cpu").manual_seed(seed)
            size = weights[index].tensor.detach().square().mean().item() / RANK
            return torch.randn(shape, generator=generator).mul_(0.7 * size**0.25).to(like)

        widths = mixed.columns
        bases = [draw("basis", group[0], RANK, widths[group[0]]) for group in mixed.groups]
        mixes = [draw("mix", i, weight.shape[0], RANK) for i, weight in enumerate(weights)]
        mixed.attach({"basis": bases, "mix": mixes, "basis_strength": [torch.zeros(1).to(like)]})
        return mixed

    def rebuild(
        self,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        num_values: int,
        tensors: Mapping[str, Tensor],
    ) -> "BasisWeights":
        check_replaceable(model, weights)
        mixed = BasisWeights(self, model, weights)
        values = tensors["basis_values"].to(weights[0].tensor.detach())
        widths = [RANK * mixed.columns[group[0]] for group in mixed.groups]
        heights = [RANK * weight.shape[0] for weight in weights]
        *found, strength = values.split([*widths, *heights, 1])
        bases = [part.view(RANK, -1).clone() for part in found[: len(widths)]]
        mixes = [part.view(-1, RANK).clone() for part in found[len(widths) :]]
        mixed.attach({"basis": bases, "mix": mixes, "basis_strength": [strength.clone()]})
        return mixed


class BasisWeights(ComputedWeights):
    """Parts of a group, of a weight and of the model."""

    parts: Mapping[str, Level] = {
        "basis": "group",
        "mix": "weight",
        "basis_strength": "model",
    }

    def __init__(
        self, strategy: Strategy, model: nn.Module, weights: tuple[CompressibleWeight, ...]
    ) -> None:
        self.columns = [weight.numel // weight.shape[0] for weight in weights]
        self.groups = [
            [i for i, other in enumerate(self.columns) if other == width]
            for width in dict.fromkeys(self.columns)
        ]
        super().__init__(strategy, model, weights, groups=self.groups)

    def weight(self, index: int) -> Tensor:
        product = self.part(index, "mix") @ self.part(index, "basis")
        return ((1 + self.part(index, "basis_strength") / 100) * product).view(self.shapes[index])

    def extra_loss(self) -> Tensor:
        """Keep the bases small."""
        bases = [self.part(group[0], "basis") for group in self.groups]
        return PENALTY * torch.stack([basis.square().sum() for basis in bases]).sum()

    @property
    def index_bytes(self) -> int:
        return 0

    @property
    def index_format(self) -> str:
        return "none"

    def stored_values(self) -> dict[str, list[Tensor]]:
        bases = [self.part(group[0], "basis") for group in self.groups]
        mixes = [self.part(index, "mix") for index in range(len(self.shapes))]
        return {"basis_values": [*bases, *mixes, self.part(0, "basis_strength")]}

    def index_tensors(self) -> dict[str, Tensor]:
        return {}


del strategy._REGISTRY[Basis.name]
OVERRIDES = ("compression=dense", f"compression._target_={__name__}.{Basis.__qualname__}")


@contextmanager
def registered() -> Iterator[None]:
    """Let `three_levels` be found by its name."""
    strategy._REGISTRY[Basis.name] = Basis
    try:
        yield
    finally:
        del strategy._REGISTRY[Basis.name]
