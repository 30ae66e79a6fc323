"""Recursions against plain loops, against loops that are written out token by token, and caches."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import memfold
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.operations import forward_operations
from memfold.training.activation_checkpointing import checkpoint_activations
from strategies.recursive_models import (
    CLOSE,
    DEPTH,
    KINDS,
    LENGTH,
    LOOPS,
    MAP,
    ROUTER,
    WIDTH,
    chosen_in,
    gpt,
    mor,
    tokens,
)
from strategies.threads import check_threads_keep_apart


def loss_of(model):
    out = model(tokens())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).mean() + out.square().mean()


def written_out(model, row, training):
    """Compute a row's logits, loop after loop, with attention over the tokens in it."""
    strategy = compression_of(model).strategy
    plain = gpt().eval()
    state = memfold.densify(model).state_dict()
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name != ROUTER})
    router, blocks, table = getattr(model, ROUTER), plain.blocks, plain.positions
    x = blocks[0](plain.embedding(row)[None], table)[0][0]
    x0, taken = x, list(range(LENGTH))
    depths = (x0 @ router.T).argmax(1) if strategy.routing == "token" else None
    for loop in range(LOOPS):
        z = x @ router[loop]
        capacity = (LOOPS - loop) / LOOPS
        if depths is not None:
            taken = [t for t in range(LENGTH) if depths[t] >= loop]
        elif training:
            best = sorted(taken, key=lambda t: -z[t].item())
            taken = sorted(best[: max(1, int(capacity * LENGTH))])
        elif loop:
            taken = [t for t in taken if torch.sigmoid(z[t]) >= 0.5]
        part = x[taken][None]
        for place in (1 + 2 * loop, 2 + 2 * loop):
            part = blocks[place](part, table[:, taken])[0]
        rows = list(x)
        for t, out in zip(taken, part[0], strict=True):
            if strategy.gate == "none":
                rows[t] = out
            elif depths is None:
                rows[t] = x[t] + strategy.gate_scale * torch.sigmoid(z[t]) * out
            elif depths[t] == loop:
                rows[t] = x0[t] + (x0 @ router.T).softmax(1)[t, loop] * out
            else:
                rows[t] = out
        x = torch.stack(rows)
    return plain.head(plain.norm(blocks[7](x[None], table)[0]))[0]


def test_without_gates_and_with_all_tokens_it_is_the_plain_loop_to_the_bit():
    model = memfold.compress(gpt(), "mor", capacity=[1.0] * LOOPS, gate="none")
    assert list(compression_of(model).map) == MAP
    tied = memfold.compress(gpt(), "tied", map=MAP)
    for mode in (True, False):
        for network in (model, tied):
            network.train(mode).zero_grad()
            loss_of(network).backward()
        assert torch.equal(model(tokens()), tied(tokens()))
        found = dict(model.named_parameters())
        for name, parameter in tied.named_parameters():
            assert torch.equal(found[name].grad, parameter.grad)


