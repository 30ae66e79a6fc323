"""Layers that multiply with a weight which is never built, inside whole models."""

import copy

import pytest
import torch
from torch import nn

import memfold
from memfold.compression import compression_of
from memfold.strategies.sharing.products import RowProducts
from memfold.strategies.sharing.slot_source import SlotSource
from strategies.product_models import MODELS, batch, loss_of, results

# Products in training and in evaluation, where a fused kernel takes the encoder layer's weights.
PRODUCTS = {"encoder": 3 + 1, "perceptron": 2 + 2, "pointwise": 4 + 4, "tied": 2 + 2}


def make(name, linear, ratio=0.1, dtype=torch.float64, **options):
    torch.manual_seed(4)
    model = MODELS[name]().to(dtype)
    return memfold.compress(model, "stable_rps", ratio=ratio, linear=linear, **options)


@pytest.fixture
def products(monkeypatch):
    """Methods of the products that were taken in forward passes."""
    taken = []
    product = RowProducts.product

    def watched(self, prepared, x, factor, method):
        taken.append(method)
        return product(self, prepared, x, factor, method)

    monkeypatch.setattr(RowProducts, "product", watched)
    return taken


@pytest.mark.parametrize("sign", ["column", "run"])
@pytest.mark.parametrize("align_rows", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("linear", ["windows", "correlation"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_way_gives_the_outputs_and_gradients_of_the_built_weight(
    name, linear, ratio, align_rows, sign, products
):
    options = {"ratio": ratio, "align_rows": align_rows, "sign": sign}
    expected = results(make(name, "weight", **options))
    assert products == []
    found = results(make(name, linear, **options))
    assert products == [linear] * PRODUCTS[name]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("linear", ["windows", "correlation"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_single_precision_and_autocast(name, linear):
    expected = results(make(name, "weight", dtype=torch.float32))
    found = results(make(name, linear, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lowered = results(make(name, linear, dtype=torch.float32), autocast=True)
    built = results(make(name, "weight", dtype=torch.float32), autocast=True)
    assert lowered["output"].dtype == built["output"].dtype == torch.bfloat16
    for key, tensor in expected.items():
        scale = float(tensor.abs().max())
        # Both lose what bfloat16 loses, in another order.
        assert (lowered[key].float() - tensor).abs().max() < 0.05 * scale, key
        assert (lowered[key].float() - built[key].float()).abs().max() < 0.05 * scale, key


@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_nothing_is_built_in_training_nor_in_evaluation(linear, monkeypatch):
    def fail(*arguments):
        raise AssertionError("a weight was built")

    model = make("perceptron", linear)
    monkeypatch.setattr(SlotSource, "read", fail)
    results(model)


@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_second_derivatives(linear):
    found = []
    for way in (linear, "weight"):
        model, x = make("perceptron", way), batch().requires_grad_()
        values = compression_of(model).values
        first = torch.autograd.grad(loss_of(model(x)), [values, x], create_graph=True)
        (first[0].square().sum() + first[1].square().sum()).backward()
        found.append((values.grad, x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_frozen_values_and_inputs_without_gradient(linear):
    model = make("perceptron", linear)
    expected = results(model)
    frozen = make("perceptron", linear)
    compression_of(frozen).values.requires_grad_(False)
    x = batch().requires_grad_()
    loss_of(frozen(x)).backward()
    assert compression_of(frozen).values.grad is None
    torch.testing.assert_close(x.grad, expected["input"])
    alone = make("perceptron", linear)
    loss_of(alone(batch())).backward()
    torch.testing.assert_close(compression_of(alone).values.grad, expected["shared_values"])


def test_the_gradient_of_phi_keeps_m_numbers_and_no_more():
    model = make("perceptron", "windows")
    results(model)
    gradient = compression_of(model).values.grad
    assert gradient.untyped_storage().nbytes() == gradient.nbytes


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"sign": "weight"}, torch.float32), ({"autograd": "classic"}, torch.float32)],
)
def test_auto_builds_where_rows_are_no_windows(options, dtype, products):
    model = make("perceptron", "auto", dtype=dtype, **options)
    results(model)
    assert products == []


def test_half_precision_models_build_their_weights(products):
    model = make("perceptron", "windows", dtype=torch.bfloat16)
    assert results(model)["output"].dtype == torch.bfloat16
    assert products == []


def test_a_padding_row_is_no_window(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=2), nn.Flatten(), nn.Linear(16, 3))
    model = memfold.compress(model, "stable_rps", ratio=0.2, linear="windows")
    tokens = torch.tensor([[2, 3], [4, 2]])
    model(tokens).sum().backward()
    assert products == ["windows"]
    assert not memfold.densify(model)[0].weight[2].any()


def test_a_copied_model_multiplies_on_its_own(products):
    model = make("perceptron", "windows")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        compression_of(copied).values.mul_(2)
    assert not torch.allclose(model(batch()), copied(batch()))
    assert products == ["windows"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear": "fft"}, "auto, weight, windows or correlation"),
        ({"linear": "windows", "sign": "weight"}, "compression.sign=column or run"),
        ({"align_rows": "yes"}, "true or false"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(nn.Linear(3, 3), "stable_rps", **options)


@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_outputs_are_laid_out_like_those_of_the_dense_layer(linear):
    dense = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1))
    model = memfold.compress(copy.deepcopy(dense), "stable_rps", ratio=0.2, linear=linear)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 3, 5).to(memory_format=layout)
        assert model(x).stride() == dense(x).stride()
    linear_layer = memfold.compress(nn.Sequential(nn.Linear(6, 4)), "stable_rps", linear=linear)
    scale = nn.Parameter(torch.ones(4))
    for network, shape in ((model, (2, 6, 3, 4)), (linear_layer, (3, 2, 6))):
        with torch.no_grad():
            features = network(torch.randn(shape))
        features.mul_(scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_inputs_that_are_no_plain_tensors_build_the_weight(linear, products):
    model = make("perceptron", linear)[1]
    rows = torch.randn(3, 48, dtype=torch.float64)
    expected = rows @ model.weight.T
    with torch.no_grad():
        torch.testing.assert_close(model(rows.to_sparse()), expected + model.bias)
    assert products == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("linear", ["windows", "correlation"])
def test_tangents_of_inputs_go_through_the_built_weight(linear, products):
    found = []
    for way in ("weight", linear):
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            inputs = torch.autograd.forward_ad.make_dual(batch(), torch.ones_like(batch()))
            outputs = torch.autograd.forward_ad.unpack_dual(make("perceptron", way)(inputs))
            found.append((outputs.primal, outputs.tangent))
    torch.testing.assert_close(found[0], found[1])
    assert products == []


def test_a_backward_pass_for_inputs_alone_makes_no_buffer():
    model, x = make("perceptron", "correlation"), batch().requires_grad_()
    output = loss_of(model(x))
    torch.autograd.grad(output, [x], retain_graph=True)
    sources = [output.grad_fn]
    seen = []
    while sources:
        node = sources.pop()
        seen += [node.options[0]] if hasattr(node, "options") else []
        sources += [after for after, _ in node.next_functions if after is not None]
    assert seen
    assert all(not source._doubled and not source._gradients for source in seen)
