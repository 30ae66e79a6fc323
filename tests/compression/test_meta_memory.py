"""Models without values are compressed in less memory than their dense weights take."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import memfold
from strategies.meta import on_meta


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if all(storage._cdata != a.untyped_storage()._cdata for a in _inputs(args)):
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return out


def _inputs(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


def test_compressing_makes_nothing_as_large_as_a_layer():
    build = lambda: nn.Sequential(nn.Linear(2048, 512), nn.Linear(512, 512))  # noqa: E731
    largest = 2048 * 512 * 4
    model = build()
    with Largest() as from_dense:
        memfold.compress(model, "stable_rps", ratio=0.01)
    assert from_dense.nbytes <= largest / 4
    with Largest() as from_meta:
        memfold.compress(on_meta(build), "stable_rps", ratio=0.01)
    assert from_meta.nbytes == largest


CAPPED = """
import resource, torch, memfold
from torch import nn

def stack(width, layers):
    layers = [(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*[module for pair in layers for module in pair])

def train(model, width):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(4, width)).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()

torch.set_num_threads(1)
# Threads and libraries that come with the first step are not part of what is capped.
train(memfold.compress(stack(64, 2), "stable_rps", ratio=0.1), 64)
pages = int(open("/proc/self/statm").read().split()[0])
cap = pages * resource.getpagesize() + ROOM
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
try:
    stack(WIDTH, LAYERS)
except (MemoryError, RuntimeError) as error:
    print("no room:", str(error).splitlines()[0])
with torch.device("meta"):
    model = stack(WIDTH, LAYERS)
memfold.compress(model, "stable_rps", ratio=0.001)
print("loss:", train(model, WIDTH))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_a_model_trains_whose_dense_weights_do_not_fit():
    width, layers, room = 3072, 12, 216 << 20
    assert 4 * width**2 * layers == 2 * room
    code = f"ROOM, WIDTH, LAYERS = {room}, {width}, {layers}\n{CAPPED}"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    refused, trained = output.stdout.splitlines()
    assert refused.startswith("no room:")
    assert trained.startswith("loss:")
    assert 0 < float(trained.split()[1]) < 1e-6
