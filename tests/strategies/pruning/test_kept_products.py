"""Products with sparse weights that are never built."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memfold
from memfold.benchmarking.measuring import saved_bytes
from memfold.compression import compression_of
from memfold.strategies.pruning.product_costs import Product
from memfold.strategies.pruning.products import KeptProduct
from memfold.strategies.pruning.sparse_weights import SparseWeights
from strategies.product_models import MODELS, batch, loss_of, results
from strategies.pruning.dynamic_networks import (
    batches,
    dense_tensors,
    momentum_sgd,
    network,
    sparse_of,
    take_steps,
)

# Products in training and in evaluation, where a fused kernel takes the encoder layer's weights.
PRODUCTS = {"encoder": 3 + 1, "perceptron": 2 + 2, "pointwise": 4 + 4, "tied": 2 + 2}


def make(name, linear, ratio=0.3, dtype=torch.float64, strategy="mag"):
    torch.manual_seed(4)
    model = MODELS[name]().to(dtype)
    return memfold.compress(model, strategy, ratio=ratio, linear=linear)


@pytest.fixture
def products(monkeypatch):
    """Numbers of the weights that were multiplied with and not built."""
    taken = []
    product = SparseWeights.product

    def watched(self, index, inputs):
        found = product(self, index, inputs)
        taken.extend([index] if found is not None else [])
        return found

    monkeypatch.setattr(SparseWeights, "product", watched)
    return taken


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 11),
    shape=st.sampled_from([(), (0,), (1,), (3,), (8,), (19,), (2, 5)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1 << 20),
)
def test_equals_the_product_with_the_built_weight(rows, columns, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(rows * columns, generator=generator) < density
    positions = mask.nonzero().squeeze(1)
    x, values = normal(*shape, columns).requires_grad_(), normal(len(positions)).requires_grad_()
    weight = values.new_zeros(rows * columns).index_copy(0, positions, values).view(rows, columns)
    expected = nn.functional.linear(x, weight)
    found = KeptProduct.apply(x, values, positions, rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradient = normal(*expected.shape)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, values), gradient),
        torch.autograd.grad(expected, (x, values), gradient),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_compute_what_they_compute_with_built_weights(name, ratio, products):
    expected = results(make(name, "weight", ratio))
    assert products == []
    found = results(make(name, "kept", ratio))
    assert len(products) == PRODUCTS[name]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_single_precision():
    expected = results(make("perceptron", "weight", dtype=torch.float32))
    found = results(make("perceptron", "kept", dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_built_in_training_nor_in_evaluation(monkeypatch):
    def fail(*_):
        raise AssertionError("a weight was built")

    model = make("perceptron", "kept")
    monkeypatch.setattr(SparseWeights, "weight", fail)
    results(model)


def test_a_forward_pass_saves_activations_alone():
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    saved = {}
    for linear in ("weight", "kept"):
        one = memfold.compress(copy.deepcopy(model), "mag", ratio=0.1, linear=linear)
        x = torch.randn(4, 64, requires_grad=True)
        there = [x, *one.parameters(), *compression_of(one).positions]
        saved[linear] = saved_bytes(lambda one=one, x=x: one(x), there)
    hidden, second_weight = 4 * 4 * 96, 4 * 96 * 32
    assert saved["kept"] == hidden
    assert saved["weight"] > second_weight


def test_second_derivatives():
    found = []
    for linear in ("kept", "weight"):
        model, x = make("perceptron", linear), batch().requires_grad_()
        values = compression_of(model).values(0)
        first = torch.autograd.grad(loss_of(model(x)), [values, x], create_graph=True)
        (first[0].square().sum() + first[1].square().sum()).backward()
        found.append((values.grad, x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_frozen_values_and_inputs_without_gradient():
    expected = results(make("perceptron", "weight"))
    frozen, x = make("perceptron", "kept"), batch().requires_grad_()
    for index in range(2):
        compression_of(frozen).values(index).requires_grad_(False)
    loss_of(frozen(x)).backward()
    torch.testing.assert_close(x.grad, expected["input"])
    alone = make("perceptron", "kept")
    loss_of(alone(batch())).backward()
    assert torch.allclose(alone[1].weight_values.grad, expected["1.weight_values"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_builds_the_weight(dtype, products):
    model = make("perceptron", "kept", dtype=dtype)
    found = results(model, autocast=dtype == torch.float32)
    assert found["output"].dtype == torch.bfloat16
    assert products == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_traces_build_the_weight(products):
    x, found = batch(), []
    for linear in ("weight", "kept"):
        model = make("perceptron", linear)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def function(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,))

        mapped = torch.func.vmap(lambda row, f=function, p=parameters: f(p, row[None]))(x)
        of_values = torch.func.jvp(lambda p, f=function: f(p, x), (parameters,), (parameters,))
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            of_inputs = torch.autograd.forward_ad.unpack_dual(dual)
            found.append((mapped, *of_values, of_inputs.primal, of_inputs.tangent))
        found[-1] += (torch.jit.trace(model, x, check_trace=False)(2 * x),)
    assert products == []
    torch.testing.assert_close(found[0], found[1])


def test_a_functional_call_multiplies_with_the_values_that_it_gives(products):
    model, x = make("perceptron", "kept"), batch()
    halved = {n: (p / 2).detach().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, halved, (x,)).sum().backward()
    assert products == [0, 1]
    assert all(p.grad is not None for p in halved.values())


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_connections_move_as_with_built_weights(name, products):
    data, moved = batches(30), []
    for linear in ("weight", "kept"):
        net = network(name, update_every=4, fraction=0.5, end=0.8, linear=linear)
        before = sparse_of(net).masks()
        take_steps(net, momentum_sgd(net), data)
        assert not torch.equal(sparse_of(net).masks()[0], before[0])
        moved.append(dense_tensors(net))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-9)
    # Where gradients of dense weights decide, these are built in the steps that move something.
    num_built = 0 if name == "set" else sparse_of(net).structure_version
    assert len(products) == 2 * (30 - num_built)


def test_a_graph_does_not_go_on_with_values_that_have_moved():
    model, x = make("perceptron", "kept"), batch().requires_grad_()
    loss, sparse = loss_of(model(x)), compression_of(model)
    sparse.set_masks([mask.flip(0) for mask in sparse.masks()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_evaluation_finds_the_columns_once_until_positions_move():
    model, x = make("perceptron", "kept").eval(), batch()
    sparse = compression_of(model)
    with torch.no_grad():
        model(x)
        known = dict(sparse._layouts)
        model(x)
        assert all(sparse._layouts[index] is known[index] for index in (0, 1))
        sparse.set_masks([mask.flip(0) for mask in sparse.masks()])
        expected = memfold.densify(model)(x)
        torch.testing.assert_close(model(x), expected)
    model(x)
    for let_go in (lambda: memfold.release(model), lambda: model.train()(x)):
        with torch.no_grad():
            model.eval()(x)
            model[1].weight  # noqa: B018  another reader, for whom it is built and kept
        assert sparse._layouts
        assert sparse._kept._kept
        let_go()
        assert not sparse._layouts
        assert not sparse._kept._kept
    assert not compression_of(copy.deepcopy(model))._layouts


def test_auto_does_without_the_weight_where_it_is_large_and_sparse():
    def is_kept(side, density, batch, *, trains=True, lasts=False):
        product = Product(side, side, int(density * side**2), batch, trains, lasts)
        return product.is_cheaper_kept()

    for batch_size in (1, 16, 128, 1024):
        assert is_kept(4096, 0.03, batch_size)
        assert is_kept(4096, 0.03, batch_size, trains=False, lasts=True)
        assert not is_kept(4096, 0.5, batch_size)
        assert not is_kept(4096, 1.0, batch_size, trains=False, lasts=True)
        assert not is_kept(64, 0.01, batch_size)


def test_auto_takes_what_it_says_is_cheaper(products, monkeypatch):
    for cheaper in (True, False):
        monkeypatch.setattr(Product, "is_cheaper_kept", lambda _, cheaper=cheaper: cheaper)
        results(make("perceptron", "auto"))
        assert bool(products) is cheaper
        products.clear()


def test_bad_options_are_refused():
    with pytest.raises(memfold.InputError, match="auto, weight or kept"):
        memfold.compress(nn.Linear(3, 3), "mag", linear="csr")
