"""Language modelling: sums over tokens and bytes, never means of means; sampling; no look ahead."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memfold.backbones import GPT, LSTM
from memfold.data.spec import IGNORED, DataSpec, NextToken, Tokens
from memfold.errors import InputError
from memfold.tasks import LanguageModelling
from memfold.tasks.generation import generate

V = 7


def spec(bytes_of: tuple[int, ...] | float = 1) -> DataSpec:
    return DataSpec(Tokens(V, 6), NextToken(V, bytes_of))


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of different sizes, with targets that do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in (4, 3, 1):
        targets = torch.randint(V, (size, 6), generator=generator)
        targets[torch.rand(size, 6, generator=generator) < 0.3] = IGNORED
        targets[:, 0] = 2
        found.append((torch.randn(size, 6, V, generator=generator), targets))
    return found


@given(st.integers(0, 50), st.lists(st.integers(0, 4), min_size=V, max_size=V))
def test_bits_per_byte_are_sums_over_sums(seed: int, lengths: list[int]) -> None:
    lengths[2] = 3
    task = LanguageModelling(spec(tuple(lengths)), label_smoothing=0.0)
    meters = task.meters()
    nats, num_bytes, all_nats, num_tokens = 0.0, 0, 0.0, 0
    for logits, targets in batches(seed):
        for meter in meters.values():
            meter.update(logits, targets)
        for row, wanted in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
            if wanted == IGNORED:
                continue
            loss = -float(row.double().log_softmax(0)[wanted])
            all_nats, num_tokens = all_nats + loss, num_tokens + 1
            if lengths[wanted]:
                nats, num_bytes = nats + loss, num_bytes + lengths[wanted]
    bpb = nats / math.log(2) / num_bytes
    assert float(meters["bpb"].compute()) == pytest.approx(bpb, rel=1e-5)
    assert float(meters["ppl"].compute()) == pytest.approx(
        math.exp(all_nats / num_tokens), rel=1e-4
    )
    assert sum(task.weight(targets) for _, targets in batches(seed)) == num_tokens


def test_for_bytes_it_is_the_loss_in_bits_and_uniform_logits_have_log2_of_the_vocabulary() -> None:
    task = LanguageModelling(spec(), label_smoothing=0.0)
    logits, targets = batches(0)[0]
    meter = task.meters()["bpb"]
    meter.update(logits, targets)
    loss = float(task.loss(SimpleNamespace(logits=logits), targets))
    assert float(meter.compute()) == pytest.approx(loss / math.log(2), rel=1e-6)
    uniform = task.meters()["bpb"]
    uniform.update(torch.zeros(2, 6, V), targets[:2])
    assert float(uniform.compute()) == pytest.approx(math.log2(V), rel=1e-6)


def test_the_loss_is_cross_entropy_over_what_counts() -> None:
    logits, targets = batches(1)[0]
    counted = targets != IGNORED
    task = LanguageModelling(spec(), label_smoothing=0.2)
    plain = F.cross_entropy(logits[counted], targets[counted])
    smooth = F.cross_entropy(logits[counted], targets[counted], label_smoothing=0.2)
    torch.testing.assert_close(task.loss(logits, targets), plain)
    torch.testing.assert_close(task.training_loss(logits, targets), smooth)
    assert torch.equal(task.rows(logits, targets), logits[counted])
    with pytest.raises(InputError, match=r"must return a tensor, or an object with \.logits"):
        task.loss({"logits": logits}, targets)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "tied_head": False}], ids=str)
def test_no_token_sees_a_later_one_and_the_cache_changes_nothing(
    options: dict[str, object],
) -> None:
    torch.manual_seed(0)
    net = GPT(V, 12, width=16, depth=2, num_heads=2, **options).eval()
    tokens = torch.randint(V, (2, 12))
    whole = net(tokens)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    assert torch.equal(net(changed)[:, :7], whole[:, :7])
    assert not torch.allclose(net(changed)[:, 7:], whole[:, 7:])
    cache: list[tuple[Tensor, Tensor]] = []
    parts = [net(tokens[:, a:b], kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="takes at most 12 tokens, got 13"):
        net(tokens[:, :1], kv_cache=cache)


class Counter(nn.Module):
    """Says that after token t comes t + 1, and remembers how much it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.widest = max(self.widest, tokens.shape[1])
        return 100.0 * F.one_hot((tokens + 1) % V, V).float()


def test_generation_goes_on_from_the_prompt_within_the_length() -> None:
    net = Counter()
    drawn = generate(net, torch.tensor([3]), 20, length=5)
    assert drawn.tolist() == [(4 + i) % V for i in range(20)]
    assert net.widest == 5


def test_generation_with_a_cache_draws_what_it_draws_without() -> None:
    torch.manual_seed(0)
    net = GPT(V, 16, width=16, depth=2, num_heads=2).eval()

    class Plain(nn.Module):
        # Models of transformers have a cache of another kind.
        def forward(self, tokens: Tensor, cache: object = None) -> Tensor:
            assert cache is None
            return net(tokens)

    prompt = torch.tensor([1, 2])
    assert torch.equal(
        generate(net, prompt, 13, length=16, seed=3),
        generate(Plain(), prompt, 13, length=16, seed=3),
    )
    assert len(generate(net, prompt, 60, length=16)) == 60


def test_lstm_reads_from_left_to_right() -> None:
    torch.manual_seed(0)
    net = LSTM(spec(), width=8)
    tokens = torch.randint(V, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    torch.testing.assert_close(net(changed)[:, :4], net(tokens)[:, :4])
    assert net(tokens).shape == (2, 6, V)


class LooksAhead(nn.Module):
    """Mixes every token with the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) + 0.01 * self.table(tokens.roll(-1, dims=1))


def test_a_network_that_sees_what_it_predicts_is_refused() -> None:
    task = LanguageModelling(spec(), label_smoothing=0.0)
    net = LooksAhead()
    with pytest.raises(InputError, match="sees the tokens that it is to predict"):
        task.check_network(net)
    assert net.training
    state = torch.get_rng_state()
    for fine in (GPT(V, 6, width=16, depth=2, num_heads=2, dropout=0.5), LSTM(spec(), width=8)):
        torch.set_rng_state(state)
        task.check_network(fine)
        assert torch.equal(torch.get_rng_state(), state)
        assert fine.training
    task.check_network(nn.Linear(3, 3))  # it raises: training will tell
