"""Pruning at initialisation: counts, rounds, scope, what each score depends on, sanity checks."""

import copy
import math
import random
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.compression import Context, compression_of
from memfold.errors import InputError
from memfold.strategies import strategy_class
from memfold.strategies.pruning.masks import Ranking
from reference.pruning import synflow_masks

METHODS = ("rand", "mag", "snip", "grasp", "synflow")
SIZES = [8 * 20, 20 * 30, 30 * 4]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)
    )


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 8, generator=generator)
    y = torch.randint(0, 4, (30,), generator=generator)
    return list(zip(x.split(10), y.split(10), strict=True))


def prune(method, model=None, **options):
    options.setdefault("ratio", None if "budget_bytes" in options else 0.2)
    if method == "synflow":
        options.setdefault("rounds", 10)  # 100 take their time
    model = mlp() if model is None else model
    return memfold.compress(model, method, data=data(), loss=F.cross_entropy, **options)


def masks_of(model):
    return compression_of(model).masks()


def counts_of(model):
    return compression_of(model).counts


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ratio", [0.006, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact(method, scope, ratio):
    model = prune(method, ratio=ratio, scope=scope)
    count = round(ratio * sum(SIZES))
    assert compression_of(model).num_values == sum(counts_of(model)) == count
    assert count == sum(int(mask.sum()) for mask in masks_of(model))
    for values, dense in zip(
        [p for n, p in model.named_parameters() if n.endswith("weight_values")],
        [mlp()[i].weight.detach() for i in (0, 2, 4)],
        strict=True,
    ):
        assert set(values.tolist()) <= set(dense.flatten().tolist())  # trained from where they were
    if scope == "layer":  # of up to three tensors, none is further than one from its share
        for kept, size in zip(counts_of(model), SIZES, strict=True):
            assert abs(kept - count * size / sum(SIZES)) < 1


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_rounds_follow_the_schedule_and_kept_sets_are_nested(method, schedule, monkeypatch):
    cls = strategy_class(method)
    scorer = cls.scorer
    seen = []

    def recording(self, model, weights, context):
        score = scorer(self, model, weights, context)

        def record(kept):
            seen.append([mask.unpacked() for mask in kept])
            return score(kept)

        return record

    monkeypatch.setattr(cls, "scorer", recording)
    seen.append(masks_of(prune(method, ratio=0.01, rounds=4, schedule=schedule)))
    total = sum(SIZES)
    shares = [0.01 ** (t / 4) if schedule == "exponential" else 1 - 0.99 * t / 4 for t in range(4)]
    found = [sum(int(mask.sum()) for mask in masks) for masks in seen]
    assert found == [total - math.floor((1 - share) * total) for share in shares] + [9]
    assert_nested(seen)


@pytest.mark.parametrize("method", METHODS)
def test_the_layout_of_weights_in_memory_changes_nothing(method):
    def masks(memory_format):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
        net.to(memory_format=memory_format)
        batch = [(torch.ones(2, 3, 6, 6).double(), torch.zeros(2, 4, 2, 2).double())]
        options = {"ratio": 0.2, "rounds": 3, "data": batch, "loss": F.mse_loss}
        return masks_of(memfold.compress(net, method, **options))

    assert equal(masks(torch.contiguous_format), masks(torch.channels_last))


def assert_nested(seen):
    for before, after in pairwise(seen):
        assert all((b <= a).all() for a, b in zip(before, after, strict=True))


