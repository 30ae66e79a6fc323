"""Raw images, rows and texts to predictions, with nothing but a run folder."""

import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from memfold.data.cifar10 import CIFAR10
from memfold.data.cifar100 import CIFAR100
from memfold.data.digits import Digits
from memfold.data.fashion_mnist import FashionMNIST
from memfold.data.image_folder import ImageFolder
from memfold.data.mnist import MNIST
from memfold.errors import InputError
from memfold.training import Predictor, load_model, read_data, run
from training.jobs import REPOSITORY, SMALL, compose_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    overrides = ("compression=stable_rps", "ratio=0.3", "trainer.max_epochs=2", "artifact.bits=8")
    run(compose_job(folder, *SMALL, *overrides))
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor(folder)


@pytest.fixture(scope="module")
def colour(predictor: Predictor) -> Predictor:
    """One for 32x32 images in three channels, whose network nobody asks."""
    colour = Predictor.__new__(Predictor)
    colour._data = CIFAR10()
    return colour


def test_raw_test_images_give_what_the_run_measured(folder: Path, predictor: Predictor) -> None:
    data = Digits()
    data.setup("test")
    network = load_model(folder)
    hits = []
    for images, labels in data.test_dataloader():
        normalised, _ = data.on_after_batch_transfer((images, labels))
        assert torch.equal(predictor.prepare(images), normalised)
        logits = predictor(images)
        assert not logits.requires_grad
        assert torch.equal(logits, network(normalised))
        hits.append(logits.argmax(1) == labels)
    measured = json.loads((folder / "result.json").read_text())["metrics"]["packed/test/acc"]
    assert float(torch.cat(hits).float().mean()) == pytest.approx(measured, abs=1e-6)


