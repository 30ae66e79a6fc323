"""Every strategy on every way to own a weight."""

import copy
import gc
import io
import pickle

import pytest
import torch

import memfold
from memfold.compression import compression_of
from strategies.cases import ANY_MODULE, INITIALISING, SHARING
from strategies.models import MODELS, build, compress, compressed_or_skipped, make_input


def class_name(module):
    return f"{type(module).__module__}.{type(module).__qualname__}"


def outputs(model, model_name):
    return model.eval()(make_input(model_name))


@pytest.fixture(params=sorted(MODELS))
def model_name(request):
    return request.param


@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_trains_copies_and_densifies(strategy, model_name):
    plain = build(model_name)
    model = compressed_or_skipped(strategy, model_name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    before = outputs(model, model_name).detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(make_input(model_name)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    after = outputs(model, model_name)
    assert not torch.equal(before, after)

    dense = memfold.densify(model)
    assert list(dense.state_dict()) == list(plain.state_dict())
    assert [class_name(m) for m in dense.modules()] == [class_name(m) for m in plain.modules()]
    assert not [m for m in dense.modules() if "_memfold_sources" in vars(m)]
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in plain.named_parameters()]
    torch.testing.assert_close(outputs(dense, model_name), after, rtol=0, atol=0)
    assert compression_of(dense) is None

    copies = [copy.deepcopy(model)]
    if model_name != "weight_norm":  # PyTorch's own parametrised modules cannot be pickled.
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        torch.testing.assert_close(outputs(other, model_name), after, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert not torch.equal(outputs(other, model_name), after)
        torch.testing.assert_close(outputs(model, model_name), after, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ANY_MODULE)
def test_state_dict_and_artifact_carry_the_function(strategy, model_name, tmp_path):
    model = compressed_or_skipped(strategy, model_name)
    expected = outputs(model, model_name)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = build(model_name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    compress(other, strategy, model_name)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(outputs(other, model_name), expected, rtol=0, atol=0)

    memfold.save(model, tmp_path / "model.safetensors")
    fresh = build(model_name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(2)
    loaded = memfold.load(tmp_path / "model.safetensors", fresh)
    assert loaded is fresh
    torch.testing.assert_close(outputs(loaded, model_name), expected, rtol=0, atol=0)


@pytest.fixture
def new_tensors():
    """Return the living tensors that were not there before the test."""

    def living():
        gc.collect()
        # Not isinstance: it asks proxies of other libraries for their class, and they warn.
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    gc.freeze()  # `gc.get_objects` leaves out all that there is now
    yield living
    gc.unfreeze()


@pytest.mark.parametrize("strategy", SHARING)
def test_nothing_of_the_size_of_a_weight_stays(strategy, model_name, new_tensors):
    model = compressed_or_skipped(strategy, model_name, ratio=0.2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(make_input(model_name)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(make_input(model_name))
    optimizer.zero_grad()
    resident = new_tensors()
    # Values and Adam's two moments have m elements; everything else belongs to the untouched.
    m = memfold.footprint(model).num_values
    untouched = {t.numel() for n, t in model.named_parameters() if n != "shared_values"}
    untouched |= {t.numel() for t in model.buffers()} | {1}
    # Two factors for each segment of slots: a few segments, or m.
    untouched |= {len(compression_of(model).slot_factors(torch.device("cpu"), torch.float32)[0])}
    # Signs of rows and columns, or tables of at most 4096: bytes.
    mapping = compression_of(model).mapping
    signs = [mapping.signs(span) for span in mapping.spans]
    tables = [
        table for found in signs if found is not None for table in (found.rows, found.columns)
    ]
    assert {table.dtype for table in tables} <= {torch.int8}
    untouched |= {len(table) for table in tables}
    # A rotation for each partition.
    untouched |= {-(-mapping.num_weights // m)}
    assert {t.numel() for t in resident} <= untouched | {m}
    assert sum(t.numel() == m for t in resident) >= 3


def built_weights(model):
    shared = compression_of(model)
    with torch.no_grad():
        return [shared.weight(i).clone() for i in range(len(shared.names))]


@pytest.mark.parametrize("strategy", INITIALISING)
def test_other_dtypes_keep_mapping_and_function(strategy, model_name):
    model = compressed_or_skipped(strategy, model_name)
    reference = built_weights(model)
    for dtype, tolerance in (
        (torch.float32, 1e-6),  # a few float32 roundings of 6e-8
        (torch.bfloat16, 2e-2),  # phi and the weight are each rounded to 8 bits
    ):
        other = copy.deepcopy(model).to(dtype)
        for weight, expected in zip(built_weights(other), reference, strict=True):
            assert weight.dtype == dtype
            scale = expected.abs().max()
            torch.testing.assert_close(
                weight.double(), expected, rtol=tolerance, atol=tolerance * scale
            )


def test_ties_are_kept_and_counted_once():
    model = compressed_or_skipped("stable_rps", "tied")
    # 11 x 6 once, 6 x 6.
    assert memfold.footprint(model).num_weights == 11 * 6 + 6 * 6
    assert torch.equal(model.head.weight, model.embedding.weight)
    dense = memfold.densify(model)
    assert dense.head.weight is dense.embedding.weight


def test_a_module_registered_twice_is_one_module():
    model = compressed_or_skipped("stable_rps", "registered_twice")
    assert memfold.footprint(model).num_weights == 5 * 5 + 5 * 3
    assert model.first is model.again
    dense = memfold.densify(model)
    assert dense.first is dense.again


def test_padding_row_stays_zero_and_has_no_gradient():
    model = compressed_or_skipped("stable_rps", "embedding", ratio=0.5)
    assert not model[0].weight[0].any()
    shared = compression_of(model)
    model[0].weight[0].sum().backward()
    assert not shared.values.grad.any()


def test_a_padding_row_that_a_tied_head_trains_is_shared():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(11, 6, padding_idx=0)
    head = torch.nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = memfold.compress(torch.nn.Sequential(embedding, head), "stable_rps", ratio=0.5)
    assert model[0].weight[0].any()


def test_zero_initialised_and_one_element_layers_can_learn():
    for name in ("zero_head", "one_element"):
        model = memfold.compress(build(name), "stable_rps", ratio=0.4, structured="share")
        assert all(scale > 0 for scale in compression_of(model).scales)


def test_frozen_weights_stay_untouched():
    model = build("linear")
    model[0].weight.requires_grad_(False)
    memfold.compress(model, "stable_rps", ratio=0.5)
    assert compression_of(model).names == ["2.weight"]
    assert isinstance(model[0].weight, torch.nn.Parameter)