def test_no_round_revives_a_weight_of_a_layer(monkeypatch):
    cls, cut, seen = strategy_class("mag"), Ranking.masks, []

    def recording(self, count):
        found = cut(self, count)
        seen.append([mask.unpacked() for mask in found])
        return found

    monkeypatch.setattr(Ranking, "masks", recording)
    rng = random.Random(0)
    for _ in range(40):
        shapes = [(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(rng.randint(3, 6))]
        model = nn.ModuleList([nn.Linear(*shape) for shape in shapes])
        seen.clear()
        cls(ratio=rng.uniform(0.02, 0.5), scope="layer", rounds=12).compress(model, Context())
        assert len(seen) == 12
        assert_nested(seen)


@pytest.mark.parametrize("method", ["rand", "mag"])
def test_scores_that_do_not_change_give_the_same_mask_in_any_number_of_rounds(method):
    assert equal(masks_of(prune(method)), masks_of(prune(method, rounds=7)))


def test_one_synflow_round_loses_a_layer_and_a_hundred_keep_all():
    def pruned(rounds):
        torch.manual_seed(0)
        layers = [nn.Linear(*sizes, bias=False) for sizes in ((20, 60), (60, 60), (60, 5))]
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        options = {} if rounds is None else {"rounds": rounds}
        example = [(torch.randn(2, 20), torch.zeros(2))]
        return memfold.compress(model, "synflow", ratio=3 / 5100, data=example, **options)

    assert counts_of(pruned(None)) == [1, 1, 1]
    assert 0 in counts_of(pruned(1))


@pytest.mark.parametrize("ratio", [0.02, 0.003])
def test_synflow_keeps_what_the_loop_of_its_authors_does(ratio):
    def build():
        torch.manual_seed(1)
        layers = [nn.Linear(*sizes) for sizes in ((64, 60), (60, 30), (30, 10))]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()

    example = [(torch.ones(1, 64), torch.ones(1))]
    model = memfold.compress(build(), "synflow", ratio=ratio, data=example)
    names = compression_of(model).names
    expected = synflow_masks(build(), names, (64,), ratio, 100)
    kept, wanted = (torch.cat([m.flatten() for m in ms]) for ms in (masks_of(model), expected))
    # They round up where round(ratio n) rounds down: one weight more may stay.
    assert kept.sum() == round(ratio * len(kept))
    assert wanted.sum() - kept.sum() in (0, 1)
    assert (kept <= wanted).all()


def test_rand_depends_on_the_seed_alone():
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    first = masks_of(prune("rand", seed=3))
    assert equal(first, masks_of(prune("rand", model, seed=3)))
    assert not equal(first, masks_of(prune("rand", seed=4)))
    untouched = memfold.compress(mlp(), "rand", ratio=0.2, seed=3)  # no data, no loss
    assert equal(first, masks_of(untouched))
    assert compression_of(untouched).index_format == "seed"
    assert compression_of(untouched).index_bytes == 8


def test_rand_with_another_ratio_is_nested():
    small, large = (masks_of(prune("rand", ratio=ratio)) for ratio in (0.05, 0.3))
    assert all((a <= b).all() for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_layers_keep_their_densities_whatever_the_scores(method, rounds):
    model = prune(method, ratio=0.1, densities="erk", rounds=rounds)
    expected = [88 * dims / (28 + 50 + 34) for dims in (28, 50, 34)]  # 22, 39.3, 26.7
    assert counts_of(model) == [round(count) for count in expected]


def test_rand_with_densities_is_nested_and_drawn_again_from_its_seed(tmp_path):
    masks = [masks_of(prune("rand", ratio=r, densities="erk", rounds=3)) for r in (0.3, 0.1, 0.02)]
    assert_nested(masks)
    model = prune("rand", budget_bytes=3000, densities="erk", shuffle=True)
    memfold.save(model, path := tmp_path / "model.safetensors")
    assert path.stat().st_size <= 3000
    loaded = memfold.load(path, mlp())
    assert equal(masks_of(loaded), masks_of(model))
    assert counts_of(model) != counts_of(prune("rand", budget_bytes=3000))


def test_mag_keeps_the_largest_and_sees_scales_between_layers_only_globally():
    model = mlp()
    scales = (0.5, 4.0, 1.0)
    for scope in ("global", "layer"):
        plain = prune("mag", scope=scope)
        common, uneven = mlp(), mlp()
        with torch.no_grad():
            for index, scale in zip((0, 2, 4), scales, strict=True):
                common[index].weight.mul_(8)
                uneven[index].weight.mul_(scale)
        assert equal(masks_of(plain), masks_of(prune("mag", common, scope=scope)))
        same = equal(masks_of(plain), masks_of(prune("mag", uneven, scope=scope)))
        assert same == (scope == "layer")
    weights = [model[i].weight.detach().abs() for i in (0, 2, 4)]
    masks = masks_of(prune("mag"))
    kept = torch.cat([w[m] for w, m in zip(weights, masks, strict=True)])
    dropped = torch.cat([w[~m] for w, m in zip(weights, masks, strict=True)])
    assert kept.min() >= dropped.max()


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_data_informed_masks_depend_on_the_samples_and_not_on_their_batches(method):
    masks = masks_of(prune(method))
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))

    def masks_for(x, y, **options):
        model = memfold.compress(
            mlp(), method, ratio=0.2, data=[(x, y)], loss=F.cross_entropy, **options
        )
        return masks_of(model)

    assert equal(masks, masks_for(x, y))
    assert not equal(masks, masks_for(x[:10], y[:10]))
    assert equal(masks_for(x, y, num_samples=10), masks_for(x[:10], y[:10]))


def test_data_may_be_read_only_once_whatever_the_rounds():
    once = iter(data())
    model = memfold.compress(mlp(), "snip", ratio=0.1, rounds=3, data=once, loss=F.cross_entropy)
    assert equal(masks_of(model), masks_of(prune("snip", ratio=0.1, rounds=3)))


def test_synflow_looks_at_the_shape_of_the_data_only():
    other = [(torch.full((3, 8), -7.0), torch.zeros(3))]
    model = memfold.compress(mlp(), "synflow", ratio=0.2, data=other)
    assert equal(masks_of(model), masks_of(prune("synflow", rounds=100)))


