"""What one update drops and grows."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW

import memfold
from memfold.strategies.pruning.dynamic import DynamicWeights
from strategies.pruning.dynamic_networks import (
    NAMES,
    batches,
    dense_gradients,
    dense_tensors,
    momentum_sgd,
    network,
    same_state,
    sparse_of,
    take_steps,
    trained,
    update,
)


@given(
    fraction=st.floats(0, 1),
    ratio=st.floats(0.02, 1),
    seed=st.integers(0, 9),
    name=st.sampled_from(NAMES),
)
def test_most_weights_stay(fraction: float, ratio: float, seed: int, name: str) -> None:
    net, optimizer = trained(name, fraction=fraction, ratio=ratio, seed=seed)
    sparse = sparse_of(net)
    before, dense = sparse.masks(), dense_tensors(net)[::2]
    update(net, optimizer)
    for old, new, weight in zip(before, sparse.masks(), dense, strict=True):
        count = int(old.sum())
        assert int(new.sum()) == count
        k = math.floor(fraction * count)
        assert int((old & new).sum()) >= count - k
        lost = weight[old & ~new].abs()
        # Whatever left is among the k smallest.
        smallest = weight[old].abs().sort().values[:k]
        assert not len(lost) or lost.max() <= smallest[-1]


def test_replacing_everything_keeps_the_largest_dense_gradients() -> None:
    net, optimizer = trained("rigl", fraction=1.0)
    gradients = dense_gradients(net, batches(10)[3])
    update(net, optimizer)
    for mask, gradient in zip(sparse_of(net).masks(), gradients, strict=True):
        kept, others = gradient[mask].abs(), gradient[~mask].abs()
        assert len(kept) > 0
        assert kept.min() > others.max()


@pytest.mark.parametrize("name", NAMES)
def test_values_and_optimizer_state_stay_or_start_at_zero(name: str) -> None:
    for kind in (SGD, AdamW):
        net = network(name, update_every=3, end=1.0, fraction=0.9)
        options = {"momentum": 0.9} if kind is SGD else {}
        optimizer = kind(net.parameters(), lr=0.01, **options)
        take_steps(net, optimizer, batches(10), last=3)
        sparse = sparse_of(net)
        keys = ("momentum_buffer",) if kind is SGD else ("exp_avg", "exp_avg_sq")

        def spread(sparse: DynamicWeights = sparse, optimizer: Any = optimizer, keys: Any = keys):
            """Values and optimizer state at their places in dense tensors."""
            return [
                torch.zeros(shape.numel(), dtype=torch.float64).index_copy(0, at, tensor.detach())
                for index, (shape, at) in enumerate(
                    zip(sparse.shapes, sparse.positions, strict=True)
                )
                for values in [sparse.values(index)]
                for tensor in [values, *(optimizer.state[values][key] for key in keys)]
            ]

        old_masks, old = sparse.masks(), spread()
        update(net, optimizer)
        new_masks, new = sparse.masks(), spread()
        for index, tensor in enumerate(new):
            place = index // (1 + len(keys))
            before, after = old_masks[place].view(-1), new_masks[place].view(-1)
            assert (after & ~before).any()
            # Also of those that were dropped and grew again: most of them, here.
            assert torch.equal(tensor[before & after], old[index][before & after])
            assert (tensor[before & after] != 0).any()
            assert (tensor[after & ~before] == 0).all()


def test_dropped_weights_that_grow_again_keep_their_value() -> None:
    net, optimizer = trained("rigl", fraction=1.0)
    sparse = sparse_of(net)
    before, dense = sparse.masks(), dense_tensors(net)[::2]
    update(net, optimizer)
    # All were dropped: whatever was there before has grown again.
    for old, new, weight, now in zip(
        before, sparse.masks(), dense, dense_tensors(net)[::2], strict=True
    ):
        assert (old & new).any()
        assert torch.equal(now[old & new], weight[old & new])


@pytest.mark.parametrize("name", NAMES)
def test_growing_leaves_the_function_unchanged(name: str) -> None:
    """The update is the loss of what was dropped, and nothing else."""
    net, optimizer = trained(name, fraction=0.5)
    sparse = sparse_of(net)
    inputs, targets = batches(10)[3]
    old_masks, dropped_only = sparse.masks(), memfold.densify(net)
    loss_before = mse_loss(net(inputs), targets)
    update(net, optimizer)
    with torch.no_grad():
        for index, layer in enumerate([dropped_only[0], dropped_only[2]]):
            layer.weight.mul_(sparse.masks()[index])
            assert (sparse.masks()[index] & ~old_masks[index]).any()
    loss_after = mse_loss(net(inputs), targets)
    assert torch.equal(loss_after, mse_loss(dropped_only(inputs), targets))
    assert loss_after != loss_before


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_same_when_only_zeros_are_dropped(name: str) -> None:
    net, optimizer = trained(name, fraction=0.5)
    sparse = sparse_of(net)
    with torch.no_grad():
        for index in range(2):
            values = sparse.values(index)
            values[values.abs() < values.abs().median()] = 0
    inputs, targets = batches(10)[3]
    before, loss_before = sparse.masks(), mse_loss(net(inputs), targets)
    update(net, optimizer)
    assert all((new & ~old).any() for old, new in zip(before, sparse.masks(), strict=True))
    assert torch.equal(mse_loss(net(inputs), targets), loss_before)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_optimizer_does_in_an_update(name: str) -> None:
    net, optimizer = trained(name, fraction=0.5)
    update(net, optimizer)
    before = dense_tensors(net)
    masks = sparse_of(net).masks()
    new = [(tensor == 0) & mask for tensor, mask in zip(before[::2], masks, strict=True)]
    optimizer.step()
    after = dense_tensors(net)
    if name == "rigl":
        assert all(map(torch.equal, before, after))
    else:
        assert not any(map(torch.equal, before, after))
        # Those that have just grown have neither gradient nor momentum.
        assert all(part.any() for part in new)
        assert all((t[part] == 0).all() for t, part in zip(after[::2], new, strict=True))


def test_ties_go_to_the_first() -> None:
    layer = nn.Linear(10, 1, bias=False)
    nn.init.ones_(layer.weight)
    memfold.compress(
        layer, "rigl", ratio=0.4, update_every=1, fraction=0.5, decay="constant", structured="share"
    )
    sparse = sparse_of(layer)
    old = sparse.positions[0].tolist()
    optimizer = SGD(layer.parameters(), lr=0.0)
    take_steps(layer, optimizer, [(torch.ones(1, 10), torch.zeros(1, 1))] * 4, last=2)
    stay = old[:2]
    grow = [i for i in range(10) if i not in stay][:2]
    assert sparse.positions[0].tolist() == sorted(stay + grow)


def test_random_growth_ignores_gradients() -> None:
    masks: dict[str, list[Tensor]] = {}
    for name in NAMES:
        for batch in (2, 3):
            net, optimizer = trained(name, fraction=0.5)
            update(net, optimizer, batches(10)[batch])
            masks[f"{name}{batch}"] = sparse_of(net).masks()
    assert all(map(torch.equal, masks["set2"], masks["set3"]))
    assert not all(map(torch.equal, masks["rigl2"], masks["rigl3"]))


def test_random_growth_is_uniform_over_the_candidates() -> None:
    draws, hits = 600, torch.zeros(12)
    for seed in range(draws):
        layer = nn.Linear(12, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, 13))
        memfold.compress(
            layer, "set", ratio=0.25, update_every=1, fraction=0.4, seed=seed, structured="share"
        )
        sparse = sparse_of(layer)
        sparse.positions[0] = torch.tensor([3, 7, 9])  # the first is dropped, ten can grow
        optimizer = SGD(layer.parameters(), lr=0.0)
        sparse.before_step(optimizer, 1, 100)
        new = set(sparse.positions[0].tolist()) - {7, 9}
        assert len(new) == 1
        hits[new.pop()] += 1
    assert hits[7] == hits[9] == 0
    expected = draws / 10
    chi_square = ((hits - expected) ** 2 / expected).sum() - 2 * expected
    assert chi_square < 27.9  # nine degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("name", NAMES)
def test_first_masks_follow_from_the_seed_alone(name: str) -> None:
    first, again, other = (network(name, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(7)
    values = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    original = copy.deepcopy(values)
    memfold.compress(values, name, ratio=0.3, seed=1)
    for net in (again, values):
        assert all(map(torch.equal, sparse_of(first).masks(), sparse_of(net).masks()))
    assert not all(map(torch.equal, sparse_of(first).masks(), sparse_of(other).masks()))
    for index, layer in ((0, original[0]), (1, original[2])):
        mask = sparse_of(values).masks()[index]
        assert torch.equal(dense_tensors(values)[2 * index], layer.weight * mask)


def test_layers_of_one_shape_have_masks_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    memfold.compress(net, "set", ratio=0.5)
    assert not torch.equal(*sparse_of(net).masks())


def test_the_first_tensor_can_stay_whole() -> None:
    sparse = sparse_of(network("rigl", ratio=0.7, density="uniform", dense_first=True))
    assert sparse.counts == [72, 12]


@pytest.mark.parametrize("name", NAMES)
def test_empty_layers_stay_empty(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4), nn.Linear(4, 4)).double()
    memfold.compress(net, name, ratio=0.01, density="uniform", update_every=2)
    sparse = sparse_of(net)
    assert 0 in sparse.counts
    counts = sparse.counts
    take_steps(net, momentum_sgd(net), batches(10))
    assert sparse.counts == counts


def test_micro_batches_add_up() -> None:
    data = batches(8)
    net, parts = (network("rigl", update_every=2, decay="constant") for _ in range(2))
    take_steps(net, momentum_sgd(net), data)
    optimizer = momentum_sgd(parts)
    for step, (inputs, targets) in enumerate(data):
        optimizer.zero_grad()
        for rows in (slice(0, 3), slice(3, 10)):
            share = len(inputs[rows]) / len(inputs)
            (mse_loss(parts(inputs[rows]), targets[rows]) * share).backward()
        memfold.before_step(parts, optimizer, step=step, total_steps=len(data))
        optimizer.step()
    assert sparse_of(net).structure_version == 2
    assert all(map(torch.equal, sparse_of(net).masks(), sparse_of(parts).masks()))


@pytest.mark.parametrize("name", NAMES)
def test_dense_gradients_live_for_one_step(name: str) -> None:
    net = network(name, update_every=3, end=1.0, decay="constant")
    sparse = sparse_of(net)
    watched: list[bool] = []
    take_steps(
        net,
        momentum_sgd(net),
        batches(8),
        watch=lambda _: watched.append(sparse.dense_gradients() is not None),
    )
    # After steps 2 and 5, for steps 3 and 6.
    steps = {"rigl": [2, 5], "set": []}[name]
    assert [step for step, watches in enumerate(watched) if watches] == steps


def test_gradients_that_are_not_finite_postpone_an_update() -> None:
    net, optimizer = trained("rigl", fraction=0.5)
    sparse, data = sparse_of(net), batches(10)
    before = sparse.masks()
    infinite = (data[3][0], torch.full_like(data[3][1], torch.inf))
    update(net, optimizer, infinite)
    assert all(map(torch.equal, before, sparse.masks()))
    # A scaler of gradients skips this step; the next one grows by its own gradients alone.
    gradients = dense_gradients(net, data[4])
    take_steps(net, optimizer, data, first=4, last=5)
    assert sparse.structure_version == 1
    for old, new, gradient in zip(before, sparse.masks(), gradients, strict=True):
        grown, others = gradient[new & ~old].abs(), gradient[~new & ~old].abs()
        assert grown.min() > others.max()


@pytest.mark.parametrize("name", NAMES)
def test_a_scaler_of_gradients_changes_nothing(name: str) -> None:
    net, scaled = (network(name, update_every=2, decay="constant") for _ in range(2))
    data = batches(8)
    take_steps(net, momentum_sgd(net), data)
    optimizer = momentum_sgd(scaled)
    # A power of two is exact; it doubles every third step.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step, (inputs, targets) in enumerate(data):
        optimizer.zero_grad()
        scaler.scale(mse_loss(scaled(inputs), targets)).backward()
        scaler.unscale_(optimizer)
        memfold.before_step(scaled, optimizer, step=step, total_steps=len(data))
        scaler.step(optimizer)
        scaler.update()
    assert sparse_of(net).structure_version == 2
    assert same_state(net, scaled)


def test_an_update_without_gradients_waits_for_the_next_step() -> None:
    net = network("rigl", update_every=3, end=1.0, decay="constant")
    versions: list[int] = []
    take_steps(  # begins in the middle, so that nobody has prepared step 3
        net,
        momentum_sgd(net),
        batches(8),
        first=3,
        watch=lambda _: versions.append(sparse_of(net).structure_version),
    )
    assert versions == [0, 1, 1, 2, 2]