def run_example(page: str, marker: str, run: Path, **names: Any) -> dict[str, Any]:
    """Run the lines of a page that have a marker, on a run, and return what they define."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (lines,) = (e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if marker in e)
    exec(lines.replace("outputs/DATE/TIME", str(run)), names)
    return names


def test_the_lines_of_the_readme(folder: Path, predictor: Predictor) -> None:
    images = torch.randint(256, (4, 8, 8), dtype=torch.uint8).numpy()
    names = run_example("README.md", "Predictor", folder, images=images)
    assert torch.equal(names["classes"], predictor(images).argmax(1))


def as_pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()) for image in images]


@pytest.mark.parametrize(
    "layout",
    [
        lambda images: images,
        lambda images: list(images),
        lambda images: tuple(image[None] for image in images),
        lambda images: images.movedim(1, -1).numpy(),
        lambda images: [image.movedim(0, -1).numpy() for image in images],
        as_pictures,
        lambda images: [images[0], *as_pictures(images[1:])],
    ],
)
@pytest.mark.parametrize("name", ["predictor", "colour"])
def test_every_layout_of_the_same_images_is_the_same(
    name: str, layout: Callable[[Tensor], Any], request: pytest.FixtureRequest
) -> None:
    predictor: Predictor = request.getfixturevalue(name)
    data = predictor._data
    shape = (5, data.num_channels, data.image_size, data.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    expected, _ = data.on_after_batch_transfer((images, torch.zeros(5)))
    assert torch.equal(predictor.prepare(layout(images)), expected)


def test_grey_images_need_no_channel_and_one_image_is_a_batch_of_one(predictor: Predictor) -> None:
    image = torch.randint(256, (8, 8), dtype=torch.uint8)
    expected = predictor(image[None, None])
    assert expected.shape == (1, 10)
    one_row = (image, image.numpy(), Image.fromarray(image.numpy()), image[None], [image])
    assert all(torch.equal(predictor(same), expected) for same in one_row)
    assert predictor(image.expand(3, 8, 8)).shape == (3, 10)
    assert predictor(image.expand(3, 8, 8).numpy()).shape == (3, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8)), "uint8 arrays or tensors .* got float64"),
        (torch.zeros(1, 8, 8), "not normalised: that is done here.* got torch.float32"),
        ([], "or a list of such, got none"),
        ("image.png", "image.png: .*No such file"),
        (np.zeros((28, 28), np.uint8), r"must have shape \(8, 8, 1\) \(H, W, C\).*got \(28, 28\)"),
        (torch.zeros(3, 3, 8, 8, dtype=torch.uint8), r"must have shape \(1, 8, 8\) \(C, H, W\)"),
        (Image.new("L", (9, 8)), "image: 8 x 9 pixels, expected 8 x 8"),
        (Image.new("I", (8, 8)), "image: mode I has levels without a known highest"),
        (Image.new("F", (8, 8)), "image: mode F has levels without a known highest"),
        (Image.new("LAB", (8, 8)), "image: ValueError: conversion from LAB to RGB not supported"),
    ],
)
def test_other_images_are_refused_in_one_line(
    predictor: Predictor, images: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        predictor(images)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two classes of files of every kind: grey, wide, of 16 bits, turned, indexed."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x112] = 6  # the camera was held on its side
    for name, least in (("dark", 0), ("light", 120)):
        (folder / "in" / name).mkdir(parents=True)
        for number in range(5):
            colour = Image.fromarray(draw.integers(least, least + 99, (20, 24, 3), np.uint8))
            levels = draw.integers(256 * least, 256 * least + 25000, (30, 20), np.uint16)
            for image, file in (
                (colour, "wide.png"),
                (colour.convert("L"), "grey.png"),
                (colour.quantize(16), "indexed.png"),
                (Image.fromarray(levels), "deep.png"),
            ):
                image.save(folder / "in" / name / f"{number}{file}")
            colour.save(folder / "in" / name / f"{number}turned.jpg", exif=turned)
    (folder / "in" / "dark" / "1wide.png").write_bytes(b"damaged")
    data = (
        f"data.folder={folder / 'in'}",
        f"data.root={folder}",
        "data.skip_damaged=true",
        "data.test_fraction=0.4",
    )
    options = ("data=image_folder", "data.image_size=20", "data.batch_size=8", *data)
    run(compose_job(folder / "run", *SMALL, "trainer.max_epochs=1", *options))
    return folder / "run"


def test_files_of_any_kind_give_what_the_evaluation_measured(pictures: Path) -> None:
    predict = Predictor(pictures)
    _, data = read_data(pictures)
    assert isinstance(data, ImageFolder)
    data.setup("test")
    inputs = torch.cat([data.on_after_batch_transfer(b)[0] for b in data.test_dataloader()])
    files = data.test_files()
    assert len({file.name.strip("01234") for file in files}) == 5
    assert torch.equal(predict.prepare(files), inputs)
    assert torch.equal(predict.prepare([Image.open(file) for file in files]), inputs)
    assert torch.equal(predict.prepare(str(files[0])), inputs[:1])
    logits = predict(files)
    assert torch.equal(logits, predict.network(inputs))
    assert predict.class_names == ("dark", "light")
    with pytest.raises(InputError, match=r"shape \(20, 20, 3\) .*got \(20, 24, 3\)"):
        predict(np.zeros((20, 24, 3), np.uint8))


def test_the_lines_of_the_page_on_files(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures.parent)
    draw = np.random.default_rng(1)
    for name in ("first.jpg", "second.png"):
        Image.fromarray(draw.integers(0, 255, (40, 30, 3), np.uint8)).save(name)
    labels = run_example("docs/export.md", "first.jpg", pictures)["labels"]
    assert len(labels) == 2
    assert set(labels) <= {"dark", "light"}
    run_example("docs/export.md", "test_files", pictures)
    measured = json.loads((pictures / "result.json").read_text())["metrics"]["test/acc"]
    assert float(capsys.readouterr().out) == pytest.approx(measured, abs=1e-6)


def test_every_class_of_a_data_set_has_a_name(predictor: Predictor) -> None:
    assert predictor.class_names == tuple("0123456789")
    for kind in (MNIST, FashionMNIST, CIFAR10, CIFAR100):
        assert len(set(kind.class_names)) == kind.num_classes
    assert CIFAR10.class_names[9] == "truck"
    assert CIFAR100.class_names[39] == "keyboard"


def test_channels_stand_where_the_library_has_them(colour: Predictor) -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for swapped in (images.numpy(), images.movedim(1, -1)):
        with pytest.raises(InputError, match="images of cifar10 must have shape"):
            colour.prepare(swapped)


def test_rows_give_numbers_in_the_unit_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    age, area = draw.integers(0, 90, 200), draw.normal(80, 20, 200)
    flats = pandas.DataFrame({"age": age, "area": area, "price": 3000 * area - 500 * age})
    flats.to_csv("flats.csv", index=False)
    overrides = ("data=table", "data.file=flats.csv", "data.target=price", "optimizer=adamw")
    result = run(compose_job(tmp_path / "run", *SMALL, *overrides, "trainer.max_epochs=2"))
    capsys.readouterr()
    names = run_example("docs/export.md", "flats.csv", tmp_path / "run")
    measured = result["metrics"]["test/rmse"]
    assert measured > 1000
    assert float(capsys.readouterr().out) == pytest.approx(measured)
    predict, rows = names["predict"], names["rows"]
    assert predict.class_names is None
    table = {name: flats[name].to_numpy()[rows].tolist() for name in ("age", "area")}
    found = predict(table)
    assert found.shape == (len(rows), 1)
    assert found.dtype == torch.float64
    assert torch.equal(predict(names["table"]), found)  # the price is left out
    days = [date(2026, 1, 1)] * len(rows)
    assert torch.equal(predict({**table, "day": days}), found)  # not of the table: left out
    for samples, message in (
        ([1.0], "rows must be given as column -> values, got list"),
        ({**table, "age": [1.0]}, "the columns have different numbers of rows"),
        ({**table, "age": 1.0}, "column 'age' must be a sequence of numbers or of texts"),
        ({**table, "age": ["old"] * len(rows)}, "column 'age' has text where numbers were"),
        ({"age": [1.0]}, "there is no column"),
    ):
        with pytest.raises(InputError, match=message):
            predict(samples)
    with pytest.raises(InputError, match="data=table has no text"):
        predict.generate("a", 3)


def test_a_language_model_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line of a book that says little.\n" * 80)
    overrides = (f"data.files=[{tmp_path / 'book.txt'}]", "data.length=16", "trainer.max_epochs=1")
    small = [text for text in SMALL if text != "backbone=mlp"]
    small += ["backbone=gpt", "backbone.width=16", "backbone.num_heads=2", "backbone.depth=1"]
    result = run(compose_job(tmp_path / "run", *small, "data=text", *overrides))
    predict = Predictor(tmp_path / "run")
    assert predict("A line").shape == (1, 6, 256)
    tokens = torch.tensor(list(b"A line"))
    assert torch.equal(predict(tokens), predict("A line"))
    text = predict.generate("A line", 9, seed=3)
    assert len(text) == 9
    assert text == predict.generate("A line", 9, seed=3)
    assert result["sample"] is not None
    for samples, message in (
        ("", "there must be tokens"),
        (tokens.float(), "got torch.float32"),
        (tokens[0], "got torch.int64"),
        (tokens + 256, "from 0 to 255"),
        (["ab", "abc"], r"must be one text \(predict each of several by itself\) or .* got list"),
    ):
        with pytest.raises(InputError, match=message):
            predict(samples)
    for options in ({"num_tokens": -1}, {"num_tokens": 1, "temperature": 0.0}):
        with pytest.raises(InputError, match="must be"):
            predict.generate("A line", **options)
