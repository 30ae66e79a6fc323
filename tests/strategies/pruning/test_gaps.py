"""Gaps between kept entries, against a naive loop over all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.pruning.gaps import from_gaps, to_gaps
from memfold.strategies.pruning.stored_masks import CODED, COUNTS, INDEX, masks_of, pack

masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=40), max_size=5)


def naive(kept: list[list[bool]]) -> list[int]:
    """Walk over the tensors that are kept in part, one entry after the other."""
    symbols, gap = [], 0
    for entry in (e for mask in kept if 0 < sum(mask) < len(mask) for e in mask):
        if not entry:
            gap += 1
            continue
        while gap >= 255:
            symbols.append(255)
            gap -= 255
        symbols.append(gap)
        gap = 0
    return symbols


def positions_of(kept: list[list[bool]]) -> list[torch.Tensor]:
    return [torch.tensor(mask, dtype=torch.bool).nonzero().squeeze(1) for mask in kept]


@given(masks, st.integers(0, 3))
def test_gaps_equal_the_naive_loop_and_are_read_again(kept: list[list[bool]], far: int) -> None:
    kept = [*kept, [True, *[False] * (255 * far + 7), True]]
    positions, sizes = positions_of(kept), [len(mask) for mask in kept]
    symbols = to_gaps(positions, sizes)
    assert symbols.tolist() == naive(kept)
    read = from_gaps(symbols, [len(places) for places in positions], sizes)
    assert [places.tolist() for places in read] == [places.tolist() for places in positions]


@pytest.mark.parametrize(
    ("symbols", "counts"),
    [
        ([1, 1], [3]),
        ([1, 1, 1], [2]),
        ([1, 1, 255], [2]),
        ([255, 1], [1]),
        ([9, 0], [2]),
        ([], [2]),
        ([1], [10]),
    ],
)
def test_gaps_that_do_not_fit_are_refused(symbols: list[int], counts: list[int]) -> None:
    with pytest.raises(InputError, match="gaps between kept weights are damaged"):
        from_gaps(torch.tensor(symbols, dtype=torch.uint8), counts, [10])


def test_a_gap_from_one_tensor_to_the_next_has_to_land_in_it() -> None:
    symbols = to_gaps([torch.tensor([1, 2]), torch.tensor([0])], [4, 4])
    assert [p.tolist() for p in from_gaps(symbols, [2, 1], [4, 4])] == [[1, 2], [0]]
    with pytest.raises(InputError, match="leads out of its tensor"):
        from_gaps(symbols, [1, 2], [4, 4])


def test_masks_are_coded_where_that_takes_fewer_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [torch.Size([100, 80]), torch.Size([50, 4, 3])]
    for share, name in ((0.1, CODED), (0.5, INDEX)):
        kept = [torch.rand(shape, generator=generator) < share for shape in shapes]
        positions = [mask.reshape(-1).nonzero().squeeze(1) for mask in kept]
        plain, packed = pack(positions, shapes), pack(positions, shapes, "huffman")
        assert packed.keys() == {COUNTS, name}
        assert packed[name].nbytes <= plain[INDEX].nbytes
        for read in (masks_of(packed, shapes), masks_of(plain, shapes)):
            assert all(torch.equal(a, b) for a, b in zip(read, kept, strict=True))


def test_a_random_tenth_takes_half_a_bit_an_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size([80_000])
    positions = (torch.rand(shape, generator=generator) < 0.1).nonzero().squeeze(1)
    packed = pack([positions], [shape], "huffman")[CODED]
    assert len(packed) < 1.03 * 0.469 * 80_000 / 8  # the entropy of a tenth
