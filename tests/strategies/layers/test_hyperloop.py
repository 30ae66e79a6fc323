"""The looped middle against tied layers, and against loops written out."""

import copy
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.training.activation_checkpointing import checkpoint_activations
from strategies.threads import check_threads_keep_apart

DEPTH, WIDTH, LOOPS = 8, 16, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
NAMES = ("loop_gates", "loop_biases", "loop_vectors")


def gpt(depth=DEPTH):
    torch.manual_seed(0)
    return GPT(23, 12, width=WIDTH, depth=depth, num_heads=2).double()


def tokens():
    return torch.randint(0, 23, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model):
    out = model(tokens())
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (weights * out).mean() + out.square().mean()


def hyperloop(model=None, **options):
    return memfold.compress(gpt() if model is None else model, "hyperloop", **options)


def shaken(**options):
    """Return a model whose gates differ from token to token."""
    model = hyperloop(**options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in NAMES:
            part = getattr(model, name)
            part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype) / 2)
    return model.eval()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, hidden_states, scale=1.0):
        return hidden_states + scale * self.down(self.up(self.mix(self.norm(hidden_states))).tanh())


class Stack(nn.Module):
    """Layers that are called in the way that `call` says."""

    def __init__(self, call=lambda layer, x: layer(x)):
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.layers = nn.ModuleList(Layer() for _ in range(6)).double()

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def rows():
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gates_that_keep_nothing_are_the_plain_loop():
    model = hyperloop()
    entries = compression_of(model).map
    tied = memfold.compress(gpt(), "tied", map=list(entries))
    with torch.no_grad():
        model.loop_biases[:, 8:] = -math.inf
    for network in (model, tied):
        loss_of(network).backward()
    torch.testing.assert_close(model(tokens()), tied(tokens()), **CLOSE)
    found = dict(model.named_parameters())
    for name, parameter in tied.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, **CLOSE)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_loops_are_those_that_are_written_out(copies):
    model = shaken(copies=copies, loops=2, ratio=0.3)
    assert compression_of(model).map == (0, 1, 2, 3, 1, 2, 3, 4)
    plain = gpt().eval()
    plain.load_state_dict(
        {k: v for k, v in memfold.densify(model).state_dict().items() if k not in NAMES}
    )

    def block(number, x):
        return plain.blocks[number](x, plain.positions)[0]

    x = block(0, plain.embedding(tokens()))
    y = [x] * copies
    for loop in range(2):
        flat = torch.cat(y, dim=-1)
        flat = flat / (flat.square().mean(-1, keepdim=True) + torch.finfo(flat.dtype).eps).sqrt()
        logits = flat @ model.loop_gates[loop].T + model.loop_biases[loop]
        pre, post, res = logits.split(copies, dim=-1)
        pre = torch.ones_like(pre) if copies == 1 else torch.sigmoid(pre - math.log(copies - 1))
        z = sum(pre[..., i : i + 1] * y[i] for i in range(copies))
        for number in range(1 + 3 * loop, 4 + 3 * loop):
            z = block(number, z)
        z = z + model.loop_vectors[loop]
        post, res = 2 * torch.sigmoid(post), torch.sigmoid(res - 4)
        y = [res[..., i : i + 1] * y[i] + post[..., i : i + 1] * z for i in range(copies)]
    expected = plain.head(plain.norm(block(7, sum(y) / copies)))
    torch.testing.assert_close(model(tokens()), expected, **CLOSE)


