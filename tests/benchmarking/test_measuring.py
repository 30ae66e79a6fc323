import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memfold.benchmarking.measuring import saved_bytes, time_call, time_calls


def test_saved_bytes_of_a_small_network_are_exact():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.ones(2, 8)
    there_anyway = [*model.parameters(), inputs]
    # The ReLU and the second layer save the same output of 2 x 16 floats.
    assert saved_bytes(lambda: model(inputs), there_anyway) == 2 * 16 * 4
    assert saved_bytes(lambda: model(inputs), model.parameters()) == 2 * 16 * 4 + 2 * 8 * 4


def test_views_count_as_their_whole_storage_once():
    base = torch.ones(10, requires_grad=True)

    def forward():
        whole = base.exp()  # saves its result
        return whole[:5] * whole[5:]  # saves two views of it

    assert saved_bytes(forward, [base]) == 10 * 4


def test_what_the_graph_drops_does_not_count():
    weight = torch.ones(10, requires_grad=True)

    def forward():
        weight.exp()
        return weight.sin()

    assert saved_bytes(forward, [weight]) == 0


def test_what_hooks_inside_take_for_themselves_is_not_seen():
    weight = torch.ones(10, requires_grad=True)

    def forward():
        with saved_tensors_hooks(lambda tensor: 0, lambda packed: weight.exp()):
            first = weight.exp()
        return first.exp()

    assert saved_bytes(forward, []) == 10 * 4


def test_counting_leaves_the_graph_usable():
    weight = torch.ones(3, requires_grad=True)
    outputs = []
    saved_bytes(lambda: outputs.append(weight.exp()), [])
    outputs[0].sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, weight.detach().exp())


@pytest.mark.parametrize("min_calls", [5, 20])
def test_short_calls_are_timed_many_times_and_long_ones_a_few(monkeypatch, min_calls):
    clock = iter(range(10_000))
    monkeypatch.setattr("memfold.benchmarking.measuring.perf_counter", lambda: next(clock))
    calls = []
    seconds = time_calls(lambda: calls.append(0), torch.device("cpu"), min_calls)
    assert seconds == [1.0] * min_calls
    assert len(calls) == min_calls + 1  # the warm-up

    monkeypatch.setattr("memfold.benchmarking.measuring.perf_counter", lambda: next(clock) / 1e6)
    calls.clear()
    assert len(time_calls(lambda: calls.append(0), torch.device("cpu"), min_calls)) == 200
    assert len(calls) == 203


@pytest.mark.gpu
def test_calls_on_a_gpu_are_timed_until_they_are_done():
    matrix = torch.ones(4096, 4096, device="cuda")
    once = time_call(lambda: matrix @ matrix, matrix.device)
    many = time_call(lambda: [matrix @ matrix for _ in range(50)], matrix.device)
    assert many > 5 * once > 0