def test_a_constant_gate_with_all_tokens_is_the_closed_form():
    model = memfold.compress(gpt(), "mor", capacity=[1.0] * LOOPS, gate_scale=0.6).eval()
    with torch.no_grad():
        getattr(model, ROUTER).zero_()
    plain = memfold.compress(gpt(), "tied", map=MAP).eval()
    x = plain.blocks[0](plain.embedding(tokens()), plain.positions)[0]
    for loop in range(LOOPS):
        out = x
        for place in (1 + 2 * loop, 2 + 2 * loop):
            out = plain.blocks[place](out, plain.positions)[0]
        x = 1.3 * x + 0.3 * (out - x)  # (1 + p) x + p f(x)
    expected = plain.head(plain.norm(plain.blocks[7](x, plain.positions)[0]))
    torch.testing.assert_close(model(tokens()), expected, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", ["weighted", "none"])
@pytest.mark.parametrize("routing", KINDS)
def test_loops_are_those_that_are_written_out(routing, gate, training):
    model = mor(routing=routing, gate=gate).train(training)
    expected = torch.stack([written_out(model, row, training) for row in tokens()])
    torch.testing.assert_close(model(tokens()), expected, **CLOSE)
    if routing == "token" or not training:  # rows differ, which padding has to hide
        counts = chosen_in(model).sum(2)
        assert (counts[1:] != counts[1:, :1]).any()


@pytest.mark.parametrize(
    ("length", "capacity", "counts"),
    [
        (12, None, [12, 8, 4]),
        (11, None, [11, 7, 3]),
        (2, None, [2, 1, 1]),
        (10, [0.5, 0.3, 0.3], [5, 3, 3]),
    ],
)
def test_loops_take_their_capacity_of_those_before(length, capacity, counts):
    model = mor(capacity=capacity)
    chosen = chosen_in(model, tokens()[:, :length])
    assert (chosen.sum(2) == torch.tensor(counts)[:, None]).all()
    assert (chosen[1:] <= chosen[:-1]).all()


def test_each_token_goes_through_as_many_loops_as_it_chose():
    model = mor(routing="token")
    chosen = chosen_in(model)
    x = model.blocks[0](model.embedding(tokens()), model.positions)[0]
    depths = (x @ getattr(model, ROUTER).T).argmax(-1) + 1
    assert len(depths.unique()) == LOOPS
    assert torch.equal(chosen.sum(0), depths)
    assert (chosen[1:] <= chosen[:-1]).all()


@pytest.mark.parametrize("routing", KINDS)
def test_tokens_that_are_left_out_stay_as_they_are_to_the_bit(routing):
    model, streams = mor(routing=routing).eval(), []
    hooks = compression_of(model).hooks
    for layers in hooks.loops:
        layers[0].register_forward_pre_hook(lambda *_: streams.append(hooks.kept.tokens.stream))
    model.blocks[7].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    chosen = chosen_in(model)
    assert len(streams) == LOOPS + 1
    for loop, taken in enumerate(chosen):
        assert torch.equal(streams[loop + 1][~taken], streams[loop][~taken])
        assert (streams[loop + 1][taken] != streams[loop][taken]).any(-1).all()
    assert not chosen[2].all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("routing", KINDS)
def test_permuting_rows_permutes_the_output(routing, training):
    model, order = mor(routing=routing).train(training), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(tokens()[order]), model(tokens())[order], **CLOSE)


@pytest.mark.parametrize("routing", KINDS)
def test_in_evaluation_no_token_changes_those_before_it(routing):
    model = mor(routing=routing).eval()
    other = tokens()
    other[:, 7:] = (other[:, 7:] + 5) % 23
    found, expected = model(other), model(tokens())
    torch.testing.assert_close(found[:, :7], expected[:, :7], **CLOSE)
    assert (found[:, 7:] != expected[:, 7:]).any()


def test_in_training_the_best_of_a_row_are_taken_which_looks_ahead():
    model = mor()
    other = tokens()
    other[:, 7:] = (other[:, 7:] + 5) % 23
    assert not torch.allclose(model(other)[:, :7], model(tokens())[:, :7])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("routing", KINDS)
