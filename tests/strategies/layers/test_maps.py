"""Maps, against what the papers print."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfold.errors import InputError
from memfold.strategies.layers.maps import LayerMap, check_map, depths_of, layer_map, looped_map

NAMES = LayerMap.__args__


@pytest.mark.parametrize(
    ("name", "num_layers", "num_own", "expected"),
    [
        ("cycle", 6, 3, "012012"),
        ("sequence", 6, 3, "001122"),
        ("cycle_rev", 9, 3, "012012210"),
        ("cycle_rev", 6, 3, "012210"),
        ("middle_cycle", 8, 5, "01231234"),
        ("middle_sequence", 8, 5, "01122334"),
        ("albert", 6, 1, "000000"),
        ("albert", 7, 3, "0001122"),
        ("sandwich", 6, 3, "011112"),
    ],
)
def test_maps_are_those_of_the_papers(name, num_layers, num_own, expected):
    assert layer_map(name, num_layers, num_own) == tuple(map(int, expected))


@given(st.sampled_from(NAMES), st.integers(2, 24))
def test_every_layer_is_used_and_the_deepest_map_is_the_plain_model(name, num_layers):
    depths = depths_of(name, num_layers)
    assert depths == sorted(set(depths))
    for depth in depths:
        entries = layer_map(name, num_layers, depth)
        assert len(entries) == num_layers
        assert list(dict.fromkeys(entries)) == list(range(depth))
    if name != "sandwich" and depths:
        assert layer_map(name, num_layers, depths[-1]) == tuple(range(num_layers))
        uses = [layer_map(name, num_layers, depths[0]).count(i) for i in range(depths[0])]
        assert sum(uses) == num_layers


@pytest.mark.parametrize(
    ("name", "num_layers", "loops", "expected"),
    [
        ("albert", 8, 2, "00112233"),
        ("albert", 7, 2, "0011223"),
        ("albert", 7, 3, "0001122"),
        ("cycle", 6, 2, "012012"),
        ("middle_sequence", 8, 3, "01112223"),
    ],
)
def test_loops_make_as_few_layers_as_they_allow(name, num_layers, loops, expected):
    assert looped_map(name, num_layers, loops) == tuple(map(int, expected))


def test_a_list_names_layers_in_any_order():
    assert check_map([3, 3, 0, 1], 4) == (0, 0, 1, 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([0, 1], "has 2 entries, one for each of the 4 repeated layers"),
        ([0, 1, 2, 4], "names layer 4; the repeated layers are 0 to 3"),
        ([0, -1, 2, 3], "names layer -1; the repeated layers are 0 to 3"),
    ],
)
def test_lists_that_fit_no_model_are_refused(entries, message):
    with pytest.raises(InputError, match=message):
        check_map(entries, 4)
