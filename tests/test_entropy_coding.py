"""Entropy coding: what is written is read again, near the entropy, and nothing grows on the way."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.entropy_coding import decode, encode
from memfold.errors import InputError


def symbols_of(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def coded_by_zlib(text: bytes, level: int = 9) -> torch.Tensor:
    coder = zlib.compressobj(level, zlib.DEFLATED, -15)
    return symbols_of(coder.compress(text) + coder.flush())


@given(st.binary(max_size=500))
def test_what_is_written_is_read(text: bytes) -> None:
    coded = encode(symbols_of(text))
    assert coded.dtype == torch.uint8
    assert bytes(decode(coded).tolist()) == text


@pytest.mark.parametrize("repeat", [1, 2, 9, 100_000])
def test_one_symbol_takes_a_bit(repeat: int) -> None:
    coded = encode(torch.full((repeat,), 7, dtype=torch.uint8))
    assert repeat / 8 <= len(coded) <= 1.01 * repeat / 8 + 20
    assert decode(coded).tolist() == [7] * repeat


def test_frequencies_decide_the_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(100_000, generator=generator) * 20).round().clamp(-127, 127)
    symbols = (codes + 128).to(torch.uint8)
    shares = symbols.bincount().double() / len(symbols)
    entropy = float(-(shares * shares.clamp(min=1e-300).log2()).sum())
    # Codes of whole bits, and the tables.
    assert entropy <= 8 * len(encode(symbols)) / len(symbols) < entropy + 0.06
    assert entropy == pytest.approx(math.log2(20 * math.sqrt(2 * math.pi * math.e)), abs=0.01)


def test_nothing_grows_by_more_than_its_bits() -> None:
    bomb = coded_by_zlib(bytes(10_000_000))
    assert len(bomb) < 20_000
    with pytest.raises(InputError, match="stand for more than they can"):
        decode(bomb)


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (coded_by_zlib(b"abcdef")[:-1], "cut off"),
        (torch.cat([coded_by_zlib(b"abcdef"), torch.zeros(1, dtype=torch.uint8)]), "cut off"),
        (torch.full((9,), 255, dtype=torch.uint8), "are damaged"),
        (torch.zeros(0, dtype=torch.uint8), "cut off"),
        (torch.zeros(4), "have dtype torch.float32"),
        (torch.zeros(2, 2, dtype=torch.uint8), "2 dimensions"),
    ],
)
def test_other_bytes_are_refused(coded: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(coded)
