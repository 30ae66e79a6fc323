"""Low-rank networks: budgets, the dense limit, Frobenius decay in real optimizers, artifacts."""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, AdamW, Optimizer

import memfold
from memfold.artifact import header_bytes
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.strategies.factoring.low_rank import LowRankWeights
from memfold.strategies.factoring.matrices import (
    WHOLE,
    allocate_ranks,
    frobenius_gradient,
    matrix_of,
    matrix_shape,
)
from reference import low_rank as reference
from strategies.models import build, make_input

Batch = tuple[Tensor, Tensor]
RATE = 0.05


def dense_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).double()


def network(ratio: float | None = 0.4, **options: Any) -> nn.Sequential:
    return memfold.compress(dense_network(), "low_rank", ratio=ratio, **options)


def low_rank_of(net: nn.Module) -> LowRankWeights:
    low_rank = compression_of(net)
    assert isinstance(low_rank, LowRankWeights)
    return low_rank


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 8, 12, generator=generator, dtype=torch.float64)
    return list(zip(inputs, inputs.flip(2), strict=True))


def train(
    net: nn.Module, optimizer: Optimizer, data: list[Batch], *, skip: tuple[int, ...] = ()
) -> None:
    """Take a step per batch; for those in `skip` the optimizer's step does not happen."""
    for step, (inputs, targets) in enumerate(data):
        optimizer.zero_grad()
        mse_loss(net(inputs), targets).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=len(data))
        if step not in skip:
            optimizer.step()


def sgd(parameters: Any, decay: float) -> SGD:
    return SGD(parameters, lr=RATE, momentum=0.9, nesterov=True, weight_decay=decay)


def adam(parameters: Any, decay: float) -> Adam:
    return Adam(parameters, lr=RATE, weight_decay=decay)


def adamw(parameters: Any, decay: float) -> AdamW:
    return AdamW(parameters, lr=RATE, weight_decay=decay)


OPTIMIZERS = (sgd, adam, adamw)


