"""Sizes, shapes and first weights of the built-in backbones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from memfold.backbones import CNN, MLP, VGG11BN, ResNet18, ResNet20
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.training.networks import build_backbone

BACKBONES = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet20": ResNet20,
    "resnet18": ResNet18,
    "vgg11_bn": VGG11BN,
}
CONF = Path(__file__).parents[2] / "conf"


def count(model: nn.Module, *, only_compressible: bool = False) -> int:
    parameters = [p for p in model.parameters() if not only_compressible or p.dim() >= 2]
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("build", "facts", "total", "compressible"),
    [
        (ResNet20, (3, 32, 10), 272_474, 270_896),
        (ResNet20, (3, 32, 100), 278_324, 276_656),
        (ResNet20, (3, 64, 200), 284_824, 283_056),
        (VGG11BN, (3, 32, 10), 9_231_114, 9_222_848),
        (VGG11BN, (3, 32, 100), 9_277_284, 9_268_928),
        (VGG11BN, (3, 64, 200), 9_328_584, 9_320_128),
        (ResNet18, (3, 64, 200), 11_271_432, 11_261_632),
        # 64 * 256 + 256 * 256 + 256 * 10 weights and 256 + 256 + 10 biases
        (MLP, (1, 8, 10), 85_002, 84_480),
        # 9 * (32 + 32 * 64 + 64 * 128) + 128 * 10 weights, 2 * (32 + 64 + 128) + 10 more
        (CNN, (1, 28, 10), 94_186, 93_728),
    ],
)
def test_parameter_counts(
    build: Callable[..., nn.Module], facts: tuple[int, int, int], total: int, compressible: int
) -> None:
    model = build(*facts)
    assert count(model) == total
    assert count(model, only_compressible=True) == compressible


@pytest.mark.parametrize(
    ("build", "facts", "width", "total"),
    [
        # the small models of the paper's comparison
        (ResNet20, (3, 32, 10), 8, 68_786),
        (ResNet20, (3, 32, 10), 2, 4_556),
        (VGG11BN, (3, 32, 10), 32, 2_311_562),
        (VGG11BN, (3, 32, 10), 2, 9_482),
        (ResNet18, (3, 64, 200), 16, 725_976),
        (MLP, (1, 8, 10), 4, 64 * 4 + 4 + 4 * 4 + 4 + 4 * 10 + 10),
        (CNN, (1, 8, 10), 2, 9 * (2 + 2 * 4 + 4 * 8) + 2 * (2 + 4 + 8) + 8 * 10 + 10),
    ],
)
def test_width_sets_the_base_channel_count(
    build: Callable[..., nn.Module], facts: tuple[int, int, int], width: int, total: int
) -> None:
    assert count(build(*facts, width=width)) == total


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64), (3, 5)])
def test_every_size_gives_logits_and_gradients(name: str, channels: int, size: int) -> None:
    model = BACKBONES[name](channels, size, 7, width=4)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.logsumexp(dim=1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", BACKBONES)
def test_the_global_seed_fixes_the_weights(name: str) -> None:
    def state(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(BACKBONES[name](3, 16, 10, width=4).parameters())

    assert torch.equal(state(3), state(3))
    assert not torch.equal(state(3), state(4))


def test_resnet20_starts_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = ResNet20(3, 32, 10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    weights = torch.cat([norm.weight.detach() for norm in norms])
    assert 0 <= weights.min() < 0.05
    assert 0.95 < weights.max() <= 1
    # 784 draws of U(0, 1): the mean has a standard error of 0.01
    assert abs(weights.mean() - 0.5) < 0.04
    assert not torch.cat([norm.bias.detach() for norm in norms]).any()
    assert not model.head.bias.any()
    shortcut_sizes = [
        module.weight.shape
        for name, module in model.named_modules()
        if "shortcut" in name and isinstance(module, nn.Conv2d)
    ]
    assert shortcut_sizes == [(32, 16, 1, 1), (64, 32, 1, 1)]


def test_resnet20_with_norms_of_one() -> None:
    model = ResNet20(3, 32, 10, norm_init="ones")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


@pytest.mark.parametrize(
    ("build", "facts", "fan"), [(ResNet20, (3, 32, 10), 0), (ResNet18, (3, 64, 200), 1)]
)
def test_convolutions_start_kaiming_normal(
    build: Callable[..., nn.Module], facts: tuple[int, int, int], fan: int
) -> None:
    torch.manual_seed(0)
    for module in build(*facts).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            channels = module.in_channels if fan == 0 else module.out_channels
            expected = (2 / (channels * module.kernel_size[0] ** 2)) ** 0.5
            # more than 5000 normal draws: the standard error of the std is below 1 %
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_mlp_hidden_widths() -> None:
    model = MLP(1, 8, 10, hidden_widths=[5, 3])
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(5, 64), (3, 5), (10, 3)]
    assert count(MLP(1, 8, 10, hidden_widths=[])) == 64 * 10 + 10


def test_an_mlp_of_squares_sees_their_means() -> None:
    torch.manual_seed(0)
    model, images = MLP(2, 7, 10, hidden_widths=[5], pooling=3), torch.randn(4, 2, 7, 7)
    means = images[:, :, :6, :6].reshape(4, 2, 2, 3, 2, 3).mean((3, 5))
    torch.testing.assert_close(model(images), model.head(model.hidden(means.flatten(1))))
    with pytest.raises(InputError, match=r"backbone\.pooling=8: must be at most .* 7"):
        MLP(2, 7, 10, pooling=8)


def test_a_resnet20_of_squares_sees_their_means() -> None:
    torch.manual_seed(0)
    model, images = ResNet20(3, 9, 10, width=2, pooling=2).eval(), torch.randn(4, 3, 9, 9)
    means = images[:, :, :8, :8].reshape(4, 3, 4, 2, 4, 2).mean((3, 5))
    whole = ResNet20(3, 4, 10, width=2).eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), whole(means))
    assert model.with_widths(model.widths).pooling == 2
    with pytest.raises(InputError, match=r"backbone\.pooling=9: must be at most .* 8"):
        ResNet20(3, (10, 8), 10, pooling=9)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("width", [0, -1, 1.5, True, "8"])
def test_a_bad_width_names_the_key(name: str, width: object) -> None:
    with pytest.raises(InputError, match=rf"^backbone\.width={width}: must be an integer.*1$"):
        BACKBONES[name](1, 8, 10, width=width)


@pytest.mark.parametrize("name", BACKBONES)
def test_its_own_widths_give_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = BACKBONES[name](3, 16, 10, width=4)
    torch.manual_seed(0)
    other = model.with_widths(model.widths)
    assert type(other) is type(model)
    assert other.widths == model.widths
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", BACKBONES)
def test_every_width_is_free(name: str) -> None:
    model = BACKBONES[name](3, 16, 10, width=4)
    before = count(model)
    for index in range(len(model.widths)):
        widths = [width + (i == index) for i, width in enumerate(model.widths)]
        wider = model.with_widths(widths)
        assert wider.widths == tuple(widths)
        assert list(wider.state_dict()) == list(model.state_dict())
        assert count(wider) > before
        assert wider(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    narrowest = model.with_widths([1] * len(model.widths))
    assert list(narrowest.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("model", "total"),
    [
        (MLP(1, 8, 10, hidden_widths=[5, 3]), 65 * 5 + 6 * 3 + 4 * 10),
        (CNN(1, 8, 10, widths=[2, 3, 5]), 9 * (2 + 2 * 3 + 3 * 5) + 2 * 10 + 6 * 10),
        (
            VGG11BN(1, 8, 10, widths=[1, 2, 3, 4, 5, 6, 7, 8]),
            9 * (1 + 2 + 6 + 12 + 20 + 30 + 42 + 56) + 3 * 36 + 9 * 10,
        ),
        # Stem; two 3x3 convolutions and their norms in each block; 1x1 shortcuts; head.
        (
            ResNet20(1, 8, 10, widths=[2, 3, 4, *range(5, 14)]),
            (9 * 2 + 4)
            + sum(9 * 2 * i * 2 + 2 * i + 4 for i in (5, 6, 7))
            + (9 * 8 * (2 + 3) + sum(9 * 2 * i * 3 for i in (9, 10)) + 2 * 27 + 18 + 6 + 6)
            + (9 * 11 * (3 + 4) + sum(9 * 2 * i * 4 for i in (12, 13)) + 2 * 36 + 24 + 12 + 8)
            + 5 * 10,
        ),
    ],
)
def test_widths_set_each_layer(model: nn.Module, total: int) -> None:
    assert count(model) == total


def test_bad_options_name_the_key() -> None:
    with pytest.raises(
        InputError, match=r"backbone\.widths=\[8, 8\]: must be a list of 3 integers"
    ):
        CNN(1, 8, 10, widths=[8, 8])
    with pytest.raises(InputError, match=r"backbone\.widths=0: must be an integer"):
        ResNet18(1, 8, 10, widths=[0] * 12)
    with pytest.raises(InputError, match=r"backbone\.widths=8: must be a list"):
        VGG11BN(1, 8, 10, widths=8)
    with pytest.raises(InputError, match=r"backbone\.norm_init=half.*'uniform', 'ones'"):
        ResNet20(1, 8, 10, norm_init="half")
    with pytest.raises(InputError, match=r"backbone\.hidden_widths=0"):
        MLP(1, 8, 10, hidden_widths=[8, 0])
    with pytest.raises(InputError, match=r"backbone\.hidden_widths=64: must be a list"):
        MLP(1, 8, 10, hidden_widths=64)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_config_builds_the_default_network(name: str) -> None:
    with initialize_config_dir(str(CONF / "backbone"), version_base="1.3"):
        config = compose(name)
    options = OmegaConf.to_container(config)
    assert isinstance(options, dict)
    from_config = build_backbone(options, DataSpec(Images(1, 8, 8), Classes(10)))
    assert type(from_config) is BACKBONES[name]
    assert count(from_config) == count(BACKBONES[name](1, 8, 10))
