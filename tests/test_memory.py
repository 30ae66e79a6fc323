"""Bytes, counted by hand."""

import mmap

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.memory import PeakMeter, grad_sync_bytes, train_state_bytes


def small_model():
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 5, bias=False))


# Linear bias 20, norm 2 x 20 + statistics 2 x 20 in float32; one int64 batch counter.
UNTOUCHED = 4 * (20 + 80) + 8


def test_footprint_of_a_dense_and_a_shared_model():
    plain = memfold.footprint(small_model())
    assert plain.stored_bytes == plain.dense_bytes == 4 * 300 + UNTOUCHED
    dense = memfold.footprint(memfold.compress(small_model(), "dense"))
    assert (dense.value_bytes, dense.untouched_bytes) == (4 * 300, UNTOUCHED)
    assert dense.stored_bytes == plain.stored_bytes
    assert dense.stored_ratio == dense.ratio == 1

    shared = memfold.footprint(memfold.compress(small_model(), "stable_rps", ratio=0.1))
    assert shared.dense_bytes == plain.dense_bytes
    assert shared.value_bytes == 4 * 30
    assert shared.index_bytes == 2 * 4 + 8
    assert shared.untouched_bytes == UNTOUCHED
    assert shared.stored_bytes == 4 * 30 + 16 + UNTOUCHED
    assert shared.ratio == 0.1
    assert shared.stored_ratio == shared.stored_bytes / shared.dense_bytes


def test_footprint_finds_a_compressed_part():
    part = memfold.compress(small_model(), "stable_rps", ratio=0.1)
    whole = nn.ModuleDict({"body": part, "head": nn.Linear(5, 2)})
    counted = memfold.footprint(whole)
    assert counted.stored_bytes == memfold.footprint(part).stored_bytes + 4 * 12


@pytest.mark.parametrize("strategy", ["dense", "stable_rps", "set", "low_rank", "supermask"])
def test_footprint_counts_a_part_at_two_places_once(strategy):
    options = {} if strategy == "dense" else {"ratio": 0.4}
    part = memfold.compress(small_model(), strategy, **options)
    # As wrappers do that keep the module beside what they have made of it.
    twice = nn.ModuleDict({"original": part, "wrapped": nn.Sequential(part)})
    assert memfold.footprint(twice) == memfold.footprint(part)


def test_train_state_counts_each_tensor_once():
    model = memfold.compress(small_model(), "stable_rps", ratio=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Scales and fingerprint, and two factors for each segment of slots.
    segments = len(compression_of(model).mapping.accumulate([1.0, 1.0]))
    beside = 16 + 2 * 4 * segments
    assert train_state_bytes(model, optimizer) == 4 * 30 + beside + UNTOUCHED
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    # From the first pass on: a byte for the sign of each row and each column, four for each segment
    # and each partition.
    beside += sum(sum(shape) for shape in compression_of(model).shapes) + 4 * (segments + 10)
    trained = 4 * (30 + 20 + 40)
    # Values, gradients, momentum; and the untouched buffers.
    assert train_state_bytes(model, optimizer) == 3 * trained + 4 * 40 + 8 + beside
    assert grad_sync_bytes(model) == trained
    adam = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 10)).sum().backward()
    adam.step()
    steps = 4 * len(list(model.parameters()))
    assert train_state_bytes(model, adam) == 4 * trained + 4 * 40 + 8 + beside + steps


def test_resident_state_is_the_values_and_the_untouched():
    from memfold.backbones.resnet20 import ResNet20

    model = ResNet20(in_channels=3, image_size=32, num_classes=10)
    memfold.compress(model, "stable_rps", ratio=0.01)
    counted = memfold.footprint(model)
    needed = 4 * counted.num_values + counted.untouched_bytes
    assert train_state_bytes(model) <= 1.02 * needed


def test_peak_on_the_cpu_sees_a_freed_allocation():
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    # Straight from the system: malloc might hand out pages that earlier tests have left resident.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
    assert 60 * 2**20 < meter.peak_bytes() < 120 * 2**20
