"""Exact counts and deterministic ties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.strategies.pruning import masks
from memfold.strategies.pruning.masks import (
    PackedMask,
    Ranking,
    keep_counts,
    keep_largest,
    schedule_counts,
    shuffle_mask,
)
from reference.pruning import equal_shares, largest

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@st.composite
def scores_and_count(draw):
    sizes = draw(SIZES)
    # Few distinct values: many ties.
    values = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, float("-inf")])
    scores = [torch.tensor(draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
    return scores, draw(st.integers(0, sum(sizes)))


@given(scores_and_count())
def test_global_selection_is_that_of_a_sorted_list(case):
    scores, count = case
    found = keep_largest(scores, count, scope="global")
    for mask, expected in zip(found, largest(scores, count), strict=True):
        assert torch.equal(mask, expected)
    assert Ranking(scores).counts(count) == [int(mask.sum()) for mask in found]


@given(st.data())
def test_selection_tells_the_last_bits_apart(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64]))
    size = data.draw(st.integers(1, 40))
    bits = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    start = 1.5 if dtype.is_floating_point else 1 << 40
    near = torch.full((size,), start, dtype=dtype)
    near.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).add_(
        torch.tensor(bits)
    )
    signed = near * data.draw(st.sampled_from([1, -1]))
    count = data.draw(st.integers(0, size))
    assert torch.equal(keep_largest([signed], count)[0], largest([signed], count)[0])


@given(scores_and_count())
def test_layer_selection_shares_the_count(case):
    scores, count = case
    found = keep_largest(scores, count, scope="layer")
    counts = [int(mask.sum()) for mask in found]
    assert sum(counts) == count
    assert Ranking(scores, scope="layer").counts(count) == counts
    assert counts == equal_shares([score.numel() for score in scores], count)
    for score, mask, kept in zip(scores, found, counts, strict=True):
        assert torch.equal(mask, largest([score], kept)[0])
    for score, mask, again in zip(scores, found, keep_counts(scores, counts), strict=True):
        assert mask.shape == score.shape
        assert torch.equal(mask, again)


def test_a_packed_mask_is_an_eighth_and_the_same(monkeypatch):
    monkeypatch.setattr(masks, "_CHUNK", 1 << 9)
    for shape in ((), (1,), (3, 5), (4, 2, 8), (40, 30)):
        mask = torch.rand(shape) < 0.5
        packed = PackedMask(mask.shape, mask.device)
        assert packed.unpacked().all()
        packed.write(mask.view(-1).split(1 << 9))
        assert packed.count() == mask.sum()
        assert torch.equal(packed.unpacked(), mask)
        assert packed._bytes.numel() == -(-mask.numel() // 8)


def test_the_first_of_equal_scores_stay_in_a_large_tensor():
    scores = [torch.zeros(300, 400), torch.ones(7, 5)]
    first, second = keep_largest(scores, 1035)
    assert second.all()
    assert first.reshape(-1)[:1000].all()
    assert first.sum() == 1000


def test_shares_are_as_equal_as_whole_numbers_allow():
    scores = [torch.arange(float(n)) for n in (10, 6, 4)]  # 7 of 20: exact 3.5, 2.1, 1.4
    assert Ranking(scores, scope="layer").counts(7) == [4, 2, 1]


@given(SIZES.flatmap(lambda sizes: st.tuples(st.just(sizes), st.integers(1, sum(sizes)))))
def test_fewer_in_all_are_more_in_no_tensor(case):
    # Largest remainders give 4 of 1, 3, 3 to the last two, and of 3 one to each: the first gains.
    sizes, count = case
    ranking = Ranking([torch.arange(float(n)) for n in sizes], scope="layer")
    pairs = zip(ranking.counts(count), ranking.counts(count - 1), strict=True)
    assert all(more >= fewer for more, fewer in pairs)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@given(total=st.integers(1, 10**7), share=st.floats(1e-6, 1), rounds=st.integers(1, 120))
def test_schedules_fall_to_the_count(schedule, total, share, rounds):
    count = max(1, round(share * total))
    left = schedule_counts(total, count, rounds, schedule)
    assert len(left) == rounds
    assert left[-1] == count
    assert left == sorted(left, reverse=True)
    assert left[0] <= total


def test_schedule_values():
    assert schedule_counts(1000, 10, 2, "exponential") == [100, 10]
    # In floating point, as the authors compute it: 329.99.. and 659.99.. are gone.
    assert schedule_counts(1000, 10, 3, "linear") == [671, 341, 10]
    # The ratio is not rounded to 3 of 1000 before its root is taken, which would leave 55.
    assert schedule_counts(1000, 3, 2, "exponential", ratio=0.0026) == [51, 3]


def test_shuffling_keeps_the_number_and_depends_on_the_generator_alone():
    mask = keep_largest([torch.arange(600.0).view(20, 30)], 100)[0]
    global_state = torch.get_rng_state()
    shuffled = [shuffle_mask(mask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    # The kept ones were all in the last rows.
    assert 20 < shuffled[0][:10].sum() < 80
    assert all(m.sum() == 100 and m.shape == mask.shape for m in shuffled)
