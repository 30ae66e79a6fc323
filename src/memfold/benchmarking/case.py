"""Measure one case, in a process of its own: `python -m memfold.benchmarking.case < case.json`.

The last line on standard output is JSON: what was measured, or `{"error": ...}`.

Peak memory is everything from the first tensor of the case to the end of the last timed step:
construction, compression, warm-up and training, inputs and the allocator's own slack included.
On the CPU it is the largest resident size above what the process has once PyTorch, the optimizer,
the strategy and, for a compiled case, the compiler have run on a tiny model. On CUDA it is the
allocator's own statistic. Inference, artifact and extra counts come later.
"""

import gc
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memfold
from memfold.benchmarking.cases import Case
from memfold.benchmarking.measuring import saved_bytes, time_call, time_calls
from memfold.benchmarking.workloads import Loss, Workload, workload
from memfold.compression.accounting import tensor_bytes, unique_tensors
from memfold.errors import InputError
from memfold.memory import PeakMeter, grad_sync_bytes, train_state_bytes
from memfold.seeding import derive_seed

__all__ = ["measure"]

_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
# Small enough that random data changes nothing in the time of a step by diverging.
_LEARNING_RATE = 1e-3
# The default of 65,536 overflows in the first steps, which then leave the optimizer out.
_LOSS_SCALE = 1024.0


class _Training:
    """A model under its optimizer, with one batch of fixed random data."""

    def __init__(self, case: Case, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self._case = case
        self.model = model
        self.run = compiled(case, model)
        self.inputs, self.target = batch
        self._loss = workload(case.model).loss
        self.optimizer = _optimizer(case, model)
        enabled = case.dtype == "amp_fp16"
        self._scaler = torch.amp.GradScaler(case.device, init_scale=_LOSS_SCALE, enabled=enabled)
        self._done = 0
        self.last_loss = torch.tensor(math.nan)

    def step(self) -> None:
        """Do one training step; the gradients stay until the next one."""
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self._case):
            loss = self._loss(self.run(self.inputs), self.target)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        if not self._case.is_dense:
            total = self._case.warmup + self._case.steps
            memfold.before_step(self.model, self.optimizer, step=self._done, total_steps=total)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._done += 1
        self.last_loss = loss.detach()

    def forward(self) -> Tensor:
        """Run the model as a training step does."""
        with _autocast(self._case):
            return self.run(self.inputs)


def measure(case: Case) -> dict[str, Any]:
    """Build, train, count and run one case.

    Returns:
        Metric name -> number, and under "steps" the seconds of each timed training step.

    Raises:
        InputError: The strategy cannot compress this model with these options.
        RuntimeError: The loss is not finite after the last step.
    """
    device = torch.device(case.device)
    torch.set_num_threads(case.threads)
    _load_machinery(case)
    gc.collect()
    meter = PeakMeter(device)
    meter.start()
    batch = _batch(case, device)
    made: list[nn.Module] = []
    construction = time_call(lambda: made.append(_model(case, batch)), device)
    training = _Training(case, made[0], batch)
    warmup = [time_call(training.step, device) for _ in range(case.warmup)]
    steps = [time_call(training.step, device) for _ in range(case.steps)]
    peak = meter.peak_bytes()
    loss = float(training.last_loss)
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} after {len(warmup) + len(steps)} steps")
    median = statistics.median(steps)
    return {
        "construction_seconds": construction,
        "warmup_seconds": sum(warmup),
        "step_seconds": median,
        "samples_per_second": case.batch_size / median,
        "peak_bytes": peak,
        **_count_bytes(training),
        **_latencies(case, training.model, training.inputs),
        **(_in_turn(case, training, batch) if case.in_turn else {}),
        "steps": steps,
    }


