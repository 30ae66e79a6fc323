"""Stored values that cannot be what was packed are refused in one line."""

import math

import pytest
import torch

from memfold.entropy_coding import encode
from memfold.errors import InputError
from memfold.quantisation import Packing, dequantise, quantise


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (32, {"": None}, "values are missing"),
        (32, {"": torch.zeros(69)}, "values have 69 entries, expected 70"),
        (32, {"": torch.zeros(70, dtype=torch.int8)}, "values have dtype torch.int8"),
        (16, {"": torch.zeros(70)}, "values have dtype torch.float32"),
        (8, {".scales": None}, "scales are missing"),
        (8, {".scales": torch.ones(2)}, "scales have dtype torch.float32"),
        (8, {".scales": torch.ones(1).bfloat16()}, "scales have 1 entries, expected 2"),
        (8, {".scales": torch.zeros(2).bfloat16()}, "scales are damaged"),
        (8, {".scales": torch.tensor([1, math.nan]).bfloat16()}, "scales are damaged"),
        (8, {".scales": torch.tensor([1, math.inf]).bfloat16()}, "scales are damaged"),
        (8, {"": torch.zeros(70, dtype=torch.uint8)}, "values have dtype torch.uint8"),
        (8, {"": torch.zeros(71, dtype=torch.int8)}, "values have 71 entries"),
        (8, {"": torch.full((70,), -128, dtype=torch.int8)}, "values are damaged"),
        (4, {"": torch.zeros(70, dtype=torch.uint8)}, "values have 70 entries, expected 35"),
        (4, {"": torch.zeros(35, dtype=torch.int8)}, "values have dtype torch.int8"),
        (4, {"": torch.full((35,), 0x80, dtype=torch.uint8)}, "values are damaged"),
        (3, {"": torch.zeros(26, dtype=torch.uint8)}, "values have 26 entries, expected 27"),
        (3, {"": torch.full((27,), 0b100, dtype=torch.uint8)}, "values are damaged"),
    ],
)
def test_damaged_parts_are_refused(bits: int, change: dict, message: str) -> None:
    packing = Packing(bits)
    parts = quantise(torch.randn(7, 10), packing) | change
    parts = {suffix: part for suffix, part in parts.items() if part is not None}
    with pytest.raises(InputError, match=rf"^artifact\.bits={bits}: stored {message}"):
        dequantise(parts, (7, 10), packing, torch.float32)


@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3])
def test_damaged_codes_are_refused(bits: int) -> None:
    values, packing = torch.randn(900, 10), Packing(bits, coding="huffman")
    parts = quantise(values, packing)
    assert set(parts) == {".coded", ".scales.coded"}
    for name, what in ((".coded", "values"), (".scales.coded", "scales")):
        for damaged, message in (
            (parts[name][:-1], "coded bytes are"),
            (encode(torch.zeros(9, dtype=torch.uint8)), "have 9 entries"),
            (parts[name].float(), "coded bytes have dtype"),
        ):
            with pytest.raises(InputError, match=rf"bits={bits}: stored {what}:? {message}"):
                dequantise(parts | {name: damaged}, values.shape, packing, torch.float32)
