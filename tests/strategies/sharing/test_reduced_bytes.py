"""What DDP reduces, counted by a communication hook in two processes."""

import json
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import memfold
from memfold.compression import compression_of
from memfold.memory import grad_sync_bytes
from training.rank_jobs import run_two_ranks


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4)).to(dtype)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, generator=generator, dtype=torch.float64)


def main(rank, folder, autograd):
    """One of two ranks: two steps on its half of the batch."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = memfold.compress(network(torch.float64), "stable_rps", ratio=0.1, autograd=autograd)
    parallel = DistributedDataParallel(model)
    reduced = []

    def count(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        dist.all_reduce(bucket.buffer().div_(2))
        # No callback: Gloo's thread would want the GIL, which the main thread holds at its end.
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(inputs()[rank * 4 : rank * 4 + 4]).square().mean().backward()
        optimizer.step()
    values = compression_of(model).values.detach()
    result = {"reduced": sum(reduced), "expected": grad_sync_bytes(model), "m": values.numel()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({**result, "values": values.tolist()}, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.parametrize("autograd", ["lean", pytest.param("classic", marks=pytest.mark.slow)])
def test_two_ranks_reduce_phi_and_the_untouched_once_per_step(tmp_path, autograd):
    run_two_ranks([__file__, str(tmp_path), autograd], tmp_path)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["values"] == results[1]["values"]
    single = memfold.compress(network(torch.float64), "stable_rps", ratio=0.1)
    untouched = sum(p.nbytes for name, p in single.named_parameters() if name != "shared_values")
    assert results[0]["reduced"] == 2 * (8 * results[0]["m"] + untouched)
    assert results[0]["expected"] == 8 * results[0]["m"] + untouched
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        single(inputs()).square().mean().backward()
        optimizer.step()
    found = torch.tensor(results[0]["values"], dtype=torch.float64)
    torch.testing.assert_close(found, compression_of(single).values.detach())


if __name__ == "__main__":
    main(int(os.environ["RANK"]), sys.argv[1], sys.argv[2])
