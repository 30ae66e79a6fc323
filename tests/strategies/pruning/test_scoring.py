"""Scores against their definitions: explicit masks, closed forms, finite differences, paths."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memfold.strategies.pruning.masks import keep_largest, schedule_counts
from memfold.strategies.pruning.scoring import grasp_scores, snip_scores, synflow_scores
from reference.pruning import linear_flows, mask_sensitivities, squared_gradient_norm
from strategies.pruning.scorers import (
    CASES,
    SCORERS,
    batches_of,
    conv_net,
    joined,
    mlp,
    named,
)


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
    scores = grasp_scores(model, parameters, batches, F.cross_entropy, temperature=2.0, seed=4)
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
                squared_gradient_norm(moved, list(parameters), batches, F.cross_entropy, 2.0, 4)
            )
        # d||g||^2 along theta_q is 2 theta_q (H g)_q; central differences err by O(step^2).
        found = (norms[0] - norms[1]) / (2 * step) / 2
        assert found == pytest.approx(float(score.view(-1)[index]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", ["snip conv_net", "snip transformer", "grasp mlp"])
def test_batching_changes_nothing(case):
    kind, name = case.split()
    make, shape = CASES.get(name, (lambda: mlp(6, 9, 3, bias=True), (6,)))
    model = make().double()
    inputs, targets = joined(batches_of(shape))
    whole = SCORERS[kind](model, [(inputs, targets)], F.cross_entropy)
    for sizes in ([1] * 20, [13, 7]):
        parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        found = SCORERS[kind](model, parts, F.cross_entropy)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("kind", ["snip", "grasp"])
def test_batch_norm_is_in_the_mode_in_which_the_authors_score(kind):
    model = conv_net().double()
    batches = batches_of((2, 6, 6))

    def change(statistics):
        before = SCORERS[kind](model, batches, F.cross_entropy)
        torch.nn.init.uniform_(statistics, 1, 2)
        after = SCORERS[kind](model, batches, F.cross_entropy)
        return not all(torch.equal(b, a) for b, a in zip(before, after, strict=True))

    # GraSP trains: what a fresh network has never measured plays no part.
    assert change(model[1].running_var) == (kind == "snip")
    assert change(model[1].running_mean) == (kind == "snip")


@pytest.mark.parametrize("kind", sorted(SCORERS))
def test_the_mode_of_the_model_and_the_global_generator_play_no_part(kind):
    model = conv_net().double()
    batches = batches_of((2, 6, 6))
    found = []
    for is_training in (True, False):
        torch.manual_seed(int(is_training))
        found.append(SCORERS[kind](model.train(is_training), batches, F.cross_entropy))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_dropout_while_scoring_draws_from_the_seed():
    model = conv_net().double()
    first, again, other = (
        grasp_scores(model, named(model), batches_of((2, 6, 6)), F.cross_entropy, seed=seed)
        for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[-1], other[-1])


def test_no_batch_sees_what_another_has_left_in_buffers():
    class Fading(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            self.gain *= 0.5 if self.training else 1.0
            return self.gain * x

    torch.manual_seed(0)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    batches = batches_of((6,))
    fading = nn.Sequential(*layers, Fading()).double()
    found = grasp_scores(fading, named(fading), batches, F.cross_entropy, temperature=200.0)
    plain = nn.Sequential(*layers).double()
    expected = grasp_scores(plain, named(plain), batches, F.cross_entropy, temperature=400.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert fading[3].gain == 1


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
