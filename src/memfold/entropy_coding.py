"""Entropy coding: bytes in about as many bits as their frequencies ask for.

Huffman codes and nothing else, made anew for every 32,768 bytes, in the format DEFLATE (RFC 1951),
which Python's zlib reads and writes: quantised numbers and gaps between kept weights hardly ever
repeat, so that searching for repetitions gains nothing and costs time. Every byte then takes at
least a bit: what is read grows to eight times its size at most, and what claims to grow more is
refused before it does.
"""

import zlib

import torch
from torch import Tensor

from memfold.errors import InputError

__all__ = ["LEAST_SAVED", "decode", "encode"]

LEAST_SAVED = 32
"""Bytes that coding has to save: a file that says that it is coded has a larger header."""

_FORMAT = -15  # DEFLATE without a header
_MOST_MEMORY = 9


def encode(symbols: Tensor) -> Tensor:
    """Code bytes.

    Args:
        symbols: uint8 of shape (n,), on any device.

    Returns:
        uint8 of shape (bytes,), on the CPU.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, _FORMAT, _MOST_MEMORY, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(symbols.cpu().contiguous().numpy().data) + coder.flush()
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def decode(coded: Tensor) -> Tensor:
    """Read what `encode` wrote.

    Args:
        coded: uint8 of shape (bytes,), on any device.

    Returns:
        uint8 of shape (n,), on the CPU, n at most eight times as much.

    Raises:
        InputError: These are other bytes.
    """
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise InputError(f"coded bytes have dtype {coded.dtype} and {coded.dim()} dimensions")
    reader = zlib.decompressobj(_FORMAT)
    try:
        # No memory is taken for more, whatever the bytes say.
        symbols = reader.decompress(coded.cpu().numpy().data, max(1, 8 * len(coded)))
    except zlib.error as error:
        raise InputError(f"coded bytes are damaged ({error})") from error
    if not reader.eof or reader.unused_data:
        raise InputError("coded bytes are cut off, or stand for more than they can")
    if not symbols:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(symbols), dtype=torch.uint8)
