"""Narrower backbones: their sizes, their values, their artifacts, and what cannot be done."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

import memfold
from forging import forge
from memfold.backbones import CNN, GPT, MLP, VGG11BN, ResNet18, ResNet20, ViT
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.memory import train_state_bytes
from strategies.models import MODELS
from strategies.models import build as build_plain

BACKBONES = {
    "mlp": lambda: MLP(1, 8, 10),
    "cnn": lambda: CNN(1, 28, 10),
    "resnet20": lambda: ResNet20(3, 32, 10),
    "vgg11_bn": lambda: VGG11BN(3, 32, 10),
    "resnet18": lambda: ResNet18(3, 64, 200),
}
TINY = {
    "mlp": lambda: MLP(2, 4, 5, hidden_widths=[12, 9, 7]),
    "mlp_of_squares": lambda: MLP(2, 8, 5, hidden_widths=[12, 9, 7], pooling=2),
    "cnn": lambda: CNN(2, 8, 5, width=6),
    "resnet20": lambda: ResNet20(2, 8, 5, width=4, norm_init="ones"),
    "vgg11_bn": lambda: VGG11BN(2, 8, 5, width=4),
    "resnet18": lambda: ResNet18(2, 8, 5, width=4),
    "vit": lambda: ViT(2, 8, 5, width=32, depth=3),
}
IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))


def build(name):
    torch.manual_seed(3)
    return TINY[name]().eval()


def outputs(model, name):
    return model.eval()(IMAGES[:, :, :4, :4] if name == "mlp" else IMAGES)


def num_weights(model):
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2)


def all_bytes(model):
    return sum(t.numel() * t.itemsize for t in model.state_dict().values())


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_meet_every_ratio_within_two_percent(name):
    counts = []
    for ratio in (1, 0.5, 0.3, 0.1, 0.03, 0.01):
        model = BACKBONES[name]()
        dense, dense_widths = num_weights(model), model.widths
        memfold.compress(model, "small", ratio=ratio)
        counts.append(num_weights(model))
        assert counts[-1] == pytest.approx(ratio * dense, rel=0.02)
        assert memfold.footprint(model).ratio == counts[-1] / dense
        scale = sum(model.widths) / sum(dense_widths)
        for narrow, wide in zip(model.widths, dense_widths, strict=True):
            assert abs(narrow - scale * wide) <= 3
    assert all(large > small for large, small in pairwise(counts))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.52, 0.35, 0.17, 0.07, 0.03])
def test_coarse_steps_of_a_transformer_are_made_up_for_by_its_blocks(share, tmp_path):
    model = GPT(256, 64, width=64, depth=8)
    budget = int(share * memfold.footprint(model).dense_bytes)
    memfold.compress(model, "small", budget_bytes=budget)
    size = memfold.save(model, tmp_path / "model.safetensors")
    assert 0.98 * budget <= size <= budget
    pairs, *hidden = model.widths
    assert model.embedding.embedding_dim == 8 * pairs
    assert model.head.weight is model.embedding.weight
    assert max(hidden) - min(hidden) <= 1
    fresh = memfold.load(tmp_path / "model.safetensors", GPT(256, 64, width=64, depth=8))
    tokens = torch.arange(10)[None]
    assert torch.equal(fresh.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_a_budget_is_met_by_the_file_and_never_exceeded(name, bits, tmp_path):
    dense_bytes = memfold.footprint(BACKBONES[name]()).dense_bytes
    for share in (0.1, 0.05, 0.02):
        budget = int(share * dense_bytes)
        model = memfold.compress(BACKBONES[name](), "small", budget_bytes=budget, bits=bits)
        size = memfold.save(model, tmp_path / "model.safetensors")
        assert 0.98 * budget <= size <= budget


def test_a_footprint_finds_a_narrow_part():
    part = memfold.compress(build("cnn"), "small", ratio=0.3)
    whole = nn.ModuleDict({"body": part, "head": nn.Linear(5, 2)})
    counts, counted = memfold.footprint(part), memfold.footprint(whole)
    assert counted.stored_bytes == counts.stored_bytes + 4 * 12
    assert counted.dense_bytes == counts.dense_bytes + 4 * 12


def test_fewer_bits_make_a_wider_network():
    widths = [
        memfold.compress(MLP(1, 8, 10), "small", budget_bytes=20_000, bits=bits).widths
        for bits in (32, 16, 8, 4)
    ]
    assert all(sum(a) < sum(b) for a, b in pairwise(widths))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [{"ratio": 1}, {"budget_bytes": 10**8}])
def test_nothing_changes_without_need(name, size):
    model, plain = build(name), build(name)
    modules = list(model.modules())
    memfold.compress(model, "small", **size)
    assert list(model.modules()) == modules
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    counts = memfold.footprint(model)
    assert counts.ratio == 1
    assert counts.stored_bytes - counts.index_bytes == counts.dense_bytes == all_bytes(plain)


@pytest.mark.parametrize("name", TINY)
def test_bytes_are_those_of_two_plain_networks(name):
    plain, model = build(name), build(name)
    assert memfold.compress(model, "small", ratio=0.3) is model
    narrow = plain.with_widths(model.widths)
    assert type(model) is type(plain)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in narrow.state_dict().items()
    }
    counts = memfold.footprint(model)
    assert counts.dense_bytes == all_bytes(plain)
    assert counts.num_weights == num_weights(plain)
    assert counts.num_values == num_weights(narrow)
    assert counts.value_bytes == 4 * num_weights(narrow)
    assert counts.untouched_bytes == all_bytes(narrow) - 4 * num_weights(narrow)
    assert counts.index_bytes == 4 * len(model.widths)
    assert compression_of(model).index_format == "widths"
    assert train_state_bytes(model) == all_bytes(narrow) + counts.index_bytes


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_initial_values_come_from_the_seed_and_nothing_else_moves(name):
    def compressed(seed, global_seed):
        model = build(name)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        memfold.compress(model, "small", ratio=0.3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.state_dict()

    first, again, other = compressed(1, 5), compressed(1, 6), compressed(2, 5)
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    weights = [key for key, tensor in first.items() if tensor.dim() >= 2]
    assert not any(torch.equal(other[key], first[key]) for key in weights)


def test_options_of_the_backbone_and_its_initialisation_stay():
    model = memfold.compress(ResNet20(3, 32, 10, norm_init="ones"), "small", ratio=0.3)
    assert torch.equal(model.stem_norm.weight, torch.ones(model.widths[0]))
    weight = model.blocks[8].conv2.weight
    # Some 10,000 normal draws: the standard error of the std is below 1 %.
    assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[1])) ** 0.5, rel=0.05)
    model = memfold.compress(ResNet20(3, 32, 10), "small", ratio=0.3)
    norms = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0.4 < norms.mean().item() < 0.6


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bits", [32, 6])
def test_artifact_copies_and_densified_network_have_the_same_function(name, bits, tmp_path):
    model = memfold.compress(build(name), "small", ratio=0.3, seed=4, bits=bits)
    model.train()(IMAGES[:, :, :4, :4] if name == "mlp" else IMAGES)  # moves the statistics
    expected = outputs(model, name)
    dense = memfold.densify(model)
    assert compression_of(dense) is None
    assert compression_of(model) is not None
    for other in (dense, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, name), expected)
    assert memfold.footprint(copy.deepcopy(model)) == memfold.footprint(model)

    path = tmp_path / "model.safetensors"
    memfold.save(model, path)
    fresh = build(name)
    loaded = memfold.load(path, fresh)
    assert loaded is fresh
    assert loaded.widths == model.widths
    assert memfold.footprint(loaded) == memfold.footprint(model)
    if bits == 32:
        assert torch.equal(outputs(loaded, name), expected)
    for key, tensor in model.state_dict().items():
        # Half a step of six bits is 1/62 of the largest value, and scales are rounded.
        close = {32: 0, 6: 0.017}[bits] * tensor.abs().max() * (tensor.dim() >= 2)
        assert (loaded.state_dict()[key] - tensor).abs().max() <= close, key
    memfold.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_an_unchanged_network_has_an_artifact_too(tmp_path):
    model = memfold.compress(build("cnn"), "small", ratio=1)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", TINY["cnn"]())
    assert torch.equal(outputs(loaded, "cnn"), outputs(model, "cnn"))


def test_dtype_mode_and_placement_stay(tmp_path):
    model = build("cnn").double().eval()
    memfold.compress(model, "small", ratio=0.3)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    counts = memfold.footprint(model)
    assert counts.value_bytes == 8 * counts.num_values
    assert counts.dense_bytes == all_bytes(build("cnn").double())
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", build("cnn").requires_grad_(False))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trained_values_go_through_a_state_dict():
    model = memfold.compress(build("resnet20"), "small", ratio=0.3, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = outputs(model, "resnet20")
    model.train()(IMAGES).square().sum().backward()
    optimizer.step()
    other = memfold.compress(build("resnet20"), "small", ratio=0.3, seed=2)
    other.load_state_dict(model.state_dict())
    after = outputs(model, "resnet20")
    assert not torch.equal(after, before)
    assert torch.equal(outputs(other, "resnet20"), after)


def test_a_replaced_layer_is_not_saved(tmp_path):
    model = memfold.compress(build("cnn"), "small", ratio=0.3)
    model.head = nn.Linear(model.head.in_features + 1, 5)
    with pytest.raises(InputError, match=r"head\.weight: its module was replaced"):
        memfold.save(model, tmp_path / "model.safetensors")


class Tied(nn.Module):
    """A backbone of a user: two tied matrices, one width, a scalar and a buffer."""

    def __init__(self, num_tokens=20, width=8):
        super().__init__()
        self.num_tokens = num_tokens
        self.widths = (width,)
        self.embedding = nn.Embedding(num_tokens, width)
        self.head = nn.Linear(width, num_tokens)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, tokens):
        return self.head(self.embedding(tokens) + self.shift) * self.scale

    def with_widths(self, widths):
        return type(self)(self.num_tokens, *widths)


def test_a_backbone_of_a_user_needs_the_two_members_alone(tmp_path):
    model = memfold.compress(Tied(), "small", ratio=0.5)
    assert model.widths == (4,)
    assert model.head.weight is model.embedding.weight
    counts = memfold.footprint(model)
    assert (counts.num_values, counts.num_weights) == (80, 160)
    assert counts.dense_bytes == 4 * (160 + 20 + 1 + 8)
    assert counts.untouched_bytes == 4 * (20 + 1 + 4)
    tokens = torch.arange(5)
    expected = model(tokens)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", Tied())
    assert torch.equal(loaded(tokens), expected)
    assert loaded.head.weight is loaded.embedding.weight


def test_a_budget_between_two_coarse_widths_takes_the_narrower(tmp_path):
    """A width of Tied is 20 weights: no file has between 98 and 100 % of a budget of 900 bytes."""
    model = memfold.compress(Tied(), "small", budget_bytes=900)
    size = memfold.save(model, tmp_path / "model.safetensors")
    assert size < 0.98 * 900
    wider = memfold.compress(Tied(width=model.widths[0] + 1), "dense")
    assert memfold.save(wider, tmp_path / "wider.safetensors") > 900


@pytest.mark.parametrize("name", sorted(MODELS))
def test_networks_without_widths_are_named(name):
    model = build_plain(name)
    before = copy.deepcopy(model.state_dict())
    message = rf"{type(model).__name__} has no widths and no with_widths \(docs/strategies/small"
    with pytest.raises(InputError, match=message):
        memfold.compress(model, "small", ratio=0.5)
    assert compression_of(model) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def _frozen():
    model = Tied()
    model.scale.requires_grad_(False)
    return model


def _with(**members):
    return type("Odd", (Tied,), members)()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Tied, {"ratio": 0.01}, r"ratio=0\.01 for Tied is out of reach: .* widths 1, has 20 wei"),
        (Tied, {"ratio": 0.45}, r"ratio=0\.45 for Tied: .* 72 weights within 2 %.* 60 and 80$"),
        (Tied, {"budget_bytes": 100}, r"budget_bytes=100 for Tied is out of reach: .* has \d+ by"),
        (
            TINY["cnn"],
            {"ratio": 0.5, "exclude": ["head"]},
            r"compression\.exclude=.*drop the option",
        ),
        (Tied, {"ratio": 0.5, "min_size": 9}, r"compression\.min_size=9"),
        (_frozen, {"ratio": 0.5}, "scale is frozen"),
        (lambda: MLP(1, 4, 3, hidden_widths=[]), {"ratio": 0.5}, r"that of MLP is \(\)"),
        (
            lambda: _with(with_widths=lambda self, widths: Tied(self.num_tokens, *widths)),
            {"ratio": 0.5},
            r"Odd\.with_widths\(\[8\]\) must return the same class",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(make, options, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message) as caught:
        memfold.compress(model, "small", **options)
    assert "\n" not in str(caught.value)
    assert compression_of(model) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t: t.pop("memfold.widths"), "has no 3 widths for CNN"),
        (lambda r, t: t["memfold.widths"].fill_(0), "do not fit"),
        (lambda r, t: t["memfold.widths"].fill_(10**9), "do not fit"),
        (lambda r, t: t["memfold.widths"].sub_(1), "its widths make that"),
        (lambda r, t: r.update(num_values=7), "has not the 7 values"),
        (lambda r, t: t.update({"head.bias": torch.zeros(4)}), "is of another backbone"),
        (
            lambda r, t: t.update({"features.1.bias": torch.zeros(1)}),
            r"features\.1\.bias has shape \(1,\), its widths make that",
        ),
        (lambda r, t: r.update(reshaped={}), "is of another backbone"),
        (lambda r, t: r.pop("reshaped"), "damaged metadata"),
    ],
)
def test_damaged_artifacts_change_nothing(change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    memfold.save(memfold.compress(build("cnn"), "small", ratio=0.3), path)
    forge(path, change)
    model = build("cnn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        memfold.load(path, model)
    assert compression_of(model) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_artifact_of_another_backbone_is_refused(tmp_path):
    memfold.save(memfold.compress(build("cnn"), "small", ratio=0.3), tmp_path / "m.safetensors")
    for other in (CNN(2, 8, 5, width=5), CNN(2, 8, 6, width=6), build("resnet20")):
        with pytest.raises(InputError, match="is of another backbone"):
            memfold.load(tmp_path / "m.safetensors", other)
