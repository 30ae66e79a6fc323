"""Error feedback: GPTQ for single layers, the outputs' own quadratic form for shared numbers."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import memfold
from memfold.compression import compression_of, error_feedback
from memfold.errors import InputError
from memfold.quantisation import Packing, quantise
from memfold.training import run
from memfold.training.load import load_model, read_data
from reference.error_feedback import gptq, output_form
from strategies.cases import ANY_MODULE, options_of
from training.jobs import SMALL, compose_job

LIMITS = {8: 127, 4: 7, 3: 3}
SHARING = ("stable_rps", "roast", "hashednet")


def mixed(num_samples: int, *shape: int, seed: int = 0) -> Tensor:
    """Inputs whose entries resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, *shape, generator=generator)
    return x + 2 * torch.randn(num_samples, *(1 for _ in shape), generator=generator)


def batches(x: Tensor, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(size)]


def layer(columns: int = 20, rows: int = 12) -> nn.Sequential:
    torch.manual_seed(columns * 100 + rows)
    return nn.Sequential(nn.Linear(columns, rows))


class Convolutions(nn.Module):
    """Groups, strides, paddings, a layer that is used twice, and one of each dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.second = nn.Conv2d(6, 6, (1, 3), padding="same", dilation=2, padding_mode="circular")
        self.row = nn.Conv1d(6, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.second(self.first(x)).tanh()).tanh()
        return self.head(self.row(x.mean(2)).mean(2))


def compressed(model: nn.Module, name: str, **options: Any) -> nn.Module:
    merged: dict[str, Any] = options_of(name) | {"bits": 4} | options
    return memfold.compress(model, name, **merged)


def loaded(model: nn.Module, fresh: nn.Module, folder: Any, **options: Any) -> nn.Module:
    memfold.save(model, folder / "model.safetensors", **options)
    return memfold.load(folder / "model.safetensors", fresh)


def error(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Squared difference of the outputs of single layers."""
    first, second = (memfold.densify(model).get_parameter("0.weight") for model in (one, other))
    difference = first.detach().double() - second.detach().double()
    return float((x.double() @ difference.T).square().sum())


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("name", ["dense", "mag"])
def test_a_single_layer_is_rounded_as_gptq_does(name: str, bits: int) -> None:
    x = mixed(40, 20)
    options: dict[str, Any] = {} if name == "dense" else {"ratio": 0.6}
    model = memfold.compress(layer(), name, bits=bits, **options)
    compression = compression_of(model)
    assert compression is not None
    ((key, values),) = compression.value_tensors().items()
    packing, flat = Packing(bits), values.double().flatten()
    parts = quantise(values, packing)
    steps = parts[".scales"].double().repeat_interleave(64)[: len(flat)]
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64).abs()
    keeps = (blocks == blocks.amax(1, keepdim=True)).flatten()[: len(flat)]
    places, _ = compression.sources(0) or pytest.fail("no sources")
    own = [row[row >= 0] for row in places]
    moments = x.double().T @ x.double()
    of_rows = [moments[row >= 0][:, row >= 0] for row in places]
    damping = 0.01 * torch.cat([matrix.diagonal() for matrix in of_rows]).mean()
    expected = gptq(
        [flat[at] for at in own],
        of_rows,
        [steps[at] for at in own],
        LIMITS[bits],
        [keeps[at] for at in own],
        damping,
    )
    roundings = error_feedback.feedback_roundings(compression, packing, batches(x))
    padded = F.pad(values.detach().flatten(), (0, -len(flat) % 64)).view(-1, 64)
    found = roundings[key](padded, parts[".scales"].float(), bits).flatten()[: len(flat)]
    assert torch.equal(found.double(), torch.cat(expected))
    assert not torch.equal(found, (flat / steps).round().float())