def test_tokens_one_by_one_give_the_same(routing, positions):
    model, cache = mor(gpt(positions=positions), routing=routing).eval(), []
    row = tokens(1)
    with torch.no_grad():
        expected = model(row)
        found = [model(part, kv_cache=cache) for part in row.split([5, 1, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)
    kept = [key.shape[2] for key, _ in cache]
    taken = chosen_in(model, row).sum((1, 2)).tolist()
    assert kept == [LENGTH, *(count for count in taken for _ in range(2)), LENGTH]
    assert taken[2] < LENGTH


def test_the_router_learns_what_was_chosen():
    model = mor(balance=0.3)
    hooks = compression_of(model).hooks
    streams = []
    for layers in hooks.loops:
        layers[0].register_forward_pre_hook(lambda *_: streams.append(hooks.kept.tokens))
    model(tokens())
    expected, before = 0.0, torch.ones(3, LENGTH, dtype=torch.bool)
    for loop, kept in enumerate(streams):
        z = kept.stream @ getattr(model, ROUTER)[loop]
        chance = torch.sigmoid(z)
        terms = torch.where(kept.chosen, chance.log(), (1 - chance).log())
        expected -= 0.3 * terms[before].mean()
        before = kept.chosen
    torch.testing.assert_close(memfold.extra_loss(model), expected, **CLOSE)
    memfold.extra_loss(model).backward()
    assert (getattr(model, ROUTER).grad != 0).any(1).all()
    model.eval()(tokens())
    assert memfold.extra_loss(model) == 0.0


def test_gates_train_the_router_too():
    for routing, rows in (("expert", LOOPS), ("token", LOOPS)):
        model = mor(routing=routing, balance=0.0)
        loss_of(model).backward()
        assert memfold.extra_loss(model) == 0.0
        assert (getattr(model, ROUTER).grad != 0).any(1).sum() == rows


def test_the_balance_of_tokens_that_choose_is_its_weight_where_all_are_alike():
    model = mor(routing="token", balance=0.3)
    x = model.blocks[0](model.embedding(tokens()), model.positions)[0]
    chances = (x @ getattr(model, ROUTER).T).softmax(-1).flatten(0, 1)
    shares = F.one_hot(chances.argmax(1), LOOPS).double().mean(0)
    model(tokens())
    expected = 0.3 * LOOPS * (shares * chances.mean(0)).sum()
    torch.testing.assert_close(memfold.extra_loss(model), expected, **CLOSE)
    with torch.no_grad():
        getattr(model, ROUTER).zero_()
    model(tokens())
    assert memfold.extra_loss(model).item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("routing", KINDS)
def test_layers_compute_the_tokens_that_they_take_alone(routing):
    model, row = mor(routing=routing).eval(), tokens(1)
    layer = 12 * WIDTH**2
    taken = chosen_in(model, row)[:, 0].sum(1).tolist()
    counts = [LENGTH, *(count for count in taken for _ in range(2)), LENGTH]
    attention = sum(2 * count**2 * WIDTH for count in counts)
    router = LENGTH * WIDTH * LOOPS
    expected = sum(counts) * layer + attention + router + LENGTH * WIDTH * 23
    assert forward_operations(model, row) == expected
    assert sum(counts) < DEPTH * LENGTH


def test_what_is_stored_is_the_closed_form():
    model = memfold.compress(gpt(), "mor", include=["blocks.*"])
    compression = compression_of(model)
    assert compression.num_values == 4 * 12 * WIDTH**2 + LOOPS * WIDTH
    assert compression.index_bytes == 0
    matrices = {id(p): p.numel() for p in model.blocks.parameters() if p.dim() > 1}
    assert sum(matrices.values()) == 4 * 12 * WIDTH**2


@pytest.mark.parametrize("routing", KINDS)
def test_copies_artifacts_and_densified_models_compute_the_same(routing, tmp_path):
    model = mor(routing=routing).eval()
    memfold.save(model, tmp_path / "model.safetensors")
    again = mor(routing=routing).eval()
    again.load_state_dict(model.state_dict())
    dense = memfold.densify(model)
    for other in (
        memfold.load(tmp_path / "model.safetensors", gpt()).eval(),
        memfold.load(tmp_path / "model.safetensors", gpt(), form="dense").eval(),
        *(again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))),
        *(dense, copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))),
    ):
        assert torch.equal(other(tokens()), model(tokens()))
    assert dense.state_dict().keys() == gpt().state_dict().keys() | {ROUTER}


@pytest.mark.parametrize("routing", KINDS)
def test_activations_inside_of_layers_are_computed_again(routing):
    plain, model = mor(routing=routing), mor(routing=routing)
    checkpoint_activations(model, "blocks.*")
    for network in (plain, model):
        (loss_of(network) + memfold.extra_loss(network)).backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_threads_have_their_own_tokens():
    model = mor().eval()
    check_threads_keep_apart(model, model.blocks, [tokens(), tokens().flip(0, 1)])


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("routing", KINDS)
def test_a_compiled_model_computes_the_same(routing):
    model = mor(routing=routing)
    compiled = torch.compile(model, backend="eager")
    expected = model(tokens())
    term = memfold.extra_loss(model)
    assert torch.equal(compiled(tokens()), expected)
    assert torch.equal(memfold.extra_loss(model), term)


def test_the_router_is_computed_in_single_precision_under_autocast():
    model = mor().float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(tokens())
    assert found.isfinite().all()


@pytest.mark.parametrize("routing", ["expert", "token"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_a_batch_without_tokens_is_refused_in_one_line(routing, shape):
    model = mor(routing=routing)
    with pytest.raises(InputError, match=r"rows of . tokens; one is needed"):
        model(torch.zeros(shape, dtype=torch.long))
