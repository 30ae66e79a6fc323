"""A computed weight cannot be written where Python can see it, and is else a plain tensor."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memfold
from memfold.compression.read_only import ReadOnlyWeight
from memfold.errors import InputError
from strategies.cases import ANY_MODULE, STRATEGIES, options_of

COMPUTED = [name for name in ANY_MODULE if name not in ("dense", "low_rank")]
"""Strategies under which no weight of the model below stays a parameter."""


def compressed(strategy, layer=nn.Linear):
    torch.manual_seed(0)
    model = nn.Sequential(layer(8, 8))
    batch = torch.randn(4, 8), torch.randn(4, 8)
    return memfold.compress(
        model, strategy, data=[batch], loss=F.mse_loss, **options_of(strategy, ratio=0.6)
    )


class Masked(nn.Linear):
    """Writes to its own weight, as many masked layers do."""

    def forward(self, input):
        self.weight.data *= torch.ones(8, 8).tril()
        return super().forward(input)


class MaxNorm(nn.Linear):
    """Keeps its rows short, as layers of nets for brain signals do."""

    def forward(self, input):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(input)


@pytest.mark.parametrize("layer", [Masked, MaxNorm])
@pytest.mark.parametrize("strategy", [*COMPUTED, "low_rank"])
def test_a_layer_that_writes_to_its_weight_is_refused_in_training_and_evaluation(strategy, layer):
    model = compressed(strategy, layer)
    message = r"^0\.weight is computed .* memfold\.densify\(model\).* compression\.exclude$"
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training), pytest.raises(InputError, match=message):
            model(torch.randn(3, 8))


def merge(layer):
    layer.weight.data += 1


def merge_safely(layer):
    layer.weight.data = layer.weight.data.clone() + 1


def prune_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(0)


def initialise(layer):
    nn.init.orthogonal_(layer.weight)


def write_a_row(layer):
    layer.weight.data[2] = 0


def write_a_view(layer):
    layer.weight.detach().view(-1)[:3].zero_()


def write_rows(layer):
    for row in layer.weight.data.T:
        row.clamp_(-1, 1)


def assign(layer):
    layer.weight = torch.zeros(8, 8)


WRITES = [
    merge,
    merge_safely,
    prune_in_place,
    initialise,
    nn.Linear.reset_parameters,
    write_a_row,
    write_a_view,
    write_rows,
    assign,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("strategy", ["stable_rps", "mag"])
def test_writes_are_refused_and_change_nothing(strategy, write):
    model = compressed(strategy)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"^0\.weight is computed"):
        write(model[0])
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


VIEWS = {
    "detach": lambda w: w.detach(),
    "ravel": lambda w: w.ravel(),
    "as_strided": lambda w: w.as_strided((2, 2), (8, 1)),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "swapdims": lambda w: w.swapdims(0, 1),
    "moveaxis": lambda w: w.moveaxis(0, 1),
    "expand_as": lambda w: w.expand_as(torch.zeros(3, 8, 8)),
    "unfold": lambda w: w.unfold(0, 2, 1),
    "tensor_split": lambda w: w.tensor_split(3)[1],
    "split_with_sizes": lambda w: w.split_with_sizes([3, 5])[0],
    "unsafe_chunk": lambda w: w.unsafe_chunk(2)[1],
    "hsplit": lambda w: w.hsplit(2)[0],
    "vsplit": lambda w: w.vsplit(2)[1],
    "dsplit": lambda w: w.view(2, 4, 8).dsplit(2)[1],
    "diagonal": lambda w: w.diagonal(),
    "adjoint": lambda w: w.adjoint(),
    "real": lambda w: w.real,
    "mH": lambda w: w.mH,
    "to": lambda w: w.to(torch.float32),
    "a view of a view": lambda w: w.ravel().unflatten(0, (2, 32)).hsplit(2)[1],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_whatever_lies_in_the_memory_of_a_weight_is_read_only(view, mode):
    model = compressed("mag")
    with mode(), pytest.raises(InputError, match=r"^0\.weight is computed"):
        view(model[0].weight).zero_()


@pytest.mark.parametrize("method", ["apply_", "map_", "map2_", "__ilshift__", "set_", "resize_"])
def test_methods_that_write_are_refused(method):
    with torch.no_grad(), pytest.raises(InputError, match=r"^0\.weight is computed"):
        getattr(compressed("mag")[0].weight, method)(2)


@pytest.mark.parametrize("strategy", ["stable_rps", "mag"])
def test_what_is_made_of_a_weight_is_a_plain_tensor(strategy):
    weight = compressed(strategy)[0].weight
    assert type(weight) is ReadOnlyWeight
    assert weight.grad_fn is not None
    for made in (
        weight * 2,
        weight.clone(),
        weight.narrow_copy(0, 1, 2),
        weight.detach()[[0, 1]],
        weight.data.double(),
    ):
        assert type(made) is torch.Tensor
        made.detach().mul_(0)
    for copied in (pickle.loads(pickle.dumps(weight.data)), copy.deepcopy(weight.data)):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, weight)
    assert weight.data.numpy().shape == (8, 8)


@pytest.mark.parametrize("strategy", ["stable_rps", "mag"])
def test_a_parameter_made_of_a_weight_is_one(strategy):
    parameter = nn.Parameter(compressed(strategy)[0].weight.data)
    assert type(parameter) is nn.Parameter
    parameter.square().sum().backward()
    before = parameter.detach().clone()
    torch.optim.SGD([parameter], lr=0.25).step()
    torch.testing.assert_close(parameter.detach(), before / 2)
    torch.testing.assert_close(compressed(strategy)[0].weight, nn.Parameter(before))


@pytest.mark.parametrize("strategy", sorted(set(ANY_MODULE) & STRATEGIES.keys()))
def test_the_dense_copy_can_be_written(strategy):
    dense = memfold.densify(compressed(strategy, Masked))
    assert dense(torch.randn(2, 8)).isfinite().all()
    assert not dense[0].weight.triu(1).any()