@pytest.mark.parametrize("method", METHODS)
def test_shuffling_keeps_the_counts_and_the_values_fit_their_places(method):
    plain, shuffled = prune(method), prune(method, shuffle=True)
    assert counts_of(plain) == counts_of(shuffled)
    assert not equal(masks_of(plain), masks_of(shuffled))
    assert equal(masks_of(shuffled), masks_of(prune(method, shuffle=True)))
    dense, fresh = memfold.densify(shuffled), mlp()
    for index, mask in zip((0, 2, 4), masks_of(shuffled), strict=True):
        assert torch.equal(dense[index].weight, fresh[index].weight * mask)


@pytest.mark.parametrize("method", METHODS)
def test_reinitialising_permutes_the_initial_values(method):
    plain, again = prune(method, ratio=1.0), prune(method, ratio=1.0, reinitialise=True)
    for index in (0, 2, 4):
        before, after = (m[index].weight.detach().flatten() for m in (plain, again))
        assert not torch.equal(before, after)
        assert torch.equal(before.sort().values, after.sort().values)
    sparse = prune(method, reinitialise=True)
    assert equal(masks_of(sparse), masks_of(prune(method)))


def squared_gradient_norm(model):
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return float(sum(p.grad.square().sum() for p in model.parameters()))


def test_grasp_raises_the_gradient_norm_and_its_absolute_form_does_so_less():
    signed, absolute, random = (
        squared_gradient_norm(prune(method, ratio=0.4, **options))
        for method, options in (("grasp", {}), ("grasp", {"absolute": True}), ("rand", {}))
    )
    assert signed > absolute > random


@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_stay_zero_in_training(method, tmp_path):
    model = prune(method, shuffle=True)
    masks = [mask.clone() for mask in masks_of(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    dense, fresh = memfold.densify(model), mlp()
    for index, mask in zip((0, 2, 4), masks, strict=True):
        assert not dense[index].weight[~mask].any()
        assert (dense[index].weight[mask] != fresh[index].weight[mask]).all()
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", mlp())
    x = data()[0][0]
    assert torch.equal(loaded(x), model(x))


BAD = [
    ("snip", {"num_samples": 0}, "compression.num_samples must be a whole number of at least 1"),
    ("grasp", {"num_samples": 2.5}, "compression.num_samples must be"),
    ("grasp", {"temperature": 0}, "compression.temperature must be a number above 0, got 0"),
    ("grasp", {"temperature": float("inf")}, "compression.temperature must be"),
    ("grasp", {"absolute": 1}, "compression.absolute must be true or false, got 1"),
    ("mag", {"scope": "row"}, "compression.scope must be global or layer, got 'row'"),
    ("synflow", {"rounds": 0}, "compression.rounds must be"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        prune(method, **options)


def broken(value):
    model = mlp()
    with torch.no_grad():
        for index in (0, 2, 4):
            model[index].bias.zero_()  # a bias is a source of its own
        model[2].weight.fill_(value)
    return model


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("snip", math.nan, "2.weight has initial weights that are not finite"),
        ("snip", 0.0, "compression=snip: every score is zero; 2.weight has no weights but zeros"),
        ("synflow", 0.0, "R through the model is 0.0; 2.weight has no weights but zeros"),
    ],
)
def test_a_model_without_scores_is_refused_and_unchanged(method, value, message):
    model = broken(value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=re.escape(message)):
        prune(method, model, structured="share")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert compression_of(model) is None


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("snip", {}, "compression=snip needs batches of data and a loss"),
        ("grasp", {"data": data()}, "compression=grasp needs batches of data and a loss"),
        ("synflow", {}, "compression=synflow needs a batch of data for the shape of an input"),
        ("snip", {"data": [], "loss": F.cross_entropy}, "data= holds no samples"),
    ],
)
def test_missing_data_is_said_in_one_line(method, given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        memfold.compress(mlp(), method, ratio=0.2, **given)


@pytest.mark.parametrize("budget", [1120, 1130])
def test_a_budget_is_met_where_fewer_values_need_a_larger_index(budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    memfold.compress(model, "mag", budget_bytes=budget, rounds=7)
    assert memfold.footprint(model).stored_bytes <= budget


@pytest.mark.parametrize("name", ["kept_values", "kept_counts", "kept_index", "kept_fingerprint"])
def test_a_model_that_uses_a_name_of_the_state_is_refused(name):
    model = mlp()
    model.register_buffer(name, torch.zeros(3))
    with pytest.raises(InputError, match=f"the model has an attribute {name}"):
        memfold.compress(model, "mag", ratio=0.3)
    assert compression_of(model) is None