@pytest.mark.parametrize("decays", [(0.1, None), (0.1, 0.3), (0.0, 0.3), (0.1, 0.0)])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_equals_training_with_the_penalty_step_for_step(
    make: Callable[[Any, float], Optimizer], decays: tuple[float, float | None]
) -> None:
    weight_decay, frobenius = decays
    net = network(frobenius_decay=frobenius)
    pairs = [(u.detach(), v.detach()) for u, v in low_rank_of(net).pairs()]
    biases = [net[0].bias.detach(), net[2].bias.detach()]
    data = batches(12)

    def loss(weights: list[Tensor], others: list[Tensor], batch: Batch) -> Tensor:
        hidden = torch.tanh(batch[0] @ weights[0].T + others[0])
        return mse_loss(hidden @ weights[1].T + others[1], batch[1])

    if frobenius == 0:
        plain = copy.deepcopy(net)
        optimizer = make(plain.parameters(), weight_decay)
        for inputs, targets in data:
            optimizer.zero_grad()
            mse_loss(plain(inputs), targets).backward()
            optimizer.step()
        low_rank = low_rank_of(plain)
        expected = [factor for pair in low_rank.pairs() for factor in pair]
        expected += [plain[0].bias, plain[2].bias]
    else:
        expected = reference.train(
            pairs,
            biases,
            loss,
            data,
            lambda groups: make(groups, weight_decay),
            decay=weight_decay if frobenius is None else frobenius,
            decoupled_rate=RATE if make is adamw else None,
        )
    train(net, make(net.parameters(), weight_decay), data)
    found = [factor for pair in low_rank_of(net).pairs() for factor in pair]
    for tensor, naive in zip([*found, net[0].bias, net[2].bias], expected, strict=True):
        torch.testing.assert_close(tensor, naive, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_step_that_is_skipped_leaves_no_decay_behind(
    make: Callable[[Any, float], Optimizer],
) -> None:
    net, other = network(), network()
    data = batches(4)
    train(net, make(net.parameters(), 0.1), [*data[:2], data[3], *data[2:]], skip=(2,))
    train(other, make(other.parameters(), 0.1), data)
    for tensor, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_training_that_broke_off_ends_with_the_same_bits(
    make: Callable[[Any, float], Optimizer],
) -> None:
    data = batches(6)
    net = network()
    optimizer = make(net.parameters(), 0.1)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    train(net, optimizer, data[:3])
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        list(map(id, group)) for group in groups
    ]
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, data[3:])

    other = network()
    resumed = make(other.parameters(), 0.1)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, data[3:])
    for tensor, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_factors_without_a_gradient_are_left_alone(
    make: Callable[[Any, float], Optimizer],
) -> None:
    net = network()
    optimizer = make(net.parameters(), 0.1)
    train(net, optimizer, batches(1), skip=(0,))
    optimizer.zero_grad()
    before = copy.deepcopy(net.state_dict())
    memfold.before_step(net, optimizer, step=0, total_steps=1)
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_decay_of_half_precision_factors_is_computed_in_single() -> None:
    net = network().to(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=RATE, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    memfold.before_step(net, optimizer, step=0, total_steps=1)
    left, right = (factor.double() for factor in next(low_rank_of(net).pairs()))
    expected = 0.5 * (frobenius_gradient(left, right) - left)
    found = net[0].weight_left.grad
    # One rounding to bfloat16 (8 bits), of the sum alone.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_frozen_factors_are_not_decayed() -> None:
    net = network().requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    memfold.before_step(net, SGD(net.parameters(), lr=1.0, weight_decay=1.0), step=0, total_steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_full_rank_is_the_dense_network_bit_for_bit(
    make: Callable[[Any, float], Optimizer], tmp_path: Path
) -> None:
    dense, net = memfold.compress(dense_network(), "dense"), network(1.0)
    assert low_rank_of(net).ranks == [WHOLE, WHOLE]
    assert list(net.state_dict()) == list(dense.state_dict())
    for model in (dense, net):
        train(model, make(model.parameters(), 0.1), batches(5))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    counted = memfold.footprint(net)
    assert counted.stored_bytes == counted.dense_bytes
    assert counted.index_bytes == 0
    memfold.save(net, tmp_path / "a.safetensors")
    loaded = memfold.load(tmp_path / "a.safetensors", dense_network())
    assert torch.equal(loaded[0].weight, dense[0].weight)


def test_a_kernel_of_that_rank_is_kept() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    left, right = torch.randn(18, 2), torch.randn(12, 2)
    with torch.no_grad():
        layer.weight.copy_(reference.conv_weight(left, right, (6, 4, 3, 3)))
    expected = layer.weight.detach().clone()
    memfold.compress(layer, "low_rank", ratio=0.3)
    assert low_rank_of(layer).ranks == [2]
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("name", ["tied", "attention", "lstm", "conv3d", "transposed2d", "grouped"])
def test_gradients_of_the_factors_follow_from_the_dense_gradient(name: str) -> None:
    model = memfold.compress(build(name), "low_rank", ratio=0.6)
    dense = memfold.densify(model)
    for net in (model, dense):
        net(make_input(name)).square().sum().backward()
    low_rank = low_rank_of(model)
    assert low_rank.computed
    names = [low_rank.names[index] for index in low_rank.computed]
    for weight, (left, right) in zip(names, low_rank.pairs(), strict=True):
        gradient = dense.get_parameter(weight).grad
        assert gradient is not None
        gradient = matrix_of(gradient)
        torch.testing.assert_close(left.grad, gradient @ right)
        torch.testing.assert_close(right.grad, gradient.T @ left)


def test_a_zero_head_learns_and_a_padding_row_stays_zero() -> None:
    head = memfold.compress(build("zero_head"), "low_rank", ratio=0.6, structured="share")
    assert not head[2].weight.any()
    head(make_input("zero_head")).square().add(1).log().sum().backward()
    assert head[2].weight_right.grad.any()
    embedding = memfold.compress(build("embedding"), "low_rank", ratio=0.6)
    assert low_rank_of(embedding).ranks[0] != WHOLE
    optimizer = sgd(embedding.parameters(), 0.1)
    for _ in range(3):
        embedding(make_input("embedding")).square().sum().backward()
        memfold.before_step(embedding, optimizer, step=0, total_steps=1)
        optimizer.step()
    assert not embedding[0].weight[0].any()


def test_mixed_precision_begins_where_the_weight_is_used() -> None:
    net = network().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net[0].weight.dtype == torch.float32
        assert net(torch.zeros(1, 12)).dtype == torch.bfloat16


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.7, 0.97])
def test_the_ratio_is_met_as_closely_as_ranks_allow(ratio: float) -> None:
    low_rank = low_rank_of(network(ratio))
    target = round(ratio * low_rank.num_weights)
    assert 0 <= target - low_rank.num_values < 12 + 20
    assert low_rank.num_values == sum(t.numel() for t in low_rank.value_tensors().values())
    shapes = [matrix_shape(shape) for shape in low_rank.shapes]
    assert low_rank.ranks == allocate_ranks(shapes, target, "equal")


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_budget_is_met_and_used_up_at_any_bits(bits: int, tmp_path: Path) -> None:
    untouched, path = (20 + 12) * 4, tmp_path / "a.safetensors"
    budget = 600 + untouched + 300 * bits // 8
    net = memfold.compress(dense_network().float(), "low_rank", budget_bytes=budget, bits=bits)
    counted = memfold.footprint(net)
    assert counted.index_bytes == 2 * 4
    # One more rank takes 32 values, and at 8 and 4 bits a scale for half of them; the header's
    # size has steps of 8.
    assert budget - (12 + 20) * bits / 8 - 10 < memfold.save(net, path) <= budget
    assert path.stat().st_size == counted.stored_bytes + header_bytes(path)
    loaded = memfold.load(path, dense_network().float())
    assert low_rank_of(loaded).ranks == low_rank_of(net).ranks
    if bits == 32:
        assert torch.equal(loaded[0].weight, net[0].weight)