def test_permuting_copies_with_their_rows_changes_nothing():
    model = shaken()
    expected = model(tokens())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        gates = model.loop_gates.view(LOOPS, 3, 4, 4, WIDTH)
        gates.copy_(gates[:, :, order][:, :, :, order])
        biases = model.loop_biases.view(LOOPS, 3, 4)
        biases.copy_(biases[:, :, order])
    torch.testing.assert_close(model(tokens()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("depth", "options", "entries"),
    [
        (8, {}, "01212123"),
        (16, {}, "01" + "2345" * 3 + "67"),
        (8, {"ratio": 1.0}, "01222345"),
        (8, {"loops": 2, "ratio": 0.01}, "01231234"),
        (5, {"ratio": 0.01}, "01112"),
    ],
)
def test_what_is_stored_is_the_closed_form(depth, options, entries):
    model = hyperloop(gpt(depth), include=["blocks.*"], **options)
    compression = compression_of(model)
    assert list(compression.map) == [int(entry) for entry in entries]
    loops, own = options.get("loops", LOOPS), len(set(entries))
    gates = loops * (12 * 4 * WIDTH + 12 + WIDTH)
    assert compression.num_values == own * 12 * WIDTH**2 + gates
    assert compression.index_bytes == 0
    matrices = {id(p): p.numel() for p in model.blocks.parameters() if p.dim() > 1}
    assert sum(matrices.values()) == own * 12 * WIDTH**2


def trained(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def differences(model):
    """Return how far the gates of a copy are from those of the one before."""
    gates = model.loop_gates.detach().view(LOOPS, 3, 4, 4 * WIDTH)
    return (gates[:, :, 1:] - gates[:, :, :-1]).norm(dim=-1)


def test_training_begins_near_the_plain_loop_and_tells_copies_apart():
    model = hyperloop()
    tied = memfold.compress(gpt(), "tied", map=list(compression_of(model).map))
    expected = tied(tokens())
    assert (model(tokens()) - expected).norm() < 0.2 * expected.norm()
    assert differences(trained(model))[1].min() > 1e-6  # of the last loop, the sum of H_post counts
    alike = hyperloop()
    with torch.no_grad():
        alike.loop_biases.zero_()
    assert differences(trained(alike)).max() < 1e-12


def test_copies_artifacts_and_densified_models_compute_the_same(tmp_path):
    model = shaken()
    memfold.save(model, tmp_path / "model.safetensors")
    again = hyperloop().eval()
    again.load_state_dict(model.state_dict())
    dense = memfold.densify(model)
    others = [
        memfold.load(tmp_path / "model.safetensors", gpt()).eval(),
        memfold.load(tmp_path / "model.safetensors", gpt(), form="dense").eval(),
        *(again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))),
        *(dense, copy.deepcopy(dense), pickle.loads(pickle.dumps(dense))),
    ]
    for other in others:
        assert torch.equal(other(tokens()), model(tokens()))
    # They are whole: what happens to one does not happen to others.
    with torch.no_grad():
        for other in others:
            other.loop_vectors.add_(1)
    assert torch.equal(others[3](tokens()), others[-1](tokens()))
    assert not torch.equal(others[3](tokens()), model(tokens()))
    assert type(dense) is GPT
    assert dense.state_dict().keys() == gpt().state_dict().keys() | {*NAMES}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        gpt().load_state_dict(dense.state_dict())


