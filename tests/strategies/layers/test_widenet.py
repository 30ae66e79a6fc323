"""Shared attention and experts, against ALBERT, plain MLPs, and experts that are written out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.training.activation_checkpointing import checkpoint_activations

DEPTH, WIDTH = 4, 16
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
ROUTER = "expert_router"


def gpt(depth=DEPTH):
    torch.manual_seed(0)
    return GPT(23, 12, width=WIDTH, depth=depth, num_heads=2).double()


def tokens():
    return torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(1))


def widenet(num_experts, model=None, **options):
    """Compress to a number of experts, with a router that tells tokens apart."""
    model = gpt() if model is None else model
    attention, mlp = 4 * WIDTH**2, 8 * WIDTH**2
    values = attention + num_experts * (mlp + WIDTH)
    ratio = values / (DEPTH * (attention + mlp))
    memfold.compress(model, "widenet", include=["blocks.*"], ratio=min(1.0, ratio), **options)
    assert compression_of(model).size == num_experts
    with torch.no_grad():
        getattr(model, ROUTER).mul_(100)
    return model


def part(model, name):
    return model.blocks[0].get_submodule(name).weight_tied


def test_one_expert_is_albert_with_norms_of_its_own():
    model = widenet(1)
    albert = memfold.compress(gpt(), "tied", map=[0] * DEPTH)
    for network in (model, albert):
        network(tokens()).square().mean().backward()
    assert torch.equal(model(tokens()), albert(tokens()))
    found = dict(model.named_parameters())
    for name, parameter in albert.named_parameters():
        torch.testing.assert_close(found[name].grad.view_as(parameter), parameter.grad, **CLOSE)


def test_equal_experts_whose_gates_sum_to_1_are_one_mlp():
    model = widenet(3, experts_per_token=3, renormalise=True)
    albert = memfold.compress(gpt(), "tied", map=[0] * DEPTH)
    with torch.no_grad():
        for name in ("up", "down"):
            part(model, name).copy_(part(albert, name).expand(3, -1, -1))
    torch.testing.assert_close(model(tokens()), albert(tokens()), **CLOSE)


def test_permuting_experts_with_the_routers_columns_changes_nothing():
    model = widenet(4).eval()
    expected = model(tokens())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in (part(model, "up"), part(model, "down")):
            tensor.copy_(tensor[order])
        router = getattr(model, ROUTER)
        router.copy_(router[:, order])
    torch.testing.assert_close(model(tokens()), expected, **CLOSE)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("per_token", [1, 2])
def test_tokens_run_through_their_likeliest_experts(per_token, renormalise):
    model = widenet(4, experts_per_token=per_token, renormalise=renormalise).eval()
    block, seen = model.blocks[2], []
    block.norm2.register_forward_hook(lambda _, __, out: seen.append(out))
    block.down.register_forward_hook(lambda _, __, out: seen.append(out))
    model(tokens())
    x, found = seen
    chances = (x @ getattr(model, ROUTER)).softmax(-1)
    expected = torch.zeros_like(x)
    for place in [(row, column) for row in range(3) for column in range(12)]:
        chosen = chances[place].argsort(descending=True)[:per_token]
        whole = chances[place][chosen].sum() if renormalise else 1.0
        for expert in chosen:
            hidden = F.gelu(part(model, "up")[expert] @ x[place] + block.up.bias)
            out = part(model, "down")[expert] @ hidden + block.down.bias
            expected[place] += chances[place][expert] / whole * out
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_an_expert_has_no_room_for_leaves_it_out():
    model = widenet(2, experts_per_token=1, capacity=0.5).eval()
    with torch.no_grad():
        getattr(model, ROUTER).zero_()  # the first of equal experts takes all: 36 tokens
    seen = []
    model.blocks[1].down.register_forward_hook(lambda _, __, out: seen.append(out))
    model(tokens())
    added = seen[0].flatten(0, 1)
    assert (added[9:] == 0).all()  # 0.5 / 2 of them
    assert (added[:9] != 0).any(-1).all()


def test_an_expert_has_room_for_a_token():
    model = widenet(2, experts_per_token=1, capacity=1e-4).eval()
    with torch.no_grad():
        getattr(model, ROUTER).zero_()
    seen = []
    model.blocks[1].down.register_forward_hook(lambda _, __, out: seen.append(out))
    model(tokens())
    assert (seen[0].flatten(0, 1) != 0).any(-1).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("block", "starts", "attention"),
    [
        (None, [[0], [1], [3]], 0),
        ("average", [[0], [1, 2], [3, 4]], 2),
        ("stepwise", [[0], [2], [4]], 0),
        ("lower", [[0], [1], [2]], 0),
    ],
)
def test_experts_start_as_layers_or_means_of_neighbours(block, starts, attention):
    options = {} if block is None else {"initial_values": "least_squares", "block": block}
    before, model = gpt(5), gpt(5)
    for number, layer in enumerate(model.blocks):
        nn.init.constant_(layer.attention.qkv.weight, number)
    options |= {"structured": "share", "include": ["blocks.*"]}
    memfold.compress(model, "widenet", ratio=0.47, **options)
    assert compression_of(model).size == 3
    for name in ("up", "down"):
        for expert, places in zip(part(model, name), starts, strict=True):
            layers = [before.blocks[place].get_submodule(name).weight for place in places]
            torch.testing.assert_close(expert, sum(layers) / len(layers), **CLOSE)
    assert (part(model, "attention.qkv") == attention).all()


def test_what_is_stored_does_not_depend_on_depth():
    sizes = []
    for depth in (4, 8):
        model = gpt(depth)
        ratio = (4 * 256 + 3 * (8 * 256 + 16)) / (depth * 12 * 256)
        memfold.compress(model, "widenet", include=["blocks.*"], ratio=ratio)
        compression = compression_of(model)
        assert compression.map == (0,) * depth
        sizes.append(compression.num_values)
        matrices = {id(p): p.numel() for p in model.blocks.parameters() if p.dim() > 1}
        assert sum(matrices.values()) + getattr(model, ROUTER).numel() == sizes[-1]
    assert sizes == [4 * 256 + 3 * (8 * 256 + 16)] * 2


def test_the_balance_is_its_weight_for_each_layer_where_experts_are_alike():
    model = widenet(4, balance=0.3)
    with torch.no_grad():
        getattr(model, ROUTER).zero_()
    model(tokens())
    # Chances differ by noise, and shares with them.
    assert memfold.extra_loss(model).item() == pytest.approx(DEPTH * 0.3, rel=0.2)
    silent = widenet(4, balance=0.3, noise=0.0)
    with torch.no_grad():
        getattr(silent, ROUTER).zero_()
    silent(tokens())
    assert memfold.extra_loss(silent).item() == pytest.approx(DEPTH * 0.3, rel=1e-12)


def test_the_balance_is_of_the_last_pass_in_training():
    model = widenet(4, noise=0.0, experts_per_token=1)
    assert memfold.extra_loss(model) == 0.0
    terms = []
    for x in (tokens(), tokens()[:1], tokens()):
        model(x)
        terms.append(memfold.extra_loss(model))
    assert torch.equal(terms[0], terms[2])
    assert not torch.equal(terms[0], terms[1])
    terms[0].backward()
    assert getattr(model, ROUTER).grad.abs().sum() > 0
    assert part(model, "up").grad is not None  # of earlier layers, whose outputs are routed
    expected = 0.0
    streams = []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda _, __, out: streams.append(out))
    model(tokens())
    for stream in streams:
        chances = (stream.flatten(0, 1) @ getattr(model, ROUTER)).softmax(-1)
        shares = F.one_hot(chances.argmax(-1), 4).double().mean(0)
        expected += 0.01 * 16 * (shares * chances.mean(0)).mean()
    torch.testing.assert_close(memfold.extra_loss(model), expected, **CLOSE)
    model.eval()(tokens())
    assert memfold.extra_loss(model) == 0.0


def test_noise_is_drawn_in_training_alone():
    model = widenet(4)
    with torch.no_grad():
        getattr(model, ROUTER).div_(100)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_copies_artifacts_and_densified_models_compute_the_same(tmp_path):
    model = widenet(3).eval()
    memfold.save(model, tmp_path / "model.safetensors")
    again = widenet(3).eval()
    again.load_state_dict(model.state_dict())
    dense = memfold.densify(model)
    for other in (
        memfold.load(tmp_path / "model.safetensors", gpt()).eval(),
        memfold.load(tmp_path / "model.safetensors", gpt(), form="dense").eval(),
        *(again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))),
        *(dense, copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))),
    ):
        assert torch.equal(other(tokens()), model(tokens()))
    assert dense.blocks[1].up.weight.shape == (3, 4 * WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match="size mismatch"):
        gpt().load_state_dict(dense.state_dict())


def test_tokens_one_by_one_give_the_same():
    model, cache = widenet(4).eval(), []
    with torch.no_grad():
        expected = model(tokens())
        found = [model(piece, kv_cache=cache) for piece in tokens().split([5, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


def test_layers_are_computed_again_with_the_same_noise():
    plain, model = widenet(4), widenet(4)
    checkpoint_activations(model, "blocks.*")
    for network in (plain, model):
        torch.manual_seed(3)
        (network(tokens()).square().mean() + memfold.extra_loss(network)).backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.gate_proj = nn.Linear(6, 10, bias=False)
        self.up_proj = nn.Linear(6, 10, bias=False)
        self.down_proj = nn.Linear(10, 6, bias=False)

    def forward(self, x):
        x = x + self.q_proj(x)
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_computes_the_same():
    model = memfold.compress(stack(Gated), "widenet", ratio=1.0, noise=0.0)
    x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="eager")
    expected = model(x)
    term = memfold.extra_loss(model)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(memfold.extra_loss(model), term)


class Apart(Gated):
    def forward(self, x):
        return x + self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(2 * x))


class Alone(Gated):
    """Its last matrix is called with what another made."""

    def forward(self, x):
        return x + self.down_proj(x.repeat_interleave(2, -1)[..., :10])


class Around(Gated):
    """It calls its last matrix so that no hook runs."""

    def forward(self, x):
        return x + self.down_proj.forward(self.gate_proj(x))


def stack(layer):
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for _ in range(4))).double()


def test_an_mlp_may_be_gated():
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = memfold.compress(stack(Gated), "widenet", ratio=0.01)
    albert = memfold.compress(stack(Gated), "tied", map=[0] * 4)
    assert torch.equal(model(x), albert(x))
    several = memfold.compress(stack(Gated), "widenet", ratio=1.0).eval()
    assert compression_of(several).size == 4
    torch.testing.assert_close(torch.cat([several(x[:1]), several(x[1:])]), several(x), **CLOSE)


def test_torchs_encoder_takes_no_short_cut():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = memfold.compress(nn.TransformerEncoder(layer, 3).double(), "widenet", ratio=0.7).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize("layer", [Apart, Alone, Around])
def test_mlps_through_which_experts_cannot_run_are_refused(layer):
    model = memfold.compress(stack(layer), "widenet", ratio=1.0, experts_per_token=1)
    with pytest.raises(memfold.InputError, match="widenet: experts cannot run through an MLP"):
        model(torch.randn(10, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "has no repeated layers"),
        (
            lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))),
            {},
            "compression.mlp=null finds weight, an MLP has two matrices",
        ),
        (gpt, {"mlp": ["wi", "wo"]}, r"compression.mlp=\['wi', 'wo'\] finds nothing, an MLP has"),
        (gpt, {"mlp": ["*qkv", "*down"]}, r"blocks\.0\.down\.weight are no MLP, whose first"),
        (gpt, {"experts_per_token": 0}, "compression.experts_per_token must be"),
        (gpt, {"capacity": 0.0}, "compression.capacity must be"),
    ],
)
def test_what_has_no_mlp_is_refused(model, options, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(model(), "widenet", ratio=0.5, **options)
