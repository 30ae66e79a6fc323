"""Maps by what layers compute, against clusters that are joined one after the other."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.strategies.layers.similarity import (
    crash_map,
    kept_layers,
    layer_features,
    linear_cka,
    map_of,
)
from memfold.training import run
from training.jobs import PYTHONPATH, REPOSITORY, SMALL, compose_job

DEPTH = 6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gpt():
    torch.manual_seed(0)
    return GPT(23, 12, width=16, depth=DEPTH, num_heads=2).double()


def batches():
    inputs = torch.randint(0, 23, (40, 12), generator=torch.Generator().manual_seed(1))
    return [(part, part) for part in inputs.split(16)]


def test_cka_is_that_of_centred_gram_matrices():
    x, y = random(9, 5) + 3, random(9, 7, seed=1) - 1
    centring = torch.eye(9).double() - 1 / 9
    k, m = (centring @ z @ z.T @ centring for z in (x, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-12)


def test_cka_is_1_for_features_that_are_rotated_scaled_and_moved():
    x = random(9, 5)
    rotation = torch.linalg.qr(random(5, 5, seed=1)).Q
    assert linear_cka(x, -3 * x @ rotation + 2) == pytest.approx(1, rel=1e-12)
    assert linear_cka(x, random(9, 5, seed=2)) < 0.9


def test_features_are_means_over_tokens_of_what_layers_give():
    model, seen = gpt().train(), []
    found = layer_features(model, batches(), num_samples=20)
    assert model.training
    assert model.blocks[2].training
    with torch.no_grad():
        inputs = torch.cat([x for x, _ in batches()])[:20]
        x = model.eval().embedding(inputs)
        for block in model.blocks:
            x, _ = block(x, model.positions)
            seen.append(x.mean(1))
    assert len(found) == DEPTH
    for one, other in zip(found, seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def joined(similarities, num_own):
    """Join clusters of neighbours as the authors do, and find the nearest centre by a loop."""
    clusters = [[place] for place in range(len(similarities) + 1)]
    while len(clusters) > num_own:
        between = [similarities[left[-1]] for left in clusters[:-1]]
        first = between.index(max(between))
        clusters[first : first + 2] = [clusters[first] + clusters[first + 1]]
    centres = [cluster[len(cluster) // 2] for cluster in clusters]
    entries = []
    for place in range(len(similarities) + 1):
        nearest = centres[0]
        for centre in centres[1:]:
            if abs(centre - place) <= abs(nearest - place):
                nearest = centre
        entries.append(nearest)
    return tuple(entries)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True), st.data())
def test_the_map_is_that_of_clusters_joined_one_after_the_other(similarities, data):
    num_layers = len(similarities) + 1
    num_own = data.draw(st.integers(1, num_layers))
    found = map_of(similarities, num_own)
    assert found == joined(similarities, num_own)
    assert list(found) == sorted(found)
    assert len(set(found)) == num_own
    assert all(found[own] == own for own in found)  # what stays is used where it was
    assert map_of(similarities, num_layers) == tuple(range(num_layers))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12, unique=True), st.data())
def test_the_layers_that_change_the_least_go_first(similarities, data):
    num_layers = len(similarities) + 1
    stay = kept_layers(similarities, data.draw(st.integers(0, num_layers - 1)))
    gone = set(range(num_layers)) - set(stay)
    assert list(stay) == sorted(set(stay))
    assert stay[0] == 0
    alike = {layer: similarities[layer - 1] for layer in range(1, num_layers)}
    assert all(alike[out] > alike[layer] for out in gone for layer in stay[1:])
    assert kept_layers(similarities, 0) == tuple(range(num_layers))


def test_equal_layers_are_joined():
    model = gpt()
    with torch.no_grad():
        for place in (1, 2, 4):  # they add nothing
            model.blocks[place].attention.projection.weight.zero_()
            model.blocks[place].down.weight.zero_()
        for place in (0, 3, 5):  # they add much
            model.blocks[place].down.weight.mul_(300)
    assert crash_map(model, batches(), 3) == (1, 1, 1, 4, 4, 5)


@pytest.mark.parametrize(
    ("entries", "found"),
    [([2, 2, 2, 2, 4, 4], (0, 0, 0, 0, 1, 1)), ([5, 0, 0, 0, 0, 3], (0, 1, 1, 1, 1, 2))],
)
def test_tied_layers_start_from_those_that_the_map_names(entries, found, tmp_path):
    model = gpt()
    for number, layer in enumerate(model.blocks):
        torch.nn.init.constant_(layer.norm1.weight, 1 + number)
    options = {"initial_values": "least_squares", "block": "named", "map": entries}
    tied = memfold.compress(copy.deepcopy(model), "tied", norms="shared", **options)
    assert compression_of(tied).map == found
    memfold.save(tied, tmp_path / "model.safetensors")
    for network in (tied, memfold.load(tmp_path / "model.safetensors", gpt())):
        dense = memfold.densify(network)
        for place, entry in enumerate(entries):
            for name in ("attention.qkv", "attention.projection", "up", "down", "norm1"):
                weight = dense.blocks[place].get_submodule(name).weight
                assert torch.equal(weight, model.blocks[entry].get_submodule(name).weight)


def test_a_map_of_all_layers_changes_nothing():
    entries = crash_map(gpt(), batches(), DEPTH)
    tied = memfold.compress(
        gpt(), "tied", map=list(entries), initial_values="least_squares", block="named"
    )
    for (inputs, _), plain in zip(batches(), [gpt()] * 3, strict=True):
        assert torch.equal(tied(inputs), plain(inputs))


def test_a_map_starts_a_network_from_a_trained_one(tmp_path):
    equal = ["backbone.hidden_widths=[16,16,16,16]", "trainer.max_epochs=1"]
    run(compose_job(tmp_path / "dense", *SMALL, *equal, "compression=dense"))
    done = subprocess.run(
        [sys.executable, "scripts/layer_map.py", str(tmp_path / "dense"), "--keep", "2"],
        cwd=REPOSITORY,
        env={"PYTHONPATH": PYTHONPATH, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    similarities, override = done.stdout.splitlines()
    assert len(similarities.split()) == 3 + 2
    options = ["compression.initial_values=least_squares", "compression.block=named"]
    start = f"init_from={tmp_path / 'dense'}"
    result = run(
        compose_job(
            tmp_path / "tied", *SMALL, *equal, "compression=tied", override, *options, start
        )
    )
    assert result["status"] == "completed"
    assert len(set(result["compression"]["map"])) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: crash_map(gpt(), batches(), 0), "6 repeated layers keeps 1 to 6 of them, not 0"),
        (lambda: crash_map(gpt(), batches(), 7), "6 repeated layers keeps 1 to 6 of them, not 7"),
        (lambda: kept_layers([0.5], 2), "of 2 repeated layers 0 to 1 can be dropped, not 2"),
        (lambda: crash_map(gpt(), [], 2), "data= holds no samples"),
        (lambda: crash_map(gpt(), batches(), 2, num_samples=1), "give the same for all samples"),
        (lambda: crash_map(nn.Linear(3, 3), batches(), 2), "has no repeated layers"),
        (
            lambda: memfold.compress(gpt(), "tied", block="named"),
            r"block=named needs a list of layers as compression\.map",
        ),
    ],
)
def test_what_cannot_be_is_refused(function, message):
    with pytest.raises(memfold.InputError, match=message):
        function()
