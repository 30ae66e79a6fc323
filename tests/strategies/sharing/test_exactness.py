"""What the mathematics promises: exact at ratio 1, exact gradients, no sensitivity to scale."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.compression import compression_of
from reference.sharing import explicit_map, sharing_matrices
from strategies.cases import SHARING, STRATEGIES

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4)).double()


BACKBONES = {
    "conv_net": (conv_net, (6, 2, 6, 6)),
    "transformer": (transformer, (6, 3, 8)),
}


def train(model, optimizer, shape, steps=20):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 4, shape[:1], generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sign", ["column", "run", "weight"])
@pytest.mark.parametrize("gradient_scale", ["length", "projection"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_ratio_one_trains_like_the_dense_model(backbone, optimizer, gradient_scale, sign):
    make, shape = BACKBONES[backbone]
    torch.manual_seed(0)
    dense = make()
    folded = memfold.compress(
        copy.deepcopy(dense), "stable_rps", ratio=1.0, gradient_scale=gradient_scale, sign=sign
    )
    expected = train(dense, OPTIMIZERS[optimizer](dense.parameters()), shape)
    found = train(folded, OPTIMIZERS[optimizer](folded.parameters()), shape)
    # Both take the same steps up to float64 rounding (1e-16), which 20 steps of training (and
    # Adam's division by small second moments) amplify.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        dict(memfold.densify(folded).named_parameters()),
        dict(dense.named_parameters()),
        rtol=1e-7,
        atol=1e-9,
    )


def small_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def weight_gradients(model, x):
    dense = memfold.densify(model)
    dense(x).square().sum().backward()
    return torch.cat([dense[0].weight.grad.flatten(), dense[2].weight.grad.flatten()])


@pytest.mark.parametrize("initial_scale", [None, 0.3])
@pytest.mark.parametrize("gradient_scale", ["length", "projection", "none"])
@pytest.mark.parametrize("strategy", SHARING)
def test_weights_and_gradient_equal_the_explicit_matrices(strategy, gradient_scale, initial_scale):
    model = memfold.compress(
        small_model(),
        strategy,
        ratio=0.3,
        gradient_scale=gradient_scale,
        initial_scale=initial_scale,
        **STRATEGIES[strategy].options,
    )
    shared = compression_of(model)
    signed = explicit_map(shared.mapping)
    scales = torch.cat(
        [
            torch.full((span.numel,), scale, dtype=torch.float64)
            for span, scale in zip(shared.mapping.spans, shared.scales, strict=True)
        ]
    )
    matrix, gamma = sharing_matrices(signed, scales, gradient_scale, initial_scale)

    weights = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    torch.testing.assert_close(weights, matrix @ shared.values)

    x = torch.randn(4, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = gamma * (matrix.T @ weight_gradients(model, x))
    torch.testing.assert_close(shared.values.grad, expected)

    if gradient_scale == "projection":
        projector = matrix @ torch.diag(gamma) @ matrix.T
        used = int((signed.abs().sum(0) > 0).sum())
        torch.testing.assert_close(projector @ projector, projector)
        torch.testing.assert_close(projector, projector.T)
        torch.testing.assert_close(projector.trace(), torch.tensor(float(used)).double())
        torch.testing.assert_close(projector @ matrix, matrix)


def sweep(strategy, gradient_scale, **options):
    """Losses of a short SGD training for each initial scale."""
    curves = []
    for scale in (0.004, 0.04, 1.0):
        torch.manual_seed(0)
        model = memfold.compress(
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).double(),
            strategy,
            ratio=0.2,
            gradient_scale=gradient_scale,
            initial_scale=scale,
            **options,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        curves.append(torch.tensor(train(model, optimizer, (6, 8), steps=8)))
    return curves


@pytest.mark.parametrize("gradient_scale", ["length", "projection"])
def test_the_initial_scale_changes_nothing_for_stable_rps(gradient_scale):
    curves = sweep("stable_rps", gradient_scale)
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-9, atol=1e-9)


def test_the_initial_scale_decides_the_fate_of_unscaled_roast():
    curves = sweep("roast", "none", tile_rows=2, tile_columns=3)
    torch.testing.assert_close(curves[0][0], curves[2][0])  # the same function at the start
    assert curves[2].max() < 3
    assert not curves[0].max() < 100  # the smallest scale diverges, or is NaN


@pytest.mark.parametrize("strategy", SHARING)
def test_initial_weights_keep_each_layers_scale(strategy):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 400))
    nn.init.normal_(model[0].weight, std=0.02)
    nn.init.normal_(model[1].weight, std=0.5)
    memfold.compress(model, strategy, ratio=0.1)
    for layer, std in ((model[0], 0.02), (model[1], 0.5)):
        # At least 6,000 normal values lie behind a layer: a standard error of 0.9 %.
        assert abs(layer.weight.std().item() / std - 1) < 0.05


@pytest.mark.parametrize("strategy", SHARING)
def test_first_and_second_derivatives(strategy):
    model = memfold.compress(
        small_model(),
        strategy,
        ratio=0.3,
        gradient_scale="none",
        initial_scale=1.0,
        **STRATEGIES[strategy].options,
    )
    shared = compression_of(model)
    x = torch.randn(2, 5, dtype=torch.float64)

    def output(values):
        return torch.func.functional_call(model, {"shared_values": values}, (x,))

    values = shared.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(output, values)
    assert torch.autograd.gradgradcheck(output, values)


def test_a_module_used_twice_in_one_pass_gets_both_gradients():
    torch.manual_seed(0)
    cell = nn.Linear(4, 4).double()
    model = memfold.compress(nn.Sequential(cell, nn.Tanh(), cell), "stable_rps", ratio=0.5)
    dense = memfold.densify(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).sum().backward()
    dense(x).sum().backward()
    shared = compression_of(model)
    expected = torch.zeros_like(shared.values)
    shared.mapping.scatter(
        dense[0].weight.grad.flatten(), shared.mapping.spans[0], shared.scales[0], expected
    )
    _, backward = shared.slot_factors(expected.device, expected.dtype)
    torch.testing.assert_close(shared.values.grad, expected * backward)


def test_weights_follow_the_values_whichever_way_they_change():
    model = memfold.compress(small_model(), "stable_rps", ratio=0.5)
    other = memfold.compress(small_model(), "stable_rps", ratio=0.5)
    with torch.no_grad():
        compression_of(other).values.mul_(3)
    x = torch.randn(2, 5, dtype=torch.float64)
    held = [model(x)]  # keeps the old passes' graphs, and their weights, alive
    values = compression_of(model).values
    for change in (
        lambda: values.data.mul_(2),
        lambda: values.detach().add_(0.1),
        lambda: model.load_state_dict(other.state_dict()),
        lambda: model.load_state_dict(small_half(other), assign=True),
    ):
        change()
        held.append(model(x))
        torch.testing.assert_close(held[-1], memfold.densify(model)(x))
        assert not torch.allclose(held[-1], held[-2])


def small_half(model):
    state = model.state_dict()
    state["shared_values"] = state["shared_values"] / 2
    return state


def test_gradient_accumulation_and_checkpointed_activations():
    from torch.utils.checkpoint import checkpoint

    model = memfold.compress(small_model(), "stable_rps", ratio=0.4)
    x = torch.randn(4, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = compression_of(model).values.grad.clone()
    for use_reentrant in (True, False):
        model.zero_grad()
        for half in (x[:2], x[2:]):
            half = half.clone().requires_grad_()
            checkpoint(model, half, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(compression_of(model).values.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).to(dtype)
    memfold.compress(model, "stable_rps", ratio=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(64, 8, dtype=dtype)
    y = (x.sum(1) > 0).long()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert compression_of(model).values.dtype == dtype


def test_autocast_and_no_grad():
    model = memfold.compress(small_model().float(), "stable_rps", ratio=0.4)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().sum().backward()
    assert compression_of(model).values.grad.isfinite().all()
    with torch.no_grad():
        plain = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    assert not plain.requires_grad