def test_tokens_one_by_one_give_the_same():
    model, cache = shaken(), []
    with torch.no_grad():
        expected = model(tokens())
        found = [model(part, kv_cache=cache) for part in tokens().split([5, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_caches_of_transformers_give_the_same(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names = ("n_embd", "n_layer", "n_head", "n_inner") if kind == "GPT2" else names
    sizes = dict(zip(names, (WIDTH, DEPTH, 2, 40), strict=True))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=23, bos_token_id=0, eos_token_id=0, **sizes
    )
    plain = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")
    model = shaken(model=plain(config).double())
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    found = [
        model.generate(tokens(), use_cache=use, return_dict_in_generate=True, **asked)
        for use in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits, **CLOSE)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(hidden_states=x, scale=1.0),
        lambda layer, x: layer(scale=1.0, hidden_states=x),
        lambda layer, x: layer(x, scale=1.0),
        lambda layer, x: layer(x, 1.0),
    ],
)
def test_layers_are_called_in_any_way(call):
    assert torch.equal(hyperloop(Stack(call))(rows()), hyperloop(Stack())(rows()))


def test_threads_have_their_own_copies():
    model = shaken()
    check_threads_keep_apart(model, model.blocks, [tokens(), tokens().flip(0, 1)])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_after_a_pass(fails):
    def fail(*_):
        if fails:
            raise KeyError("a layer fails")

    model, seen = hyperloop(Stack()), []
    expected = model(rows())
    handle = model.layers[3].register_forward_hook(fail)
    model.layers[0].register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
    with torch.no_grad():
        try:
            model(rows())
        except KeyError:
            assert fails
    assert seen[0]() is None
    handle.remove()
    assert torch.equal(model(rows()), expected)


def test_activations_inside_of_layers_are_computed_again_and_whole_layers_are_not():
    plain, model = hyperloop(Stack()), hyperloop(Stack())
    checkpoint_activations(model, "layers.*")
    for network in (plain, model):
        network(rows()).square().mean().backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    whole = hyperloop(Stack(lambda layer, x: checkpoint(layer, x, use_reentrant=False)))
    assert torch.equal(whole(rows()), plain(rows()))
    with pytest.raises(memfold.InputError, match=r"hyperloop: whole layers cannot be computed ag"):
        whole(rows()).sum().backward()


def test_gates_are_computed_in_single_precision_under_autocast():
    model = shaken().float()
    with torch.no_grad():
        expected = model(tokens())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens())
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.03)


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("breaks", [False, True])
def test_a_compiled_model_computes_the_same(breaks):
    def call(layer, x):
        if breaks:
            torch._dynamo.graph_break()
        return layer(x)

    model = hyperloop(Stack(call))
    compiled = torch.compile(model, backend="eager")
    expected = model(rows())
    assert torch.equal(compiled(rows()), expected)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    compiled(rows()).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


class Across(Layer):
    """Its stream lies along another dimension than the last."""

    def forward(self, x):
        return super().forward(x.mT).mT


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "has no repeated layers"),
        (lambda: gpt(4), {}, r"loops=3: of 4 repeated layers .* out of the loop; 2 works"),
        (lambda: gpt(3), {"loops": 2}, r"loops=2: of 3 repeated layers .* 4 layers or more are"),
        (gpt, {"loops": 1}, "compression.loops must be a whole number of at least 2"),
        (gpt, {"copies": 0}, "compression.copies must be a whole number of at least 1"),
        (gpt, {"map": "cycle"}, "compression.map is not an option of hyperloop"),
        (
            lambda: nn.Sequential(*(nn.Bilinear(3, 3, 3) for _ in range(6))),
            {},
            "stream of 0 cannot be told from its matrices, which have no size in common",
        ),
        (
            lambda: nn.Sequential(
                *(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)) for _ in range(6))
            ),
            {},
            "which have 3, 4 in common; one is needed",
        ),
        (
            gpt,
            {"layers": "blocks.*.attention"},
            r"hyperloop: blocks.0.attention is a part of blocks.0, which computes more: loops",
        ),
    ],
)
def test_what_has_no_middle_is_refused(model, options, message):
    with pytest.raises(memfold.InputError, match=message):
        hyperloop(model(), **options)


@pytest.mark.parametrize("left_out", [slice(2, 3), slice(3, None)])
def test_layers_that_are_left_out_are_refused(left_out):
    model = hyperloop(Stack())
    del model.layers[left_out]
    with pytest.raises(memfold.InputError, match="not called one after the other"):
        model(rows())


def test_loops_that_do_not_begin_with_what_the_one_before_gave_are_refused():
    model = hyperloop(Stack(lambda layer, x: x + layer(x)))
    with pytest.raises(memfold.InputError, match="each with what the one before gave"):
        model(rows())


def test_a_stream_along_another_dimension_is_refused():
    model = nn.Sequential(*(Across() for _ in range(6))).double()
    with pytest.raises(memfold.InputError, match=r"Across takes or gives \(4, 6, 5\); a stream"):
        hyperloop(model)(rows().mT)
