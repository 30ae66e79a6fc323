"""An artifact is what was saved, and goes into the model that it was made for or into none."""

import json
import os

import pytest
import torch
from torch import nn

import memfold
from forging import forge
from memfold.backbones import MLP
from memfold.compression import compression_of
from memfold.errors import InputError
from strategies.cases import STRATEGIES, network_for, options_of


def mlp():
    torch.manual_seed(0)
    return MLP(1, 4, 3, hidden_widths=[6, 5])


def compressed(strategy, model):
    batch = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    loss = nn.functional.cross_entropy
    return memfold.compress(model, strategy, data=[batch], loss=loss, **options_of(strategy))


def saved(tmp_path, model):
    path = tmp_path / "model.safetensors"
    memfold.save(model, path)
    return path


def check_refused(path, model, message):
    """Check that loading raises one line with `message` and leaves the model as it is."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(InputError, match=message) as error:
        memfold.load(path, model)
    check_unchanged(model, modules, before, parameters)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def check_unchanged(model, modules, before, parameters):
    after = model.state_dict()
    assert compression_of(model) is None
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert list(after) == list(before)
    for name, (tensor, values) in before.items():
        assert after[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(after[name], values)
    assert all(parameters[name] is now for name, now in model.named_parameters())


class Three(nn.Module):
    """Three matrices of one shape, of which two may be one."""

    def __init__(self, *tied):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        if tied:
            first, second = tied
            getattr(self, second).weight = getattr(self, first).weight

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


TIES = [(), ("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize("options", [{}, {"exclude": ["0.*"]}], ids=["all", "untouched"])
@pytest.mark.parametrize("strategy", [None, "dense", "stable_rps", "mag", "low_rank"])
def test_an_artifact_goes_into_a_model_with_the_same_ties_alone(tmp_path, strategy, options):
    for ties in TIES:
        model = nn.ModuleList([Three(*ties), nn.Linear(4, 4)])
        if strategy is not None:
            ratio = {} if strategy == "dense" else {"ratio": 0.5}
            memfold.compress(model, strategy, **ratio, **options)
        path = saved(tmp_path, model)
        for others in TIES:
            fresh = nn.ModuleList([Three(*others), nn.Linear(4, 4)])
            if others == ties:
                x = torch.randn(3, 4)
                assert torch.equal(memfold.load(path, fresh)[0](x), model[0](x))
            else:
                check_refused(path, fresh, "tied|same tensor")


def test_a_layer_that_is_registered_twice_is_tied(tmp_path):
    def build(*, twice):
        first = nn.Linear(4, 4)
        return nn.Sequential(first, first if twice else nn.Linear(4, 4))

    for twice in (True, False):
        path = saved(tmp_path, memfold.compress(build(twice=twice), "rand", ratio=0.5))
        check_refused(path, build(twice=not twice), r"1\.(weight|bias).* tied to 0\.")
        memfold.load(path, build(twice=twice))


def _as_version_2(contents, tensors):
    contents.update(version=2)
    del contents["ties"]


def test_artifacts_without_checksum_are_still_read(tmp_path):
    model = compressed("mag", mlp())
    path = saved(tmp_path, model)
    forge(path, _as_version_2, signed=False)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(memfold.load(path, mlp())(x), model(x))
    forge(saved(tmp_path, Three()), _as_version_2, signed=False)
    check_refused(path, Three("a", "c"), r"no c\.weight of its own: it is tied to a\.weight")
    path = saved(tmp_path, model)
    forge(path, lambda contents, _: contents, signed=False)
    check_refused(path, mlp(), "is damaged: its checksum")


@pytest.mark.parametrize("strategy", ["stable_rps", "mag"])
def test_a_changed_bit_is_found(tmp_path, strategy):
    path = saved(tmp_path, memfold.compress(nn.Linear(5, 6), strategy, ratio=0.4))
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        contents = bytearray(whole)
        contents[position] ^= 1 << position % 8
        path.write_bytes(contents)
        with pytest.raises(InputError) as error:
            memfold.load(path, nn.Linear(5, 6))
        assert "\n" not in str(error.value)


class Buffers(nn.Module):
    """Buffers in places of memory that they share."""

    def __init__(self, *, apart):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        numbers = torch.arange(8.0)
        copied = (lambda t: t.clone()) if apart else (lambda t: t)
        self.register_buffer("repeated", copied(numbers.expand(3, -1)))
        self.register_buffer("head", copied(numbers[:5]))
        self.register_buffer("tail", copied(numbers[3:]))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("strategy", [None, "stable_rps"])
def test_buffers_that_share_memory_are_loaded(tmp_path, strategy):
    model = Buffers(apart=False)
    model.tail.mul_(2)
    if strategy is not None:
        memfold.compress(model, strategy, ratio=0.5)
    loaded = memfold.load(saved(tmp_path, model), Buffers(apart=False))
    for name in ("repeated", "head", "tail"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))


@pytest.mark.parametrize("name", ["repeated", "head"])
def test_values_that_do_not_fit_into_shared_memory_are_refused(tmp_path, name):
    model = memfold.compress(Buffers(apart=True), "stable_rps", ratio=0.5)
    getattr(model, name)[-1] += 1
    check_refused(saved(tmp_path, model), Buffers(apart=False), "has values of its own")


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("moment", ["write", "end"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_whatever_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch, strategy, moment, cause):
    def network():
        torch.manual_seed(0)
        return network_for(strategy, 1, 4, 3, (6, 5))

    path, model = saved(tmp_path, compressed(strategy, network())), network()
    numbers = iter(range(1000))
    write = memfold.artifact._write

    def fail(*_):
        raise cause("the machine\nfails")

    def write_some(target, values):
        write(target, values)
        if next(numbers) == 1:
            fail()

    target = {"write": "_write", "end": "restore_dense"}[moment]
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with monkeypatch.context() as patch:
        patch.setattr(memfold.artifact, target, {"write": write_some, "end": fail}[moment])
        expected = InputError if issubclass(cause, Exception) else cause
        with pytest.raises(expected) as error:
            memfold.load(path, model, form="dense")
    assert expected is cause or "go into this model: the machine fails" in str(error.value)
    check_unchanged(model, modules, before, parameters)
    x = torch.randn(2, 1, 4, 4)
    again = memfold.load(path, model, form="dense")
    assert torch.equal(again(x), memfold.load(path, network(), form="dense")(x))


def test_numbers_of_another_kind_are_refused(tmp_path):
    def build(dtype):
        model = nn.Linear(4, 4)
        model.register_buffer("steps", torch.ones(3, dtype=dtype))
        return model

    path = saved(tmp_path, build(torch.float32))
    check_refused(path, build(torch.int64), r"steps is torch\.float32, this one's torch\.int64")
    assert memfold.load(path, build(torch.float16)).steps.dtype == torch.float16


def test_what_the_format_lacks_is_refused_and_the_file_kept(tmp_path):
    path = saved(tmp_path, mlp())
    before = path.read_bytes()
    for tensor in (torch.zeros(2, dtype=torch.complex128), torch.zeros(2, 2).to_sparse()):
        model = mlp()
        model.register_buffer("odd", tensor)
        with pytest.raises(InputError, match=r"odd .*no dense|no place for") as error:
            memfold.save(model, path)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == before


def test_what_is_no_file_is_refused(tmp_path):
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / make.__name__)
        check_refused(tmp_path / make.__name__, mlp(), "is no regular file|Is a directory")


HOSTILE = {
    "deep": "[" * 100_000,
    "huge_number": '{"version": 1' + "0" * 10_000 + "}",
    "beyond_floats": '{"version": 1e999}',
    "surrogate": '{"version": "\\ud800"}',
    "long_version": json.dumps({"version": "x" * 10_000}),
    "no_record": '"version"',
}


@pytest.mark.parametrize("record", sorted(HOSTILE))
def test_hostile_records_are_refused_in_one_line(tmp_path, record):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"__metadata__": {"memfold": HOSTILE[record]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    check_refused(path, mlp(), "damaged metadata|has version")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**7, 1])
def test_hostile_headers_are_refused_in_one_line(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"[" * 1000)
    check_refused(path, mlp(), "truncated, damaged")


@pytest.mark.parametrize("name", ["two\nlines", "long" * 1000])
def test_names_that_fit_in_no_message_are_refused(tmp_path, name):
    path = saved(tmp_path, mlp())
    forge(path, lambda _, tensors: tensors.update({name: torch.zeros(1)}))
    check_refused(path, mlp(), "no printable text")
