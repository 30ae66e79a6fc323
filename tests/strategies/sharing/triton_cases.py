"""The Triton kernels against the torch operations, on any device.

`test_fold_triton.py` runs this file in a process of its own, where Triton interprets the kernels
on the CPU, and calls the same checks on a GPU.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.strategies.sharing import fold, fold_triton, random_fold
from memfold.strategies.sharing.fold import Block
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.random_fold import RandomFold

SLOT_DTYPES = (torch.float32, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (m, length, runs): one slot; whole partitions; parts of them; several programs, and more runs
# than one program takes.
SIZES = ((1, 1, 5), (7, 7, 3), (100, 63, 40), (1500, 1400, 33), (5, 5, 90))


def random_block(m, length, runs, seed):
    generator = np.random.default_rng(seed)
    starts, signs = generator.integers(0, m, runs), generator.choice([-1, 1], runs)
    return Block(3, length, starts, signs)


def check_reading(block, m, slots_dtype, dtype, device):
    slots = torch.linspace(-2, 3, m, dtype=slots_dtype, device=device)
    out, expected = torch.full((2, block.stop + 2), 7, dtype=dtype, device=device)
    fold_triton.read_blocks(slots, [block], 0.3, out, None)
    fold.read_block(slots, block, 0.3, expected)
    assert_read(out, expected)


def assert_read(found, expected):
    if found.dtype == torch.bfloat16 and not found.is_cuda:
        # The interpreter cuts bfloat16 off where it should round: one unit in the last place.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


def check_adding(block, m, slots_dtype, dtype, device):
    weights = torch.linspace(-2, 3, block.stop + 2, device=device).sin().to(dtype)
    out, again, expected = torch.full((3, m), 0.5, dtype=slots_dtype, device=device)
    fold_triton.add_blocks(weights, [block], 0.3, out, None)
    fold_triton.add_blocks(weights, [block], 0.3, again, None)
    assert torch.equal(out, again)
    fold.add_block(weights, block, 0.3, expected)
    torch.testing.assert_close(out, expected)


def check_mapping(mapping, device, monkeypatch):
    """Compare gather and scatter of every tensor with and without kernels."""
    slots = torch.linspace(-2, 3, mapping.num_slots, device=device)
    for span in mapping.spans[1:]:
        results = []
        for triton in (False, True):
            monkeypatch.setattr(random_fold, "uses_triton", lambda *_, answer=triton: answer)
            weight = mapping.gather(slots, span, 0.7)
            out = torch.ones_like(slots)
            mapping.scatter(weight + 1, span, 0.7, out)
            results.append((weight, out))
        (weight, out), (kernel_weight, kernel_out) = results
        assert torch.equal(kernel_weight, weight)
        torch.testing.assert_close(kernel_out, out)


def check_model(sign, device, monkeypatch):
    """Compare the training of a whole model with and without kernels."""
    results = []
    for triton in (False, True):
        monkeypatch.setattr(random_fold, "uses_triton", lambda *_, answer=triton: answer)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 3)).to(device)
        memfold.compress(model, "stable_rps", ratio=0.3, seed=1, sign=sign)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 9, device=device)).square().sum().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("slots_dtype", SLOT_DTYPES)
def test_dtypes(dtype, slots_dtype):
    block = random_block(600, 599, 2, seed=1)
    check_reading(block, 600, slots_dtype, dtype, "cpu")
    check_adding(block, 600, slots_dtype, dtype, "cpu")


@pytest.mark.parametrize(("m", "length", "runs"), SIZES)
def test_sizes(m, length, runs):
    block = random_block(m, length, runs, seed=1)
    check_reading(block, m, torch.float64, torch.float64, "cpu")
    check_adding(block, m, torch.float64, torch.float64, "cpu")


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=10)
def test_random_blocks(data, m, runs, seed):
    length = data.draw(st.integers(1, m))
    block = random_block(m, length, runs, seed)
    check_reading(block, m, torch.float32, torch.float32, "cpu")
    check_adding(block, m, torch.float32, torch.float32, "cpu")


def mappings(sign):
    """Yield maps with tensors before the first sign's row ends, across several, and far behind."""
    for skipped, num_slots, align_rows in (
        (4000, 700, False),
        (4000, 9000, True),
        (2**33 + 4090, 5000, False),
    ):
        shapes = ((skipped,), (90, 100), (3, 7))
        stops = np.cumsum([int(np.prod(shape)) for shape in shapes]).tolist()
        spans = [
            Span(f"{i}.weight", torch.Size(shape), stop - int(np.prod(shape)), stop)
            for i, (shape, stop) in enumerate(zip(shapes, stops, strict=True))
        ]
        yield RandomFold(spans, num_slots, seed=5, sign=sign, align_rows=align_rows)


@pytest.mark.parametrize("sign", ["column", "run", "weight"])
def test_mappings_agree_with_torch(sign, monkeypatch):
    for mapping in mappings(sign):
        check_mapping(mapping, "cpu", monkeypatch)


@pytest.mark.parametrize("sign", ["column", "run", "weight"])
def test_models_train_alike(sign, monkeypatch):
    check_model(sign, "cpu", monkeypatch)


def test_one_number_repeated_along_a_gradient():
    block = random_block(7, 5, 4, seed=2)
    out, expected = torch.zeros(2, 7)
    weights = torch.tensor(3.0).expand(block.stop)
    fold_triton.add_blocks(weights, [block], 1.0, out, None)
    fold.add_block(weights.contiguous(), block, 1.0, expected)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.0])
def test_factors(factor):
    block = random_block(7, 5, 4, seed=2)
    slots = torch.linspace(-2, 3, 7, dtype=torch.float64)
    out, expected = torch.zeros(2, block.stop, dtype=torch.float64)
    fold_triton.read_blocks(slots, [block], factor, out, None)
    fold.read_block(slots, block, factor, expected)
    assert torch.equal(out, expected)


def test_the_kernels_are_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert type(fold_triton._kernels().read_kernel).__name__ == "InterpretedFunction"
