"""Two processes with half of each batch train what one does with the whole, by every strategy."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import memfold
from memfold.compression import compression_of, prepare_step
from memfold.compression.rounds import Begin, rounds_of
from strategies.cases import STRATEGIES, network_for, options_of
from training.rank_jobs import run_two_ranks

NUM_STEPS = 12  # two changes of structure every five steps
KNOWN_BITS = (
    *("dense at 4", "stable_rps at 3", "rigl at 4", "tied at 8", "masa at 4", "basis at 4"),
    *("recursive_lora at 8", "hyperloop at 4", "widenet at 4", "subspace at 4"),
)
"""Strategies whose training knows the bits of the artifact, from the middle on."""
NAMES = (*STRATEGIES, *KNOWN_BITS)
Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    shape = (NUM_STEPS, 16, 1, 4, 4)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, shape[:2], generator=generator)
    return list(zip(images, labels, strict=True))


def compressed(name: str) -> nn.Module:
    torch.manual_seed(7)
    name, _, bits = name.partition(" at ")
    net = network_for(name, 1, 4, 3, (24, 20)).double()
    options = options_of(name, ratio=0.3) | ({"train_bits": int(bits)} if bits else {})
    return memfold.compress(net, name, data=batches(), loss=F.cross_entropy, seed=3, **options)


def trained(name: str, rank: int = 0, world_size: int = 1) -> dict[str, dict[str, Tensor]]:
    """Train two rounds at most on this rank's rows; return what the network ends with."""
    net = compressed(name)
    rounds = rounds_of(net)
    train(net, None, rank, world_size)
    if rounds is not None:
        train(net, rounds.next_round(1), rank, world_size)
    compression = compression_of(net)
    structure = {} if compression is None else compression.structure()
    index = {} if compression is None else compression.index_tensors()
    return {"structure": structure, "index": index, "state": dict(net.state_dict())}


def train(net: nn.Module, begin: Begin | None, rank: int, world_size: int) -> None:
    # SGD, unlike Adam, sees the scale of the gradients.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    if begin is not None:
        begin(optimizer)
    parallel = net if world_size == 1 else DistributedDataParallel(net)
    prepare_step(net, step=0, total_steps=NUM_STEPS)
    for step, (images, labels) in enumerate(batches()):
        rows = slice(rank, None, world_size)
        optimizer.zero_grad()
        F.cross_entropy(parallel(images[rows]), labels[rows]).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=NUM_STEPS)
        optimizer.step()


def main(rank: int, folder: Path) -> None:
    """Train every strategy as one of two ranks."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = {name: trained(name, rank, 2) for name in NAMES}
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict]]]:
    """Return the results of both ranks: by strategy, what, and name."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks([__file__, str(folder)], folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.ddp
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str, ranks: list[dict[str, dict[str, dict]]]) -> None:
    torch.set_num_threads(1)
    first, second = (rank[name] for rank in ranks)
    alone = trained(name)
    for part in ("structure", "index", "state"):
        assert first[part].keys() == second[part].keys() == alone[part].keys()
        for key, tensor in first[part].items():
            assert torch.equal(tensor, second[part][key]), key
    for part in ("structure", "index"):
        assert all(torch.equal(tensor, alone[part][key]) for key, tensor in first[part].items())
    for key, tensor in first["state"].items():
        # Sums in another order, in double precision.
        torch.testing.assert_close(tensor, alone["state"][key], rtol=1e-9, atol=1e-11)
    start = compressed(name).state_dict()
    assert any(not torch.equal(tensor, start[key]) for key, tensor in alone["state"].items())


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