@pytest.mark.parametrize("name", [*SHARING, "rand"])
def test_statistics_are_summed_over_all_uses_of_a_number(name: str) -> None:
    x, dense = mixed(6, 4, 7, 8), Convolutions()
    model = compressed(dense, name, ratio=0.2).eval()
    compression = compression_of(model)
    assert compression is not None
    plain = memfold.densify(model)
    (values,) = compression.value_tensors().values()
    columns: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for b in range(len(values)):
            stored = torch.zeros_like(values)
            stored[b] = 1
            probe = copy.deepcopy(model)
            _write(probe, stored)
            columns.append({n: p.double() for n, p in memfold.densify(probe).named_parameters()})
    layers = []
    for path, module in plain.named_children():
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(partial(_note, seen))
        with torch.no_grad():
            plain(x)
        handle.remove()
        jacobian = torch.stack([column[f"{path}.weight"] for column in columns], dim=-1)

        def outputs(weight: Tensor, module: Any = module, seen: list[Tensor] = seen) -> Tensor:
            inputs = [part.double() for part in seen]
            if isinstance(module, nn.Linear):
                return torch.cat([F.linear(part, weight).flatten() for part in inputs])
            return torch.cat([module._conv_forward(i, weight, None).flatten() for i in inputs])

        layers.append((outputs, jacobian))
    uses, is_partial = error_feedback._look(compression, batches(x, 4))
    found = error_feedback._form(uses, 0, len(values))
    expected = output_form(layers, len(values))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    part = error_feedback._form(uses, 3, 17)
    torch.testing.assert_close(part, found[3:17, 3:17], rtol=1e-12, atol=0)
    assert not is_partial.any()


def _note(seen: list[Tensor], module: nn.Module, inputs: Any) -> None:
    seen.append(inputs[0])


def _write(model: nn.Module, values: Tensor) -> None:
    compression = compression_of(model)
    assert compression is not None
    for stored in compression.stored_values().values():
        parts = [stored] if isinstance(stored, Tensor) else list(stored)
        for part, given_values in zip(parts, values.split([p.numel() for p in parts]), strict=True):
            part.data.copy_(given_values.view_as(part))


