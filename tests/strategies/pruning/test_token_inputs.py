"""What is scored, replaced and measured in language models, against their definitions."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfold
from memfold.backbones.gpt import GPT
from memfold.backbones.lstm import LSTM
from memfold.compression import compression_of
from memfold.data.spec import IGNORED, DataSpec, NextToken, Tokens
from memfold.strategies.pruning.health import measure
from memfold.strategies.pruning.scoring import grasp_scores, snip_scores, synflow_scores
from memfold.strategies.pruning.sparse_weights import SparseWeights
from memfold.tasks import LanguageModelling
from memfold.tasks.distillation import Distillation
from reference import distillation as distilling
from reference import dynamic
from strategies.pruning.scorers import named

V, LENGTH, WIDTH = 7, 5, 4
SPEC = DataSpec(Tokens(V, LENGTH), NextToken(V))
TASK = LanguageModelling(SPEC, label_smoothing=0.0)


def sample(seed: int = 0, size: int = 3) -> tuple[Tensor, Tensor]:
    """Return tokens and the next ones, of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (2, size, LENGTH), generator=generator)
    return tokens, targets.masked_fill(
        torch.rand(targets.shape, generator=generator) < 0.3, IGNORED
    )


def gpt(**options: object) -> GPT:
    torch.manual_seed(0)
    return GPT(V, LENGTH, width=WIDTH, depth=1, num_heads=2, **options).double()  # type: ignore