def test_the_budget_of_the_dense_network_gives_the_dense_network(tmp_path: Path) -> None:
    whole = memfold.save(network(None, budget_bytes=9999), tmp_path / "a")
    assert low_rank_of(network(None, budget_bytes=whole)).ranks == [WHOLE, WHOLE]
    fewer = network(None, budget_bytes=whole - 16)
    assert low_rank_of(fewer).ranks != [WHOLE, WHOLE]
    assert memfold.save(fewer, tmp_path / "a") <= whole - 16


def test_less_than_one_rank_per_tensor_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(InputError) as caught:
        network(0.05)
    least = re.fullmatch(
        r"ratio=0\.05: low_rank needs at least 64 values, one rank per tensor \(ratio (\S+)\)",
        str(caught.value),
    )
    assert least is not None
    assert low_rank_of(network(float(least[1]))).ranks == [1, 1]


def infinite(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        net[0].weight[0, 0] = float("inf")
    return net


def taken(net: nn.Sequential) -> nn.Sequential:
    net[2].register_buffer("weight_right", torch.zeros(3))
    return net


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (infinite, {}, "0.weight has initial weights that are not finite"),
        (taken, {}, "2.weight_right exists"),
        (None, {"frobenius_decay": -1}, "compression.frobenius_decay must be a number of at least"),
        (None, {"frobenius_decay": "1e-4"}, "or null, got '1e-4'"),
        (None, {"ranks": "same"}, "compression.ranks must be equal or proportional, got 'same'"),
    ],
)
def test_mistakes_are_named_and_change_nothing(
    spoil: Callable[[nn.Sequential], nn.Sequential] | None, options: dict[str, Any], message: str
) -> None:
    net = dense_network() if spoil is None else spoil(dense_network())
    names = list(net.state_dict())
    with pytest.raises(InputError, match=re.escape(message)):
        memfold.compress(net, "low_rank", ratio=0.4, **options)
    assert list(net.state_dict()) == names
    assert compression_of(net) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor_ranks": torch.tensor([1, 1, 1], dtype=torch.int32)}, "must be 2 int32 numbers"),
        ({"factor_ranks": torch.tensor([1, 99], dtype=torch.int32)}, "is not in 0..7"),
        ({"factor_ranks": torch.tensor([1, 1], dtype=torch.int32)}, "need 64 values"),
        ({"factor_values": torch.zeros(7)}, "floating-point numbers"),
    ],
)
def test_damaged_artifacts_are_refused(change: Mapping[str, Tensor], message: str) -> None:
    low_rank = low_rank_of(network())
    tensors = {**low_rank.value_tensors(), **low_rank.index_tensors(), **change}
    net = dense_network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=re.escape(message)):
        low_rank.strategy.restore(net, low_rank.names, low_rank.num_values, tensors)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_a_replaced_layer_is_not_lost(ratio: float, tmp_path: Path) -> None:
    net = network(ratio)
    net[2] = nn.Linear(20, 12)
    with pytest.raises(InputError, match="was replaced after the model was compressed"):
        memfold.save(net, tmp_path / "a.safetensors")


def test_weights_tied_by_memory_are_one_weight_whole_or_not() -> None:
    for ratio in (0.5, 1.0):
        table = torch.randn(50, 8)
        net = nn.Sequential(*[nn.Linear(8, 50, bias=False) for _ in range(3)])
        for layer in net:
            layer.weight = nn.Parameter(table)
        memfold.compress(net, "low_rank", ratio=ratio)
        counted = memfold.footprint(net)
        assert counted.num_weights == 400
        assert counted.untouched_bytes == 0
