"""Scores against their definitions: explicit masks, closed forms, finite differences, paths."""

import copy
import random
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memfold.errors import InputError
from memfold.strategies.pruning.masks import keep_largest, schedule_counts
from memfold.strategies.pruning.scoring import (
    check_scores,
    first_input,
    grasp_scores,
    snip_scores,
    synflow_scores,
    take_samples,
)
from memfold.strategies.selection import select_weights
from reference.pruning import linear_flows, mask_sensitivities, squared_gradient_norm
from strategies.models import MODELS, build, make_input


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(5, 3),
    )


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


CASES = {"conv_net": (conv_net, (2, 6, 6)), "transformer": (transformer, (3, 8))}


def batches_of(shape, sizes=(7, 7, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), *shape, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def joined(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def named(model):
    return {weight.name: weight.tensor for weight in select_weights(model)}


def mlp(*widths, bias=False):
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("case", sorted(CASES))
def test_snip_is_the_gradient_of_an_explicit_mask(case):
    make, shape = CASES[case]
    model = make().double()
    batches = batches_of(shape)
    scores = snip_scores(model, named(model), batches, F.cross_entropy)
    model.eval()
    expected = mask_sensitivities(model, list(named(model)), *joined(batches), F.cross_entropy)
    # Sums over batches and over all samples differ by float64 rounding.
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-14)


def test_snip_of_a_linear_model_has_a_closed_form():
    model = nn.Linear(4, 1, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(9, 5, generator=generator).double().split([4, 1], dim=1)
    scores = snip_scores(model, named(model), [(x, targets)], F.mse_loss)
    theta = model.weight.detach()
    expected = (theta * (2 / 9 * (x @ theta.T - targets).T @ x)).abs()
    torch.testing.assert_close(scores[0], expected)


def quadratic(size=5):
    torch.manual_seed(0)
    root = torch.randn(size, size, dtype=torch.float64)
    matrix = root @ root.T
    theta = nn.Linear(size, 1, bias=False).double()  # its output for the identity is theta
    return matrix, theta


def test_grasp_of_a_quadratic_is_theta_times_a_squared_theta():
    matrix, model = quadratic()

    def loss(output, target):
        return 0.5 * output.flatten() @ target @ output.flatten()

    inputs = torch.eye(5, dtype=torch.float64)
    scores = grasp_scores(model, named(model), [(inputs, matrix)], loss, temperature=1.0)
    theta = model.weight.detach().flatten()
    torch.testing.assert_close(scores[0].flatten(), theta * (matrix @ matrix @ theta))


@pytest.mark.parametrize("case", sorted(CASES))
def test_grasp_is_the_change_of_the_squared_gradient_norm(case):
    make, shape = CASES[case]
    model = make().double()
    parameters = named(model)
    batches = batches_of(shape)
    scores = grasp_scores(model, parameters, batches, F.cross_entropy, temperature=2.0)
    model.eval()
    step = 1e-5
    rng = random.Random(0)
    for name, score in zip(parameters, scores, strict=True):
        index = rng.randrange(score.numel())
        norms = []
        for scale in (1 + step, 1 - step):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.get_parameter(name).view(-1)[index] *= scale
            norms.append(
                squared_gradient_norm(
                    moved, list(parameters), *joined(batches), F.cross_entropy, 2.0
                )
            )
        # d||g||^2 along theta_q is 2 theta_q (H g)_q; central differences err by O(step^2).
        found = (norms[0] - norms[1]) / (2 * step) / 2
        assert found == pytest.approx(float(score.view(-1)[index]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("score", [snip_scores, grasp_scores])
def test_batching_changes_nothing(score, case):
    make, shape = CASES[case]
    model = make().double()
    inputs, targets = joined(batches_of(shape))
    whole = score(model, named(model), [(inputs, targets)], F.cross_entropy)
    for sizes in ([1] * 20, [13, 7]):
        parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        found = score(model, named(model), parts, F.cross_entropy)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-16)


def test_temperature_divides_the_logits():
    model = conv_net().double()
    batches = batches_of((2, 6, 6))
    hot = grasp_scores(model, named(model), batches, F.cross_entropy)

    def loss(output, target):
        return F.cross_entropy(output / 200, target)

    cold = grasp_scores(model, named(model), batches, loss, temperature=1.0)
    torch.testing.assert_close(hot, cold, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["snip", "synflow"])
def test_scores_do_not_depend_on_how_scale_is_split_between_layers(kind):
    torch.manual_seed(0)
    model = mlp(6, 9, 4, 3).double()
    batches = batches_of((6,))

    def scores():
        if kind == "synflow":
            return synflow_scores(model, named(model), batches[0][0])
        return snip_scores(model, named(model), batches, F.cross_entropy)

    before = scores()
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.div_(8)
    torch.testing.assert_close(scores(), before)


def test_synflow_is_the_flow_over_all_paths_and_is_conserved():
    torch.manual_seed(0)
    model = mlp(3, 4, 5, 2).double()
    scores = synflow_scores(model, named(model), torch.randn(7, 3))
    total, expected = linear_flows([p.detach() for p in named(model).values()])
    torch.testing.assert_close(scores, expected)
    for score in scores:
        assert score.sum().item() == pytest.approx(total)
    for left, right in pairwise(scores):
        torch.testing.assert_close(left.sum(1), right.sum(0))  # what enters a unit leaves it


def test_synflow_with_biases_conserves_the_flow_from_every_layer_on():
    torch.manual_seed(0)
    model = mlp(3, 4, 5, 2, bias=True).double()
    parameters = dict(model.named_parameters())
    scores = dict(zip(parameters, synflow_scores(model, parameters, torch.ones(1, 3)), strict=True))
    state = {name: p.detach().abs() for name, p in parameters.items()}
    flow = torch.func.functional_call(model, state, (torch.ones(1, 3).double(),)).sum()
    for layer in (0, 2, 4):
        biases = sum(scores[f"{k}.bias"].sum() for k in (0, 2, 4) if k >= layer)
        torch.testing.assert_close(scores[f"{layer}.weight"].sum() + biases, flow)


def test_synflow_is_conserved_through_attention_norms_and_embeddings():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.layer = nn.TransformerEncoderLayer(
                8, 2, 12, dropout=0.0, activation="relu", batch_first=True, bias=False
            )
            self.head = nn.Linear(8, 3, bias=False)

        def forward(self, tokens):
            return self.head(self.layer(self.embedding(tokens)).mean(1)).softmax(-1)

    torch.manual_seed(0)
    model = Tokens().double()
    tokens = torch.tensor([[1, 5, 5, 2]])
    parameters = named(model)
    scores = dict(zip(parameters, synflow_scores(model, parameters, tokens), strict=True))
    other = synflow_scores(model, parameters, torch.tensor([[7, 0, 3, 3]]))
    torch.testing.assert_close(list(scores.values()), other)
    torch.testing.assert_close(scores["embedding.weight"].sum(), scores["head.weight"].sum())
    # Queries, keys and values carry a third each of the flow through the output projection.
    for part in scores["layer.self_attn.in_proj_weight"].chunk(3):
        torch.testing.assert_close(3 * part.sum(), scores["layer.self_attn.out_proj.weight"].sum())
    assert (scores["embedding.weight"] > 0).all()


@pytest.mark.parametrize(
    ("rounds", "expected"), [(100, [1, 1, 1, 1]), (1, None)], ids=["iterative", "single shot"]
)
def test_critical_compression(rounds, expected):
    torch.manual_seed(0)
    model = mlp(50, 100, 100, 100, 10)
    parameters = named(model)
    total = sum(p.numel() for p in parameters.values())
    earlier = [torch.ones_like(p, dtype=torch.bool) for p in parameters.values()]
    for count in schedule_counts(total, 4, rounds, "exponential"):
        masks = keep_largest(synflow_scores(model, parameters, torch.ones(1, 50)), count)
        assert sum(int(mask.sum()) for mask in masks) == count
        with torch.no_grad():
            for parameter, mask in zip(parameters.values(), masks, strict=True):
                parameter.mul_(mask)
        earlier = masks
    counts = [int(mask.sum()) for mask in earlier]
    if expected:
        assert counts == expected
    else:
        assert 0 in counts


def everything(model):
    """All that scoring must leave as it is."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [
            (p.requires_grad, p.grad if p.grad is None else p.grad.clone(), p.data_ptr())
            for p in model.parameters()
        ],
        torch.get_rng_state(),
    )


def assert_same(found, expected):
    assert found[1] == expected[1]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    for (trains, grad, place), (trained, old, old_place) in zip(found[2], expected[2], strict=True):
        assert trains == trained
        assert place == old_place
        assert (grad is None and old is None) or torch.equal(grad, old)
    assert torch.equal(found[3], expected[3])


SCORERS = {
    "snip": lambda model, batches, loss: snip_scores(model, named(model), batches, loss),
    "grasp": lambda model, batches, loss: grasp_scores(model, named(model), batches, loss),
    "synflow": lambda model, batches, loss: synflow_scores(model, named(model), batches[0][0]),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_the_model_is_not_touched(kind, fails):
    model = conv_net()
    model[1].eval()
    model[8].bias.requires_grad_(False)
    batches = batches_of((2, 6, 6), dtype=torch.float32)
    model(batches[0][0]).square().sum().backward()
    if fails:
        with torch.no_grad():
            model[4].weight[0, 0] = torch.nan
    before = everything(model)
    if fails:
        with pytest.raises(InputError, match=r"not finite|is nan"):
            SCORERS[kind](model, batches, F.cross_entropy)
    else:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            SCORERS[kind](model, batches, F.cross_entropy)
    assert_same(everything(model), before)


def test_random_layers_and_loaders_leave_the_global_generator_alone():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(6, 3), Noise())
    dataset = torch.utils.data.TensorDataset(*joined(batches_of((6,), dtype=torch.float32)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    batches, loss = take_samples("snip", loader, F.cross_entropy, num_samples=10)
    snip_scores(model, named(model), batches, loss)
    first_input("synflow", loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_half_precision_is_scored_in_full(kind, dtype):
    half = conv_net().to(dtype)
    full = copy.deepcopy(half).float()
    batches = batches_of((2, 6, 6), dtype=dtype)
    found = SCORERS[kind](half, batches, F.cross_entropy)
    expected = SCORERS[kind](full, [(x.float(), y) for x, y in batches], F.cross_entropy)
    assert found[0].dtype == (torch.float64 if kind == "synflow" else torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_every_kind_of_model(kind, name):
    model, x = build(name), make_input(name)
    if name == "zero_head" and kind != "grasp":
        with pytest.raises(InputError, match=r"2\.weight has no weights but zeros"):
            SCORERS[kind](model, [(x, x)], lambda output, _: output.square().mean())
        return

    def loss(output, target):
        del target
        return (output + 0.1).square().mean()

    scores = SCORERS[kind](model, [(x, x)], loss)
    for score, parameter in zip(scores, named(model).values(), strict=True):
        assert score.shape == parameter.shape
        assert score.isfinite().all()
        if kind == "synflow" and not name.startswith("weight_norm"):
            assert score.any()


def test_tied_parameters_that_are_different_objects_count_as_one():
    torch.manual_seed(0)
    model = mlp(4, 4, 4).double()
    tied = copy.deepcopy(model)
    model[2].weight = model[0].weight
    tied[0].weight.data = model[0].weight.detach().clone()
    tied[2].weight = nn.Parameter(tied[0].weight.detach())
    assert tied[2].weight is not tied[0].weight
    batches = [(x, y) for x, y in batches_of((4,))]
    for kind in SCORERS:
        torch.testing.assert_close(
            SCORERS[kind](tied, batches, F.cross_entropy),
            SCORERS[kind](model, batches, F.cross_entropy),
        )


def test_unused_parameters_score_zero():
    model = nn.Sequential(nn.Linear(6, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    batches = batches_of((6,), dtype=torch.float32)
    for kind in SCORERS:
        unused, used = SCORERS[kind](model, batches, F.cross_entropy)
        assert not unused.any()
        assert used.any()


def test_samples_are_cut_and_read_no_further_than_needed():
    read = []

    def data():
        for size in (4, 4, 4):
            read.append(size)
            yield torch.ones(size, 2), torch.arange(size)

    batches, _ = take_samples("snip", data(), F.cross_entropy, num_samples=6)
    assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == [4, 2]
    assert len(read) == 2
    assert len(take_samples("snip", data(), F.cross_entropy, num_samples=99)[0]) == 3
    assert first_input("synflow", data()).shape == (1, 2)


BATCH = [(torch.ones(2, 3), torch.zeros(2))]
NO_SAMPLES = [
    (None, F.mse_loss, "compression=snip needs batches of data and a loss: memfold.compress(..."),
    (BATCH, None, "compression=snip needs batches of data and a loss"),
    ([], F.mse_loss, "compression=snip: data= holds no samples"),
    ([(torch.ones(0, 3), torch.ones(0))], F.mse_loss, "holds no samples"),
    ([torch.ones(2, 3)], F.mse_loss, "must give batches (input, target) of two tensors"),
    ([{"x": 1}], F.mse_loss, "of two tensors, got dict"),
]


@pytest.mark.parametrize(("data", "loss", "message"), NO_SAMPLES)
def test_samples_that_are_no_samples(data, loss, message):
    with pytest.raises(InputError, match=re.escape(message)):
        take_samples("snip", data, loss, num_samples=4)


def test_one_line_for_scores_that_say_nothing():
    model = mlp(3, 4, 2)
    parameters = named(model)
    with pytest.raises(InputError, match=r"scores of 2\.weight are not finite"):
        check_scores("mag", parameters, [torch.ones(4, 3), torch.tensor([[torch.inf]])])
    with pytest.raises(InputError, match="every score is zero; nothing passes"):
        snip_scores(model, parameters, BATCH, lambda output, target: output.sum() * 0)
    with pytest.raises(InputError, match="one element"):
        snip_scores(model, parameters, BATCH, lambda output, target: output)
    with pytest.raises(InputError, match="needs a batch of data for the shape"):
        first_input("synflow", None)
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(InputError, match=r"R through the model is 0\.0; 0\.weight has no weights"):
        synflow_scores(model, parameters, BATCH[0][0])
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        model[2].weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"R .* is inf; look at the weights of 2\.weight"):
        synflow_scores(model, parameters, BATCH[0][0])
