"""Runs that start from weights: of a file or another run, in the dense backbone."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import memfold
from memfold.backbones.gpt import GPT
from memfold.compression import compression_of
from memfold.errors import InputError
from memfold.logging.quiet import hush_libraries
from memfold.training import load_model, run
from memfold.training.build import Experiment, build
from memfold.training.initial_weights import InitialWeights
from training.jobs import SMALL, compose_job

TINY = (*SMALL, "backbone.width=8", "trainer.max_epochs=1", "data.batch_size=512")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the dense backbone, of another seed."""
    folder = tmp_path_factory.mktemp("source")
    run(compose_job(folder, *TINY, "seed=7"))
    return folder


@pytest.fixture(scope="module")
def dense(source: Path) -> dict[str, Tensor]:
    return dict(memfold.densify(load_model(source)).state_dict())


def started(folder: Path, *overrides: str) -> Experiment:
    """Build a run, without training."""
    hush_libraries()
    return build(compose_job(folder, *TINY, *overrides), folder)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind", ["folder", "best.ckpt", "artifact", "safetensors", "torch"])
def test_whatever_holds_them_the_backbone_starts_from_them(
    kind: str, source: Path, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(dense, tmp_path / "plain.safetensors")
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in dense.items()}}
    torch.save(wrapped, tmp_path / "file.pth")
    path = {
        "folder": source,
        "best.ckpt": source / "checkpoints" / "best.ckpt",
        "artifact": source / "model.safetensors",
        "safetensors": tmp_path / "plain.safetensors",
        "torch": tmp_path / "file.pth",
    }[kind]
    experiment = started(tmp_path / "run", f"init_from={path}")
    assert same(dict(experiment.net.state_dict()), dense)
    assert experiment.initial is not None
    assert experiment.initial.report["taken"] == len(dense)
    assert experiment.initial.report["prefix"] == ("module." if kind == "torch" else "")
    assert "6 tensors taken" in experiment.initial.describe()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, ["ratio=0.4"]) for name in ("rand", "mag", "snip", "synflow", "set", "rigl")),
        ("ltr", ["compression.fraction=0.5", "ratio=0.4"]),
        *((name, ["ratio=1"]) for name in ("stable_rps", "low_rank")),
    ],
)
def test_what_a_strategy_keeps_has_the_values(
    name: str, options: list[str], source: Path, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    experiment = started(tmp_path, f"compression={name}", *options, f"init_from={source}")
    found = memfold.densify(experiment.net).state_dict()
    compression = compression_of(experiment.net)
    assert compression is not None
    for key, value in found.items():
        if "ratio=1" in options:  # phi is the weight over its scale, to rounding
            torch.testing.assert_close(value, dense[key], rtol=1e-6, atol=1e-7)
        elif key in compression.names:
            assert torch.equal(value, torch.where(value != 0, dense[key], 0)), key
        else:
            assert torch.equal(value, dense[key]), key


@pytest.mark.parametrize(
    "name", ["stable_rps", "roast", "hashednet", "small", "supermask", "subspace"]
)
def test_a_strategy_that_keeps_nothing_refuses(name: str, source: Path, tmp_path: Path) -> None:
    tiles = ["compression.tile_rows=2", "compression.tile_columns=2"] if name == "roast" else []
    with pytest.raises(InputError, match=f"^init_from gives weights, and {name} keeps none"):
        started(tmp_path, f"compression={name}", "ratio=0.5", *tiles, f"init_from={source}")


def test_least_squares_come_nearer_than_any_other_values(
    source: Path, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    nearest = "compression.initial_values=least_squares"
    options = ("compression=stable_rps", "ratio=0.5", nearest, f"init_from={source}")
    net = started(tmp_path, *options).net
    assert same(
        {k: v for k, v in memfold.densify(net).state_dict().items() if k.endswith("bias")},
        {k: v for k, v in dense.items() if k.endswith("bias")},
    )
    compression = compression_of(net)
    assert compression is not None
    weights = [net.get_submodule(name.rpartition(".")[0]).weight for name in compression.names]
    pairs = zip(weights, compression.names, strict=True)
    loss = sum(((w - dense[name]) ** 2).sum() for w, name in pairs)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, [net.get_parameter("shared_values")])
    scale = sum(float((dense[name] ** 2).sum()) for name in compression.names) ** 0.5
    assert float(gradient.abs().max()) < 1e-5 * scale


def test_which_tensors_are_compressed_does_not_depend_on_them(
    source: Path, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    """A resumed run, which reads no weights again, has to find the same."""
    ramp = torch.arange(dense["hidden.2.weight"].numel()).view_as(dense["hidden.2.weight"]) / 100
    torch.save({**dense, "hidden.2.weight": ramp}, tmp_path / "ramp.pt")
    options = ("compression=mag", "ratio=0.5", f"init_from={tmp_path / 'ramp.pt'}")
    compression = compression_of(started(tmp_path / "run", *options).net)
    assert compression is not None
    assert "hidden.2.weight" in compression.names


def test_a_resumed_run_keeps_them_and_reads_nothing(source: Path, tmp_path: Path) -> None:
    moved, folder = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(source, moved)
    overrides = (*TINY, "compression=mag", "ratio=0.5", f"init_from={moved}")
    first = run(compose_job(folder, *overrides))
    assert first["init_from"]["taken"] == 6
    assert first["recipe"]["init_from"] == str(moved)
    shutil.rmtree(moved)
    longer = (f"resume={folder}", "trainer.max_epochs=2")
    for other in ("init_from=null", f"init_from={source}", "init_from_strict=false"):
        with pytest.raises(InputError, match=r": init_from.* in that run, not .*keeps it"):
            run(compose_job(folder, *overrides, *longer, other))
    result = run(compose_job(folder, *overrides, *longer))
    assert (result["epochs"], result["init_from"]) == (2, first["init_from"])
    assert json.loads((folder / "result.json").read_text())["init_from"] == first["init_from"]
    load_model(folder, "last")


class Net(nn.Module):
    """A body, a head, and an embedding that is tied to it."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, classes, bias=False)
        self.embedding = nn.Embedding(classes, 5)
        self.embedding.weight = self.head.weight


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_a_tied_tensor_needs_one_of_its_names() -> None:
    state = state_of(Net())
    del state["head.weight"]
    net = Net()
    InitialWeights("file", state, strict=True).fill(net)
    assert torch.equal(net.head.weight, state["embedding.weight"])
    with pytest.raises(InputError, match=r"head\.weight differ there, and are one tensor"):
        InitialWeights("file", {**state, "head.weight": torch.ones(4, 5)}, strict=True).fill(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.0.bias": None}, r"not there: body\.0\.bias; with init_from_strict=false"),
        ({"other": torch.ones(1)}, "without a place in the backbone: other;"),
        ({"body.0.bias": torch.ones(5).byte()}, r"body\.0\.bias uint8 \(5,\) instead of \(5,\);"),
        ({"body.0.bias": torch.ones(2)}, r"body\.0\.bias \(2,\) instead of \(5,\);"),
        ({"body.1.num_batches_tracked": torch.ones(())}, r"\(\) instead of int64 \(\)"),
        ({"body.0.bias": torch.full((5,), torch.nan)}, r"body\.0\.bias has values that are not"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    change: dict[str, Any], message: str
) -> None:
    net, state = Net(), state_of(Net()) | change
    before = state_of(net)
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(InputError, match=f"^init_from=file: .*{message}") as raised:
        InitialWeights("file", state, strict=True).fill(net)
    assert "\n" not in str(raised.value)
    assert same(state_of(net), before)


def test_a_tensor_with_and_without_the_prefix_is_refused() -> None:
    state = {f"net.{name}": value for name, value in state_of(Net()).items()}
    with pytest.raises(InputError, match=r"two tensors could be body\.0\.bias"):
        InitialWeights("file", state | {"body.0.bias": torch.ones(5)}, strict=True).fill(Net())


def test_a_new_head_is_kept_where_it_is_not_strict() -> None:
    source, net = Net(classes=9), Net(classes=4)
    head = net.head.weight.detach().clone()
    taken = InitialWeights("file", source.state_dict(), strict=False)
    taken.fill(net)
    assert torch.equal(net.head.weight, head)
    assert torch.equal(net.body[0].weight, source.body[0].weight)
    shapes = "(9, 5) instead of (4, 5)"
    assert taken.report["other_shape"] == {"head.weight": shapes, "embedding.weight": shapes}
    assert f"of another shape: head.weight {shapes}" in taken.describe()
    with pytest.raises(InputError, match="has no tensor of the backbone's: it has x"):
        InitialWeights("file", {"x": torch.ones(1)}, strict=False).fill(net)


def gpt(depth: int, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(11, 6, width=8, depth=depth, num_heads=2)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4], [0, 1, 3, 4], [4, 2], [1, 1, 1]])
def test_layers_that_are_left_out_are_as_if_they_were_deleted(layers: list[int]) -> None:
    source, net = gpt(5, seed=1), gpt(len(layers))
    taken = InitialWeights("file", source.state_dict(), strict=True, layers=layers)
    taken.fill(net)
    blocks = [copy.deepcopy(source.blocks[layer]) for layer in layers]
    source.blocks = nn.ModuleList(blocks)
    tokens = torch.arange(6).remainder(11)[None]
    assert torch.equal(net.eval()(tokens), source.eval()(tokens))
    assert taken.report["layers"] == layers
    assert taken.describe().endswith(f"from the layers {', '.join(map(str, layers))} there")


def test_a_deeper_network_without_a_choice_of_layers_names_the_option() -> None:
    with pytest.raises(InputError, match="init_layers says which of more layers it takes"):
        InitialWeights("file", gpt(5).state_dict(), strict=True).fill(gpt(2))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 1, 2], r"init_layers names 3 layers, one for each of the 2 .*blocks\.0, blocks\.1"),
        ([0, 5], "init_layers names layer 5, and there are 5 layers like those of the backbone"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: list[int], message: str) -> None:
    net = gpt(2)
    before = state_of(net)
    with pytest.raises(InputError, match=message):
        InitialWeights("file", gpt(5).state_dict(), strict=True, layers=layers).fill(net)
    assert same(state_of(net), before)


@pytest.mark.parametrize("change", ["missing", "another shape", "one more"])
def test_layers_with_a_gap_are_refused(change: str) -> None:
    name = "blocks.1.up.bias"
    state = gpt(4).state_dict()
    match change:
        case "missing":
            state = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
        case "another shape":
            state[name] = state[name][1:]
        case "one more":
            state["blocks.1.more"] = state[name]
    for strict in (True, False):
        taken = InitialWeights("file", state, strict=strict, layers=[0, 2])
        with pytest.raises(InputError, match="are numbered 0, 2, 3 there: one is missing, or has"):
            taken.fill(gpt(2))


def test_layers_of_nothing_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(InputError, match="init_layers: the backbone has no layers that are alike"):
        InitialWeights("file", state_of(net), strict=True, layers=[0]).fill(net)
    with pytest.raises(InputError, match="init_layers says which layers of init_from"):
        started(tmp_path, "init_layers=[0,1]")
    with pytest.raises(InputError, match="init_layers must be a list"):
        started(tmp_path, "init_layers=[-1]", "init_from=x")


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Net(), tmp_path / "module.pt")
    old = tmp_path / "old.pt"
    torch.save(Net().state_dict(), old, _use_new_zipfile_serialization=False)
    for name in ("mag", "supermask", "stable_rps"):
        small = memfold.compress(nn.Sequential(nn.Linear(6, 5)), name, ratio=0.5)
        torch.save(small.state_dict(), tmp_path / f"{name}.pt")
    for name, message in {
        "nothing": "it cannot be read: No such file",
        "text": "it is damaged, or neither in safetensors format",
        "list.pt": "it holds no state dict",
        "module.pt": "holds pickled Python objects",
        "old.pt": r"it is a bare pickle, as torch\.save wrote before PyTorch 1\.6",
        "mag.pt": "it is of a compressed model",
        "supermask.pt": "it is of a compressed model",
        "stable_rps.pt": "it is of a compressed model",
        "": r".* is no run folder",
    }.items():
        with pytest.raises(InputError, match=f"^init_from={tmp_path / name}: .*{message}"):
            started(tmp_path / "run", f"init_from={tmp_path / name}")