@given(
    name=st.sampled_from(["dense", "mag", *SHARING]),
    columns=st.integers(1, 30),
    rows=st.integers(1, 12),
    num_samples=st.integers(1, 40),
    bits=st.sampled_from([8, 4, 3]),
)
def test_outputs_change_no_more_than_with_plain_rounding(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    columns: int,
    rows: int,
    num_samples: int,
    bits: int,
) -> None:
    folder, x = tmp_path_factory.mktemp("artifacts"), mixed(num_samples, columns)
    options = {"tile_rows": 1, "tile_columns": 1} if name == "roast" else {}
    model = compressed(layer(columns, rows), name, structured="share", bits=bits, **options)
    errors = [
        error(model, loaded(model, layer(columns, rows), folder, data=data), x)
        for data in (batches(x), None)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("name", ["dense", "mag", *SHARING])
def test_outputs_change_less_and_the_model_not_at_all(name: str, tmp_path: Any) -> None:
    x = mixed(64, 20)
    model = compressed(layer(), name).train()
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain = error(model, loaded(model, layer(), tmp_path), x)
    torch.set_rng_state(draws)
    packed = loaded(model, layer(), tmp_path, data=batches(x))
    assert error(model, packed, x) < 0.9 * plain
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    file = (tmp_path / "model.safetensors").read_bytes()
    memfold.save(model, tmp_path / "again", data=iter(batches(x)))
    memfold.save(packed, tmp_path / "of_loaded")
    assert (tmp_path / "again").read_bytes() == file
    assert (tmp_path / "of_loaded").read_bytes() == file  # rounded values round to themselves


@pytest.mark.parametrize("name", ["dense", "mag", "stable_rps"])
def test_what_is_not_coupled_is_rounded_to_the_nearest(name: str, tmp_path: Any) -> None:
    inputs = torch.diag(torch.arange(1.0, 21.0))
    model = compressed(layer(), name, **({"ratio": 1.0} if name == "stable_rps" else {}))
    memfold.save(model, tmp_path / "plain")
    memfold.save(model, tmp_path / "fed", data=batches(inputs))
    assert (tmp_path / "fed").read_bytes() == (tmp_path / "plain").read_bytes()


class Mixed(nn.Module):
    """Two embeddings, one of them tied to a linear layer, attention, and plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.hidden(input=self.attention(x, x, x)[0]))


def test_values_of_other_uses_are_rounded_to_the_nearest(tmp_path: Any) -> None:
    tokens = torch.randint(0, 11, (9, 5), generator=torch.Generator().manual_seed(0))
    model, found = memfold.compress(Mixed(), "dense", bits=3), {}
    for name, data in (("plain", None), ("fed", batches(tokens, 2))):
        memfold.save(model, tmp_path / name, data=data)
        found[name] = memfold.load(tmp_path / name, Mixed()).state_dict()
    differ = {n for n, t in found["fed"].items() if not torch.equal(t, found["plain"][n])}
    assert differ == {"hidden.weight"}
    shared = compressed(Mixed(), "stable_rps", ratio=0.1)
    with pytest.raises(InputError, match="no stored value is one of linear layers and convol"):
        memfold.save(shared, tmp_path / "none", data=batches(tokens))


@pytest.mark.parametrize("name", ANY_MODULE)
def test_sources_build_the_weights_or_are_not_there(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2), nn.Linear(6, 8), nn.Linear(8, 4))
    tokens = torch.arange(9)
    options = {"data": [(tokens, tokens % 4)], "loss": F.cross_entropy, **options_of(name)}
    compression = compression_of(memfold.compress(model, name, **options))
    assert compression is not None
    values = [tensor.flatten().double() for tensor in compression.value_tensors().values()]
    dense = memfold.densify(model).state_dict()
    if name in ("low_rank", "subspace", "supermask"):
        assert compression.sources(0) is None
        return
    for index, weight in enumerate(compression.names):
        places, factors = compression.sources(index) or pytest.fail("no sources")
        built = torch.where(places >= 0, factors * torch.cat(values)[places], 0.0)
        torch.testing.assert_close(built, dense[weight].double(), rtol=1e-6, atol=1e-7)


def not_finite() -> list[tuple[Tensor, Tensor]]:
    return batches(torch.full((3, 20), torch.inf))


@pytest.mark.parametrize(
    ("name", "options", "data", "message"),
    [
        ("stable_rps", {"bits": 32}, None, "needs artifact.bits from 8 to 3, got 32"),
        ("stable_rps", {"bits": 16}, None, "needs artifact.bits from 8 to 3, got 16"),
        ("stable_rps", {"train_bits": 4}, None, "is not for artifact.train_bits: the training"),
        ("low_rank", {}, None, "is not for compression=low_rank, whose weights are no single"),
        ("supermask", {}, None, "is not for compression=supermask"),
        ("mag", {}, [], r"^error feedback \(artifact.feedback_samples, .*: data= holds no samples"),
        ("mag", {}, [torch.zeros(3)], r"^error feedback .*: data= must give batches \(input"),
        ("mag", {}, not_finite(), "inputs of 0.weight are not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: str, options: dict[str, Any], data: Any, message: str, tmp_path: Any
) -> None:
    model = compressed(layer(), name, **options)
    with pytest.raises(InputError, match=message):
        memfold.save(
            model, tmp_path / "model", data=batches(mixed(4, 20)) if data is None else data
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_compressed_is_refused(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="needs a compressed model"):
        memfold.save(layer(), tmp_path / "model", bits=4, data=batches(mixed(4, 20)))


def test_a_run_rounds_on_samples_of_its_training_set(tmp_path: Any) -> None:
    overrides = (*SMALL, "compression=stable_rps", "ratio=0.1", "trainer.max_epochs=1")
    overrides += ("data.train_subset=300", "artifact.bits=3")
    result = run(compose_job(tmp_path / "run", *overrides, "artifact.feedback_samples=200"))
    assert result["feedback_samples"] == 200
    assert "packed/test/acc" in result["metrics"]
    file = tmp_path / "run" / "model.safetensors"
    model = load_model(tmp_path / "run", "last")
    _, data = read_data(tmp_path / "run")
    samples, count = [], 0
    for x, y in data.scoring_batches(1):
        samples.append((x[: 200 - count], y[: 200 - count]))
        count += len(x)
    memfold.save(model, tmp_path / "fed", data=[(x, y) for x, y in samples if len(x)])
    memfold.save(model, tmp_path / "plain")
    assert (tmp_path / "fed").read_bytes() == file.read_bytes()
    assert load_file(tmp_path / "plain").keys() == load_file(file).keys()
    assert (tmp_path / "plain").read_bytes() != file.read_bytes()
    for wrong, message in (
        (("artifact.bits=32",), "8 to 3"),
        (("compression=low_rank",), "low_rank"),
    ):
        refused = (*overrides, "artifact.feedback_samples=8", *wrong)
        with pytest.raises(InputError, match=f"artifact.feedback_samples.*{message}"):
            run(compose_job(tmp_path / wrong[0], *refused))
