"""Ways to build weights: lean, again instead of saved; whole, all at once; classic, PyTorch's."""

import gc
import threading
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import memfold
from memfold.compression import compression_of
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.slot_source import SlotSource
from strategies.sharing.lean_models import MODELS, alive, batch, evaluate, loss_of, make


def gradients(model, x):
    model.zero_grad()
    loss_of(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("strategy", ["stable_rps", "roast", "hashednet"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_all_ways_train_alike(name, strategy):
    curves = []
    for autograd in ("lean", "whole", "classic"):
        model = make(name, strategy, autograd=autograd)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(model(batch()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack([*losses, compression_of(model).values.detach().norm()]))
    for curve in curves[:2]:
        torch.testing.assert_close(curve, curves[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_no_weight_outlives_the_layer_that_uses_it(name, autocast, built):
    model, x = make(name, dtype=torch.float32), batch(torch.float32)
    most = []
    hook = nn.modules.module.register_module_forward_hook(lambda *_: most.append(alive(built)))
    gc.disable()
    try:
        with torch.autocast("cpu", enabled=autocast):
            output = model(x)
        assert len(built) >= len(compression_of(model).names)
        # An encoder layer looks at its own four weights before it decides how to compute.
        assert max(most) <= (4 if name == "transformer" else 1)
        assert alive(built) == 0
        loss_of(output.float()).backward()
        assert alive(built) == 0
    finally:
        gc.enable()
        hook.remove()


def test_a_recurrent_cell_is_built_twice_and_not_once_per_step(built):
    model = make("recurrent")
    model(batch()).square().sum().backward()
    # A weight stays from its second read on (the LSTM's are read once more for a check), and in the
    # backward pass when it is needed again. The input needs no gradient, so nor does weight_ih.
    cell, lstm, head = 2, 2, 1
    assert len(built) == (2 * cell + 2 * lstm + head) + (1 + lstm + head)


@pytest.mark.parametrize("autograd", ["lean", "whole"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointed_activations(inside, reentrant, autograd):
    reference = make("transformer", autograd="classic")
    expected = gradients(reference, batch())
    model = make("transformer", autograd=autograd)
    if inside:
        for layer in model[0].layers:
            forward = layer.forward
            layer.forward = lambda x, forward=forward, **_: checkpoint(
                forward, x, use_reentrant=reentrant
            )
        output = model(batch().requires_grad_())
    else:
        output = checkpoint(model, batch().requires_grad_(), use_reentrant=reentrant)
    loss_of(output).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_hooks_around_the_model_see_everything_but_weights(name, autocast):
    model, x = make(name, dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", enabled=autocast):
        expected = gradients(model, x)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().clone()

    model.zero_grad()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", enabled=autocast):
        loss = loss_of(model(x))
    loss.backward()
    assert packed
    weights = {tuple(shape) for shape in compression_of(model).shapes}
    assert not any(tuple(shape) in weights or tuple(shape)[::-1] in weights for shape in packed)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_a_tensor_changed_in_place_is_noticed():
    model = make("convolutions")
    activations = []
    model[3].register_forward_hook(lambda module, inputs, output: activations.append(output))
    loss = model(batch()).square().sum()
    activations[0].data.add_(0)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        activations[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("autograd", ["lean", "whole"])
def test_backward_again_and_after_an_interruption(autograd):
    model, x = make("transformer", autograd=autograd), batch()
    expected = gradients(model, x)
    model.zero_grad()
    hidden = []
    model[0].layers[0].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    loss = loss_of(model(x))

    def fail(gradient):
        raise KeyError("interrupted")

    handle = hidden[-1].register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, times * expected[name])


@pytest.mark.parametrize("autograd", ["lean", "whole"])
def test_gradients_of_inputs_alone_and_of_phi_alone(autograd):
    model, x = make("transformer", autograd=autograd), batch().requires_grad_()
    loss = loss_of(model(x))
    (of_input,) = torch.autograd.grad(loss, [x], retain_graph=True)
    values = compression_of(model).values
    (of_values,) = torch.autograd.grad(loss, [values])
    classic = make("transformer", autograd="classic")
    expected = torch.autograd.grad(loss_of(classic(x)), [x, compression_of(classic).values])
    torch.testing.assert_close((of_input, of_values), expected)


def test_second_derivatives_agree_with_the_classic_path():
    found = []
    for autograd in ("lean", "whole", "classic"):
        model = make("transformer", autograd=autograd)
        values = compression_of(model).values
        x = batch().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
            loss = loss_of(model(x))
            first = torch.autograd.grad(loss, [values, x], create_graph=True)
            penalty = first[0].square().sum() + first[1].square().sum()
            penalty.backward()
        found.append((values.grad, x.grad))
    for derivatives in found[:2]:
        torch.testing.assert_close(derivatives, found[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    found = []
    for autograd in ("lean", "whole", "classic"):
        model = make("convolutions", dtype=torch.float32, autograd=autograd)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(batch(torch.float32)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        found.append(compression_of(model).values.detach())
    for values in found[:2]:
        torch.testing.assert_close(values, found[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autograd", ["lean", "whole"])
def test_torch_func_takes_the_classic_path(autograd):
    model, x = make("tied", autograd=autograd), batch()
    values = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)(values)
    model.zero_grad()
    loss(values).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["convolutions", "tied", "transformer"])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(name, autocast):
    model, x = make(name, dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", enabled=autocast):
        loss_of(model(x)).backward()
        expected = {key: p.grad.clone() for key, p in model.named_parameters()}
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss_of(compiled(x)).backward()
    tolerance = 2e-2 if autocast else 1e-5
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], rtol=tolerance, atol=tolerance)


def test_the_buffer_is_the_only_gradient_of_m_numbers(monkeypatch):
    model = make("transformer")
    sizes = []
    scatter = type(compression_of(model).mapping).scatter

    def watched(mapping: SlotMapping, weights, span, factor, out):
        sizes.append(id(out))
        scatter(mapping, weights, span, factor, out)

    monkeypatch.setattr(type(compression_of(model).mapping), "scatter", watched)
    model(batch()).square().sum().backward()
    assert len(sizes) >= len(compression_of(model).names)
    assert len(set(sizes)) == 1


def test_an_unknown_path_is_refused():
    with pytest.raises(memfold.InputError, match="auto, whole, lean or classic"):
        memfold.compress(nn.Linear(3, 3), "stable_rps", autograd="fast")


def test_a_linear_layer_read_in_full_precision_under_autocast_keeps_it():
    """A layer with a forward of its own gets the weight in the dtype of phi."""

    class Normed(nn.Linear):
        def forward(self, x):
            assert self.weight.dtype == torch.float32
            return F.linear(x, self.weight / self.weight.norm())

    model = memfold.compress(nn.Sequential(Normed(6, 6)), "stable_rps", ratio=0.5)
    with torch.autocast("cpu"):
        assert model(torch.randn(2, 6)).dtype == torch.bfloat16


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("autograd", ["lean", "whole"])
def test_an_interrupted_forward_leaves_nothing_behind(autograd):
    model = make("recurrent", autograd=autograd)
    handle = model.head.register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(batch())
    handle.remove()
    with torch.no_grad():
        compression_of(model).values.mul_(3)
    expected = memfold.densify(model)
    # A part of the model, called on its own, does not see the interrupted pass.
    torch.testing.assert_close(model.cell.weight_hh, expected.cell.weight_hh.detach())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    torch.testing.assert_close(model(batch()), expected(batch()))
    assert torch.func.grad(lambda x: x.square().sum())(torch.ones(2)).tolist() == [2, 2]


def test_an_interrupted_evaluation_that_called_itself_is_over():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.depth = 0

        def forward(self, x):
            self.depth += 1
            if self.depth == 1:
                self(x)
                raise KeyboardInterrupt
            self.depth = 0 if self.depth > 2 else self.depth
            return self.layer(x)

    model = memfold.compress(Twice(), "stable_rps", ratio=0.5, autograd="lean").eval()
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 6))
    compression_of(model).values.data.mul_(3)
    expected = memfold.densify(model).layer.weight
    model.depth = 1
    model.train()(torch.ones(2, 6)).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.layer.weight, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("autograd", ["lean", "whole"])
def test_threads_evaluate_while_one_trains(autograd):
    model = make("perceptron_of_many_layers", autograd=autograd).eval()
    expected = evaluate(model, batch())
    failures = []

    def run(training):
        try:
            for _ in range(15):
                output = model(batch()) if training else evaluate(model, batch())
                if training:
                    loss_of(output).backward()
                torch.testing.assert_close(output.detach(), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(training,)) for training in (True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(compression_of(model)._running) == 0


def test_frozen_values_keep_no_weight_either(built):
    model = make("convolutions")
    expected = gradients(model, batch())
    compression_of(model).values.requires_grad_(False)
    built.clear()
    model.zero_grad()
    loss = loss_of(model(batch()))
    gc.collect()
    assert alive(built) == 0
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("strategy", ["stable_rps", "hashednet"])
@pytest.mark.parametrize("autograd", ["lean", "whole", "classic"])
def test_sparse_gradients_of_embeddings(strategy, autograd):
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 8, sparse=sparse), nn.Flatten(), nn.Linear(16, 3))
        memfold.compress(model, strategy, ratio=0.2, autograd=autograd)
        model(torch.tensor([[2, 3], [4, 2]])).square().sum().backward()
        found.append(compression_of(model).values.grad)
    torch.testing.assert_close(found[0], found[1])


def test_a_graph_that_is_never_run_back_is_freed(monkeypatch):
    model, sources = make("transformer"), []
    start = SlotSource.__init__

    def watched(source, *arguments, **options):
        sources.append(ref(source))
        start(source, *arguments, **options)

    monkeypatch.setattr(SlotSource, "__init__", watched)
    gc.disable()
    try:
        for _ in range(3):
            model(batch())
        assert [source() for source in sources] == [None] * 3
    finally:
        gc.enable()


def test_a_compiled_model_cannot_be_compressed():
    with pytest.raises(memfold.InputError, match="compress it first"):
        memfold.compress(torch.compile(nn.Linear(3, 3), backend="eager"), "stable_rps")
