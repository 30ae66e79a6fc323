"""`data=custom`: datasets and modules of the user; the example of the docs; what is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from data.own_data import Drawing, Stream
from memfold.data.custom import Datasets, build_custom
from memfold.data.data_module import DataModule
from memfold.data.digits import Digits
from memfold.data.spec import Classes, DataSpec, Images, NextToken, Reals, Table, Tokens
from memfold.errors import InputError
from memfold.training import load_model, run
from training.jobs import REPOSITORY, compose_job
from training.run_contents import differences

Batches = list[tuple[Tensor, Tensor]]


def build(name: str, **options: Any) -> DataModule:
    return build_custom(target=f"data.own_data.{name}", batch_size=4, **options)


def read(data: DataModule, stage: str = "train", epoch: int = 0) -> Batches:
    data.setup()
    loader = getattr(data, f"{stage}_dataloader")()
    if stage == "train":
        loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch) for batch in loader]


def same(first: Batches, second: Batches) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_items_draw_by_seed_epoch_and_item() -> None:
    first, drawn = read(build("datasets")), torch.rand(3)
    second = read(build("datasets"))
    assert same(first, second)  # whatever else was drawn meanwhile
    assert not torch.equal(drawn, torch.rand(3))  # and it is left alone
    rows = torch.cat([inputs for inputs, _ in first])
    assert sorted(rows[:, 1].tolist()) == list(range(12))
    later = torch.cat([inputs for inputs, _ in read(build("datasets"), epoch=1)])
    of_item = dict(zip(later[:, 1].tolist(), later[:, 0].tolist(), strict=True))
    assert all(of_item[item] != noise for noise, item in rows.tolist())
    shares = []
    for rank in range(2):
        data = build_custom(target="data.own_data.datasets", batch_size=2)
        data._place_among_processes = lambda rank=rank: (rank, 2)  # type: ignore[method-assign]
        shares.append(read(data))
    joined = [
        tuple(torch.cat(parts) for parts in zip(*pair, strict=True))
        for pair in zip(*shares, strict=True)
    ]
    assert same(first, joined)  # type: ignore[arg-type]
    assert same(read(build("datasets"), "val"), read(build("datasets"), "val"))


def test_a_module_gives_its_datasets_and_hooks() -> None:
    plain, hooked = read(build("datasets")), read(build("Module"))
    assert same(hooked, [(2 * (inputs + 1), targets) for inputs, targets in plain])
    module = build("Module")
    assert same(read(module, "val"), read(build("Module"), "val"))
    classes = torch.cat([targets for _, targets in read(module, "val")])
    assert module.describe()["chance"] == int(classes.bincount().max()) / len(classes)
    module = build("Module")
    read(module, "test")
    assert module._module.stages == ["fit", "test"]  # type: ignore[attr-defined]
    assert module._module.batch_size == 4  # type: ignore[attr-defined]


def test_what_is_memfolds_is_used_as_it_is() -> None:
    found = build("returns_digits", seed=7)
    assert (type(found), found.seed) == (Digits, 7)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("none", {}, "data.own_data has no module or attribute 'none'"),
        (
            "datasets",
            {"rows": 3},
            r"data\.args=\{'rows': 3\}: .*; the signature of data\.target",
        ),
        ("returns_number", {}, r"gives int, must give memfold\.data\.custom\.Datasets or"),
        ("WithoutSpec", {}, r"`spec` must be a memfold\.data\.spec\.DataSpec, .*, got nothing"),
        ("datasets", {"spec": 3}, "`spec` must be a .*, got int"),
        ("WithoutValidation", {}, "has no val_dataloader"),
        ("WithoutTest", {}, "has no test_dataloader"),
        ("datasets", {"size": 0}, "train has no items"),
        ("datasets", {"train": [(None, 1)] * 12}, "train: 4 items make no batch: TypeError: defau"),
        (
            "datasets",
            {"train": [(torch.ones(1 + number % 2), 1) for number in range(12)]},
            "train: 4 items make no batch: RuntimeError: stack expects each tensor",
        ),
        ("datasets", {"train": Stream()}, "train must be a dataset with a length.*, got Stream"),
        ("Module", {"loader": lambda: DataLoader(Stream())}, "must be a dataset with a length"),
        ("Module", {"loader": lambda: [1, 2]}, "must give one torch DataLoader, got a list of int"),
        (
            "Module",
            {"loader": lambda: DataLoader(Drawing(9), sampler=WeightedRandomSampler([1] * 9, 9))},
            "has a sampler of its own, WeightedRandomSampler, and the order",
        ),
        ("datasets", {"size": 3}, r"data\.batch_size=4: .* at most 3"),
    ],
)
def test_what_is_missing_is_one_line(name: str, args: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        read(build(name, args=args))
    assert str(raised.value).startswith("data.")
    assert "\n" not in str(raised.value)


ROWS, LABELS = torch.ones(8, 2), torch.zeros(8, dtype=torch.int64)
IMAGES, TOKENS = DataSpec(Images(1, 3, 3), Classes(2)), DataSpec(Tokens(5, 6), NextToken(5))
NUMBERS = DataSpec(Table(1, (2,)), Reals((0.0,), (1.0,)))


@pytest.mark.parametrize(
    ("spec", "tensors", "reason"),
    [
        (IMAGES, (ROWS,), "must be a pair of tensors, inputs and targets, got a list of Tensor"),
        (IMAGES, (ROWS, LABELS), r"images must be torch\.float32 \(B, 1, 3, 3\), got .* \(4, 2\)"),
        (IMAGES, (torch.ones(8, 1, 3, 3).byte(), LABELS), r"got torch\.uint8"),
        (IMAGES, (torch.ones(8, 1, 3, 3), LABELS + 2), r"class 2 must be a whole number in 0\.\.1"),
        (IMAGES, (torch.ones(8, 1, 3, 3), ROWS), r"classes must be torch\.int64 \(4,\), got"),
        (NUMBERS, (ROWS, torch.ones(8)), r"numbers must be torch\.float32 \(4, 1\), got .* \(4,\)"),
        (
            NUMBERS,
            (2 * ROWS, torch.ones(8, 1)),
            r"code in column 1 2 must be a whole number in 0\.\.1",
        ),
        (
            TOKENS,
            (LABELS[:, None] + 5, LABELS[:, None]),
            r"token 5 must be a whole number in 0\.\.4",
        ),
        (TOKENS, (LABELS[:, None], LABELS), r"next tokens must be torch\.int64 \(4, 1\)"),
        (TOKENS, (torch.zeros(8, 7).long(), LABELS), r"tokens must be torch\.int64 \(B, 6\)"),
    ],
)
def test_batches_that_are_not_what_the_spec_says(
    spec: DataSpec, tensors: tuple[Tensor, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = TensorDataset(*tensors)
    made: Callable[[], Datasets] = lambda: Datasets(spec, sets, sets, sets)  # noqa: E731
    monkeypatch.setattr("data.own_data.returns_number", made)
    with pytest.raises(InputError, match=reason) as raised:
        read(build("returns_number"))
    assert "\n" not in str(raised.value)


def test_the_example_of_the_docs_trains_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = (REPOSITORY / "docs" / "data.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", docs, re.M | re.S)
    (command,) = re.findall(r"^    python train.py (data=custom .*)$", docs, re.M)
    (tmp_path / "my_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [text.strip("'") for text in re.findall(r"'[^']*'|\S+", command)]
    overrides += ["trainer=cpu", "logger=csv", "trainer.max_epochs=2", "backbone.width=64"]
    overrides += ["optimizer.lr=0.01", "data.args.num_rows=400", "~callbacks.progress_bar"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = run(compose_job(whole, *overrides))
    assert result["metrics"]["test/acc"] > 0.7
    saving = "+callbacks.last_checkpoint.every_n_train_steps=3"
    cut_at = {"_target_": "training.signals.FailAt", "hook": "on_train_batch_end", "number": 11}
    failing = (f"+callbacks.cut.{key}={value}" for key, value in cut_at.items())
    with pytest.raises(RuntimeError, match="power cut"):
        run(compose_job(cut, *overrides, saving, *failing))
    run(compose_job(cut, *overrides, saving, f"resume={cut}"))
    assert not differences(cut, whole)
    with pytest.raises(InputError, match=r"data\.target=my_data\.spirals is no data of memfold"):
        load_model(whole)
    assert load_model(whole, allow=["my_data.spirals"]).head.weight.shape == (2, 64)
