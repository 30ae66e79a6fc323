"""The Triton kernels: interpreted on the CPU, compiled for GPUs that are not here, run on one."""

import importlib
import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import memfold
from memfold.strategies.sharing import fold_triton, random_fold
from memfold.strategies.sharing.fold_triton import uses_triton
from memfold.strategies.sharing.mapping import Span
from memfold.strategies.sharing.random_fold import RandomFold

CASES = Path(__file__).with_name("triton_cases.py")
HAS_WHEELS = (platform.system(), platform.machine()) == ("Linux", "x86_64")
# Where Triton is published, the `dev` extra installs it: there a test that misses it must fail.
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and not HAS_WHEELS,
    reason="Triton is published for Linux on x86_64 only",
)


@needs_triton
def test_interpreted_kernels_agree_with_torch():
    # Triton reads the variable when it is imported, and another test may have imported it already.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASES],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.parametrize("signs", [None, "*i8"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["read_kernel", "add_kernel"])
def test_kernels_compile(kernel, dtype, signs, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    function = getattr(fold_triton._kernels(), kernel)
    constants = {"BLOCK": 512, "PARTS": True}
    constants |= {} if signs else {"row_signs": None, "column_signs": None}
    types = {
        "slots": "*fp32",
        "out": f"*{dtype}" if kernel == "read_kernel" else "*fp32",
        "weights": f"*{dtype}",
        "windows": "*i32",
        "row_signs": signs,
        "column_signs": signs,
        "factor_bits": "i64",
        "first_weight": "i64",
    }
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    constexprs = {
        (function.arg_names.index(name),): value
        for name, value in constants.items()
        if name in function.arg_names
    }
    source = compiler.ASTSource(function, signature, constexprs=constexprs)
    options = {"enable_fp_fusion": False}
    code = compiler.compile(source, target=target, options=options).asm["ptx"]
    assert "st.global" in code
    # Sums whose order depends on how programs are scheduled differ from run to run.
    assert "atom." not in code
    assert "red.global" not in code


def test_memfold_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import memfold; print(*memfold.strategies())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "stable_rps" in run.stdout, run.stderr


def test_tensors_on_the_cpu_are_left_to_torch():
    assert not uses_triton(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_gpu_without_working_kernels_is_left_to_torch(capability, monkeypatch):
    def fail():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fold_triton, "find_spec", lambda name: name)
    monkeypatch.setattr(fold_triton, "_kernels", fail)
    works = fold_triton._compiles.__wrapped__
    if capability < (8, 0):
        assert not works(torch.device("cpu"))
    else:
        with pytest.warns(UserWarning, match="Failed to find C compiler. Please"):
            assert not works(torch.device("cpu"))


def cases():
    """Import the checks that the interpreter runs too."""
    return importlib.import_module("strategies.sharing.triton_cases")


@pytest.mark.gpu
def test_kernels_run_on_a_gpu():
    assert uses_triton(torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 5), (7, 7, 3), (1500, 1400, 33), (10000, 9999, 400)])
def test_blocks_agree_on_a_gpu(size, slots_dtype, dtype):
    checks, block = cases(), cases().random_block(*size, seed=1)
    checks.check_reading(block, size[0], slots_dtype, dtype, "cuda")
    checks.check_adding(block, size[0], slots_dtype, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("sign", ["column", "run", "weight"])
def test_mappings_and_models_agree_on_a_gpu(sign, monkeypatch):
    for mapping in cases().mappings(sign):
        cases().check_mapping(mapping, "cuda", monkeypatch)
    cases().check_model(sign, "cuda", monkeypatch)


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_31_weights_on_a_gpu():
    m, runs = 1000, 2_200_000
    block = cases().random_block(m, m, runs, seed=1)
    slots = torch.linspace(-2, 3, m, device="cuda")
    out = torch.empty(block.stop, dtype=torch.float16, device="cuda")
    fold_triton.read_blocks(slots, [block], 0.3, out, None)
    for run in (0, runs // 2, runs - 1):
        window = slots.roll(-int(block.starts[run])) * (0.3 * float(block.signs[run]))
        found = out[block.offset + run * m :][:m]
        assert torch.equal(found, window.half())
    total = torch.zeros(m, dtype=torch.float64, device="cuda")
    fold_triton.add_blocks(out, [block], 1.0, total, None)
    # Each slot meets its own value in every run, with the square of its sign.
    torch.testing.assert_close(total, runs * (slots * 0.3).half().double())


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("sign", ["column", "run", "weight"])
def test_gradients_are_the_same_bits_every_time_on_a_gpu(sign, ratio):
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).cuda()
    memfold.compress(model, "stable_rps", ratio=ratio, seed=1, sign=sign)
    inputs = torch.linspace(-1, 1, 64 * 512, device="cuda").view(64, 512)
    gradients = []
    for _ in range(5):
        model.zero_grad()
        model(inputs).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for again in gradients[1:]:
        assert all(map(torch.equal, gradients[0], again))


def seconds_of(function):
    """Time a function on the GPU: the least of ten calls."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [4096, 2**18, 2**22])
@pytest.mark.parametrize("sign", ["column", "run", "weight"])
def test_kernels_are_no_slower_than_torch_on_a_gpu(sign, num_slots, monkeypatch):
    span = Span("weight", torch.Size((4096, 4096)), 0, 4096**2)
    mapping = RandomFold([span], num_slots, seed=1, sign=sign)
    slots = torch.zeros(num_slots, device="cuda")
    weights = torch.zeros(span.numel, device="cuda")
    for name, function in {
        "gather": lambda: mapping.gather(slots, span, 0.5),
        "scatter": lambda: mapping.scatter(weights, span, 0.5, slots),
    }.items():
        seconds = {}
        for triton in (True, False):
            monkeypatch.setattr(random_fold, "uses_triton", lambda *_, answer=triton: answer)
            seconds[triton] = seconds_of(function)
        print(f"{sign} m={num_slots} {name}: {seconds[True]:.2e} s, torch {seconds[False]:.2e} s")
        # 20 microseconds are the start of a kernel.
        assert seconds[True] < 1.2 * seconds[False] + 2e-5
