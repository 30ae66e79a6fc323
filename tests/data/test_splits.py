"""The stratified order behind every split."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from memfold.data.splits import stratified_order

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80)


@given(LABELS, st.integers(0, 2**62))
def test_every_prefix_is_stratified(classes: list[int], seed: int) -> None:
    labels = torch.tensor(classes)
    order = stratified_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(classes)))
    totals = torch.bincount(labels, minlength=5)
    present = totals > 0
    for size in range(1, len(classes) + 1):
        counts = torch.bincount(labels[order[:size]], minlength=5)
        shares = (counts / totals)[present]
        # Each class is cut within one sample of the same share.
        slack = (1 / totals)[present]
        assert (shares - slack).max() <= (shares + slack).min() + 1e-6


def test_seeds_and_chance() -> None:
    labels = torch.arange(1000) % 10
    order = stratified_order(labels, 7)
    assert torch.equal(order, stratified_order(labels, 7))
    assert not torch.equal(order, stratified_order(labels, 8))
    # every sample is as likely to be early: the mean number of the first half is about 499.5,
    # with a standard error of 13
    assert abs(order[:500].double().mean() - 499.5) < 60


def test_a_class_of_one_sample_is_chosen_by_chance() -> None:
    labels = torch.tensor([0] * 99 + [1])
    chosen = [99 in stratified_order(labels, seed)[:50] for seed in range(200)]
    # 200 draws of probability about 1/2 have a standard deviation of 7
    assert 70 < sum(chosen) < 130