def compiled(case: Case, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile the model when the case says so; its state stays that of `model`."""
    return torch.compile(model) if case.compiled else model  # type: ignore[return-value]


def _load_machinery(case: Case) -> None:
    """Train a tiny model, so that the baseline holds what is loaded at first use."""
    device = torch.device(case.device)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to(device)
    batch = torch.ones(4, 16, device=device), torch.zeros(4, 16, device=device)
    # Options may not fit this model; then less is loaded, and the peak is larger by some MB.
    with suppress(InputError):
        _compress(case, model, batch, nn.functional.mse_loss)
    with _autocast(case):
        output = compiled(case, model)(batch[0])
    output.float().sum().backward()
    _optimizer(case, model).step()
    torch._dynamo.reset()


def _batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(derive_seed(case.seed, "benchmark-batch"))
    tensors = workload(case.model).batch(case.batch_size, generator)
    dtype = _model_dtype(case)
    inputs, target = (
        tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for tensor in tensors
    )
    return inputs, target


def _model(case: Case, batch: tuple[Tensor, Tensor]) -> nn.Module:
    source: Workload = workload(case.model)
    torch.manual_seed(derive_seed(case.seed, "benchmark-model"))
    with _default_dtype(_model_dtype(case)):
        with torch.device("meta" if case.construction == "meta" else case.device):
            model = source.build()
        _compress(case, model, batch, source.loss)
    return model.to(case.device)


def _compress(case: Case, model: nn.Module, batch: tuple[Tensor, Tensor], loss: Loss) -> None:
    if case.is_dense:
        return
    memfold.compress(
        model,
        case.strategy,
        ratio=case.ratio,
        seed=case.seed,
        data=[batch],
        loss=loss,
        **case.options,
    )


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    return torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)


def _count_bytes(training: _Training) -> dict[str, int]:
    model, optimizer = training.model, training.optimizer
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    state = train_state_bytes(model, optimizer)
    there_anyway = [*model.parameters(), *model.buffers(), training.inputs]
    with tempfile.TemporaryDirectory() as folder:
        artifact = memfold.save(model, Path(folder) / "model.safetensors")
    return {
        "parameter_bytes": tensor_bytes(model.parameters()),
        "gradient_bytes": tensor_bytes(tensor for _, tensor in unique_tensors(gradients)),
        "optimizer_bytes": state - train_state_bytes(model),
        "train_state_bytes": state,
        "saved_bytes": saved_bytes(training.forward, there_anyway),
        "grad_sync_bytes": grad_sync_bytes(model),
        "stored_bytes": memfold.footprint(model).stored_bytes,
        "artifact_bytes": artifact,
    }


def _latencies(case: Case, model: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Time inference with one sample and with the whole batch, as it is and densified."""
    model.eval()
    forms = {"": model}
    if not case.is_dense:
        forms["densified_"] = memfold.densify(model)
    min_calls = workload(case.model).min_calls
    found = {}
    for prefix, form in forms.items():
        run = compiled(case, form)
        for key, sample in (("1", inputs[:1].clone()), ("batch", inputs)):
            with torch.no_grad(), _autocast(case):
                seconds = time_calls(lambda: run(sample), inputs.device, min_calls)  # noqa: B023
            found[f"{prefix}latency_{key}_seconds"] = statistics.median(seconds)
    return found


def _in_turn(case: Case, training: _Training, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Time steps in pairs, the dense model's first: the quartiles of their ratios."""
    device = torch.device(case.device)
    training.model.train()
    pair = _Training(case.dense(), _model(case.dense(), batch), batch), training
    for _ in range(case.warmup):
        for each in pair:
            each.step()
    ratios = []
    for _ in range(case.in_turn):
        dense, seconds = (time_call(each.step, device) for each in pair)
        ratios.append(seconds / dense)
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"turn_ratio": median, "turn_ratio_low": low, "turn_ratio_high": high}


def _autocast(case: Case) -> AbstractContextManager[object]:
    dtype = _AUTOCAST.get(case.dtype)
    device = torch.device(case.device).type
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def _model_dtype(case: Case) -> torch.dtype:
    return torch.float32 if case.dtype in _AUTOCAST else getattr(torch, case.dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _main() -> int:
    case = Case(**json.load(sys.stdin))
    try:
        line, status = json.dumps(measure(case), allow_nan=False), 0
    except Exception as error:  # recorded with the case; the others go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        line, status = json.dumps({"error": reason[:500]}), 1
    print(line, flush=True)
    return status


if __name__ == "__main__":
    status = _main()
    sys.stdout.flush()
    # Compiler workers and thread pools take seconds to shut down; nothing is left to be done.
    os._exit(status)
