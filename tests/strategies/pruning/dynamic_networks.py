"""Small networks with moving connections, and loops that train them; no test here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Optimizer

import memfold
from memfold.compression import compression_of
from memfold.strategies.pruning.dynamic import DynamicWeights

NAMES = ("set", "rigl")
Batch = tuple[Tensor, Tensor]


def network(name: str, *, ratio: float = 0.3, seed: int = 1, **options: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    return memfold.compress(net, name, ratio=ratio, seed=seed, **options)


def sparse_of(net: nn.Module) -> DynamicWeights:
    sparse = compression_of(net)
    assert isinstance(sparse, DynamicWeights)
    return sparse


def batches(count: int, size: int = 10) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, size, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(count, size, 4, generator=generator, dtype=torch.float64)
    return list(zip(inputs, targets, strict=True))


def momentum_sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def take_steps(
    net: nn.Module,
    optimizer: Optimizer,
    data: Sequence[Batch],
    *,
    first: int = 0,
    last: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Train on data[first:last]; the whole training has one step per batch in `data`."""
    for step, (inputs, targets) in list(enumerate(data))[first:last]:
        optimizer.zero_grad()
        mse_loss(net(inputs), targets).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=len(data))
        optimizer.step()
        if watch is not None:
            watch(step)


def dense_tensors(net: nn.Module) -> list[Tensor]:
    """Weights as dense tensors, zero outside the masks, and biases."""
    return [p.detach().clone() for p in memfold.densify(net).parameters()]


def dense_gradients(net: nn.Module, batch: Batch) -> list[Tensor]:
    """Gradients of the compressible weights, from a plain dense network."""
    dense = memfold.densify(net)
    mse_loss(dense(batch[0]), batch[1]).backward()
    return [
        p.grad
        for n, p in dense.named_parameters()
        if n in sparse_of(net).names and p.grad is not None
    ]


def same_state(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0] | states[1])


def trained(name: str, **options: Any) -> tuple[nn.Sequential, SGD]:
    """Three steps of training; the fourth one, number 3 of 10, is an update."""
    net = network(name, update_every=3, end=1.0, decay="constant", **options)
    optimizer = momentum_sgd(net)
    take_steps(net, optimizer, batches(10), last=3)
    return net, optimizer


def update(net: nn.Module, optimizer: Optimizer, batch: Batch | None = None) -> None:
    """Do all of step 3 but the optimizer's part."""
    inputs, targets = batch or batches(10)[3]
    optimizer.zero_grad()
    mse_loss(net(inputs), targets).backward()
    memfold.before_step(net, optimizer, step=3, total_steps=10)


def train_half(rank: int, folder: str) -> None:
    """Train on every second row as one of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name in NAMES:
        net = network(name, update_every=2, decay="constant", ratio=0.1)
        parallel = nn.parallel.DistributedDataParallel(net)
        optimizer = momentum_sgd(net)
        data = batches(10)
        for step, (inputs, targets) in enumerate(data):
            rows = slice(rank, None, 2)
            optimizer.zero_grad()
            mse_loss(parallel(inputs[rows]), targets[rows]).backward()
            memfold.before_step(net, optimizer, step=step, total_steps=len(data))
            optimizer.step()
        torch.save(net.state_dict(), Path(folder) / f"{name}{rank}.pt")
    torch.distributed.destroy_process_group()