def written_out(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax over the tokens that count, one by one."""
    rows = [
        logits[i, j, target] - logits[i, j].exp().sum().log()
        for i, row in enumerate(targets.tolist())
        for j, target in enumerate(row)
        if target != IGNORED
    ]
    return -torch.stack(rows).mean()


@pytest.mark.parametrize("tied_head", [True, False])
def test_snip_is_weight_times_gradient_of_the_language_modelling_loss(tied_head: bool) -> None:
    net, (tokens, targets) = gpt(tied_head=tied_head), sample()
    found = snip_scores(net, named(net), [(tokens, targets)], TASK.loss)
    net.eval()
    gradients = torch.autograd.grad(written_out(net(tokens), targets), list(named(net).values()))
    for score, weight, gradient in zip(found, named(net).values(), gradients, strict=True):
        torch.testing.assert_close(score, (weight * gradient).abs().detach())


def test_grasp_is_weight_times_the_product_of_hessian_and_gradient() -> None:
    net, (tokens, targets) = gpt(), sample()
    found = grasp_scores(net, named(net), [(tokens, targets)], TASK.loss, temperature=2.0)
    weights = list(named(net).values())
    # Without fused attention, which has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = written_out(net(tokens) / 2.0, targets)
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    aligned = sum((g * g.detach()).sum() for g in gradients)
    assert isinstance(aligned, Tensor)
    for score, weight, product in zip(
        found, weights, torch.autograd.grad(aligned, weights), strict=True
    ):
        torch.testing.assert_close(score, (weight * product).detach(), rtol=1e-6, atol=1e-12)


def test_synflow_enters_perceptrons_at_the_output_of_the_embedding() -> None:
    """Every token is the mean row of |E|, which is scored as the first layer of the pipes."""
    torch.manual_seed(0)
    layers = (nn.Embedding(V, 4), nn.Linear(4, 3, bias=False), nn.ReLU())
    net = nn.Sequential(*layers, nn.Linear(3, V, bias=False)).double()
    rows, first, second = (parameter.detach().abs() for parameter in net.parameters())
    entering = rows.mean(0)
    leaving = torch.ones(V).double()
    expected = [
        rows / V * (leaving @ second @ first),
        (leaving @ second)[:, None] * first * entering,
        second * (first @ entering),
    ]
    for tokens in (sample()[0], torch.zeros(1, LENGTH, dtype=torch.int64)):
        found = synflow_scores(net, named(net), tokens)
        for score, one in zip(found, expected, strict=True):
            torch.testing.assert_close(score, LENGTH * one)


def test_synflow_of_a_gpt_is_that_of_its_pipes() -> None:
    """Norms are their weights; attention is shares, a third each of queries, keys and values."""
    net = gpt(positions="learned", tied_head=False)
    names = list(named(net))
    w = {n: t.detach().abs().requires_grad_() for n, t in net.state_dict(keep_vars=True).items()}

    def third(x: Tensor) -> Tensor:
        return x / 3 + (2 * x / 3).detach()

    def heads(x: Tensor) -> Tensor:
        return x.view(LENGTH, 2, WIDTH // 2).transpose(0, 1)

    x = (w["embedding.weight"].mean(0) + w["learned.weight"].mean(0)).expand(LENGTH, WIDTH)
    normed = x * w["blocks.0.norm1.weight"] + w["blocks.0.norm1.bias"]
    qkv = normed @ w["blocks.0.attention.qkv.weight"].T + w["blocks.0.attention.qkv.bias"]
    query, key, value = (heads(third(part)) for part in qkv.chunk(3, dim=1))
    products = query @ key.mT
    attended = (products / products.sum(-1, keepdim=True).detach()) @ value
    attended = attended.transpose(0, 1).reshape(LENGTH, WIDTH)
    projection = w["blocks.0.attention.projection.weight"]
    x = x + attended @ projection.T + w["blocks.0.attention.projection.bias"]
    normed = x * w["blocks.0.norm2.weight"] + w["blocks.0.norm2.bias"]
    up = F.gelu(normed @ w["blocks.0.up.weight"].T + w["blocks.0.up.bias"])
    x = x + up @ w["blocks.0.down.weight"].T + w["blocks.0.down.bias"]
    flow = ((x * w["norm.weight"] + w["norm.bias"]) @ w["head.weight"].T).sum()
    flow.backward()
    found = synflow_scores(net, named(net), sample()[0])
    for name, score in zip(names, found, strict=True):
        gradient = w[name].grad
        assert gradient is not None
        torch.testing.assert_close(score, (w[name] * gradient).abs().detach(), msg=name)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_connections_move_by_the_loss_of_the_next_token(name: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Embedding(V, 4), nn.Linear(4, 6, bias=False), nn.Tanh())
    net = nn.Sequential(*layers, nn.Linear(6, V, bias=False)).double()
    options = {"update_every": 2, "fraction": 0.5, "end": 1.0, "decay": "constant"}
    memfold.compress(net, name, ratio=0.5, seed=1, **options)
    sparse = compression_of(net)
    assert isinstance(sparse, SparseWeights)
    data = [sample(seed) for seed in range(7)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)

    def loss(tensors: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        embedding, first, second = tensors
        return written_out(torch.tanh(embedding[batch[0]] @ first.T) @ second.T, batch[1])

    def order(index: int, step: int) -> list[int]:
        seed = memfold.seeding.derive_seed(1, "grow", sparse.names[index], step)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(sparse.shapes[index].numel(), generator=generator).tolist()

    expected = dynamic.train(
        [p.detach().clone() for p in memfold.densify(net).parameters()],
        [mask.double() for mask in sparse.masks()],
        loss,
        data,
        lr=0.5,
        momentum=0.9,
        weight_decay=0.0,
        every=2,
        fraction=0.5,
        end=1.0,
        decay="constant",
        skip_step=name == "rigl",
        growth=None if name == "rigl" else order,
    )
    for step, (tokens, targets) in enumerate(data):
        optimizer.zero_grad()
        TASK.loss(net(tokens), targets).backward()
        memfold.before_step(net, optimizer, step=step, total_steps=len(data))
        optimizer.step()
        weights, masks = next(expected)
        for mask, naive in zip(sparse.masks(), masks, strict=True):
            assert torch.equal(mask, naive.bool()), step
        for tensor, naive in zip(memfold.densify(net).parameters(), weights, strict=True):
            torch.testing.assert_close(tensor, naive, rtol=1e-10, atol=1e-13)
    assert sparse.structure_version == 3


@pytest.mark.parametrize(
    "build",
    [gpt, lambda: gpt(positions="learned", tied_head=False), lambda: LSTM(SPEC, width=4)],
    ids=["gpt", "learned", "lstm"],
)
def test_health_of_masks_sees_language_models_through(build) -> None:
    net, tokens = build(), sample()[0]
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in named(net).items()}
    health = measure(list(full), list(full.values()), net, tokens)
    assert health.effective_density == 1
    assert health.collapsed_layers == health.dead_units == 0
    masks = [mask & ("down" not in name and "hh" not in name) for name, mask in full.items()]
    health = measure(list(full), masks, net, tokens)
    assert health.collapsed_layers == 1
    # What only leads there is dead with it: `up`. The rest has the residual stream, or the inputs.
    dead = sum(m.numel() for n, m in full.items() if "up" in n or "down" in n or "hh" in n)
    total = sum(mask.numel() for mask in full.values())
    assert health.effective_density == pytest.approx(1 - dead / total)


def test_distillation_is_over_the_tokens_that_count() -> None:
    student, teacher = gpt(), gpt(positions="learned", tied_head=False)
    tokens, targets = sample()
    counts = targets != IGNORED
    logits = student(tokens)
    distillation = Distillation(teacher, temperature=2.0, weight=0.7)
    found = distillation.loss(tokens, logits, lambda rows: TASK.rows(rows, targets))
    expected = distilling.distillation_loss(
        logits[counts].tolist(), teacher(tokens)[counts].tolist(), 2.0
    )
    assert found.item() == pytest.approx(expected, rel=1e-9)
    found.backward()
    assert student.embedding.weight.grad is not None
