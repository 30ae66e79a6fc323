"""Tables: what is measured comes from the training rows, and every row is seen once."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from memfold.data.breast_cancer import BreastCancer
from memfold.data.diabetes import Diabetes
from memfold.data.spec import Classes, Reals, Table
from memfold.data.table import TableFile
from memfold.data.tables.columns import column_of
from memfold.data.tables.data_module import TableDataModule
from memfold.data.tables.encoding import mean_and_std
from memfold.errors import InputError


class Small(TableDataModule):
    """60 rows: a number, one with gaps, a category; the target is a class or a number."""

    name = "small"
    is_class = True

    def read_table(self):
        generator = np.random.default_rng(0)
        gaps = generator.normal(5, 2, 60)
        gaps[::7] = np.nan
        colours = np.array(["red", "green", None, "blue"] * 15, dtype=np.object_)
        columns = {"a": np.arange(60.0), "b": gaps, "colour": colours}
        target = np.arange(60) % 3 if self.is_class else np.arange(60) / 7
        return columns, {"y": target.astype(np.float64)}


def test_numbers_are_standardised_by_the_training_rows() -> None:
    data = Small(batch_size=60)
    data.setup()
    assert data.spec.inputs == Table(3, (4,))
    train = next(iter(data.scoring_batches(0)))[0]
    known = train[:, 1][train[:, 2] == 0]
    for column in (train[:, 0], known):
        assert float(column.mean()) == pytest.approx(0, abs=1e-6)
        assert float(column.std(correction=0)) == pytest.approx(1, rel=1e-6)
    assert torch.equal(train[:, 1][train[:, 2] == 1], torch.zeros(int(train[:, 2].sum())))
    assert set(train[:, 3].tolist()) == {0, 1, 2, 3}


def test_every_row_is_in_one_split_and_each_class_in_its_share() -> None:
    data = Small()
    data.setup()
    parts = [data._parts[split] for split in ("train", "val", "test")]
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    for part in parts:
        counts = torch.bincount(part % 3, minlength=3)
        assert int(counts.max() - counts.min()) <= 1
    other = Small(split_seed=1)
    other.setup()
    for split in ("train", "val", "test"):
        assert not torch.equal(other._parts[split], data._parts[split])


def test_folds_part_the_rows() -> None:
    tests = []
    for fold in range(4):
        data = Small(fold=fold, num_folds=4)
        data.setup()
        tests.append(data._parts["test"])
    assert sorted(torch.cat(tests).tolist()) == list(range(60))


def test_reals_come_back_in_their_unit() -> None:
    data = Small(target_type="reals")
    data.is_class = False
    data.setup()
    target = data.spec.target
    assert isinstance(target, Reals)
    rows = data._rows
    assert rows is not None
    values = rows.targets.double()[:, 0] * target.std[0] + target.mean[0]
    torch.testing.assert_close(
        values, torch.arange(60) / 7, rtol=1e-6, atol=1e-5, check_dtype=False
    )


def test_the_facts_of_a_run_stand_for_the_table(tmp_path: Path) -> None:
    first = BreastCancer()
    first.write_facts(tmp_path)
    second = BreastCancer()
    second.read_table = None  # type: ignore[assignment]
    second.read_facts(tmp_path)
    assert second.spec == first.spec
    (tmp_path / "data.json").write_text(json.dumps({"numeric": []}))
    with pytest.raises(InputError, match=r"data\.json cannot be read"):
        BreastCancer().read_facts(tmp_path)


def test_tables_that_ship_with_scikit_learn() -> None:
    cancer, diabetes = BreastCancer(), Diabetes()
    assert cancer.spec.inputs == Table(30)
    assert cancer.spec.target == Classes(2, ("benign", "malignant"))
    assert diabetes.spec.inputs == Table(10)
    assert diabetes.spec.target.num_outputs == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop": ["z"]}, r"data\.drop: there is no column 'z'; columns: a, b, colour"),
        ({"categorical": ["z"]}, r"data\.categorical: there is no column 'z'"),
        ({"drop": ["a", "b", "colour"]}, "leaves no column"),
        ({"categorical": ["a"], "max_categories": 9}, r"'a' has \d+ categories.*max_categories=9"),
        ({"test_fraction": 0.001}, "leave none for test"),
    ],
    ids=str,
)
def test_options_that_do_not_suit_the_table(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Small(**options).setup()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fold": 5}, r"data\.fold=5 must be below"),
        ({"num_folds": 1}, r"data\.num_folds must be .* at least 2, got 1"),
        (
            {"target_type": "class"},
            r"data\.target_type must be auto, classes or reals, got 'class'",
        ),
        ({"drop": "a"}, r"data\.drop must be a list"),
    ],
    ids=str,
)
def test_bad_options_name_the_key(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Small(**options)


CSV = "size,kind,price\n" + "".join(f"{i},{'ab'[i % 2]},{i * 1.5}\n" for i in range(40))


def read(folder: Path, content: str, target: object = "price", **options: object) -> TableFile:
    file = folder / "x.csv"
    file.write_text(content)
    data = TableFile(file=str(file), target=target, **options)
    data.setup()
    return data


def test_a_csv_file(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    data = read(tmp_path, CSV)
    assert data.spec.inputs == Table(1, (3,))
    assert isinstance(data.spec.target, Reals)
    assert read(tmp_path, CSV, "kind").spec.target == Classes(2, ("a", "b"))
    assert read(tmp_path, CSV, ["price", "size"]).spec.num_outputs == 2


def test_numbers_that_name_classes_and_categories_stay_apart(tmp_path: Path) -> None:
    """As text of six digits the first two would be one."""
    pytest.importorskip("pandas")
    rows = [(1234567 + i % 3, [0.12345678, 0.12345679, 5][i % 3]) for i in range(60)]
    content = "a,b,y\n" + "".join(f"{i},{b},{y}\n" for i, (y, b) in enumerate(rows))
    data = read(tmp_path, content, "y", categorical=["b"])
    assert data.spec.inputs == Table(1, (4,))
    assert data.spec.target == Classes(3, ("1234567", "1234568", "1234569"))


def test_whole_numbers_that_float64_does_not_hold_stay_apart(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    first = 2**53
    rows = [(["", first + 1, first, first + 2][i % 4], first + i % 2) for i in range(60)]
    content = "a,b,y\n" + "".join(f"{i},{b},{y}\n" for i, (b, y) in enumerate(rows))
    data = read(tmp_path, content, "y", categorical=["b"])
    assert data.spec.target == Classes(2, (str(first), str(first + 1)))
    assert data.encoding.categorical[0].categories == tuple(str(first + i) for i in range(3))
    columns = {"a": column_of([1.0, 2.0]), "b": column_of([first + 1, None])}
    assert data.encoding.inputs(columns)[:, 1].tolist() == [2, 0]
    numbers = read(tmp_path, content, "y").encoding.numeric[1]
    assert (numbers.mean, numbers.has_missing) == (pytest.approx(first), True)
    many = "a,y\n" + "".join(f"{i},{first + i % 21}\n" for i in range(84))
    assert isinstance(read(tmp_path, many, "y").spec.target, Reals)


def test_parquet_decimals_are_numbers_and_a_named_index_is_a_column(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "size": np.arange(40.0),
            "count": pandas.array([1, 2, None, 4] * 10, dtype="Int64"),
            "price": [Decimal(i) / 4 for i in range(40)],
            "grade": pandas.Categorical(["u", "v", None, "u"] * 10),
        }
    )
    file = tmp_path / "x.parquet"
    frame.set_index("size").to_parquet(file)
    data = TableFile(file=str(file), target="price")
    data.setup()
    assert isinstance(data.spec.target, Reals)
    assert data.spec.inputs == Table(3, (3,))  # size, count, and whether it is missing
    assert data._rows is not None
    columns = {str(name): column_of(frame[name]) for name in frame}
    assert torch.equal(data.encoding.inputs(columns), data._rows.inputs)
    frame.set_index("size").assign(size=1).to_parquet(file)
    with pytest.raises(InputError, match="cannot insert size, already exists"):
        TableFile(file=str(file), target="price").setup()


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0])
def test_numbers_of_any_size_are_standardised(scale: float) -> None:
    values = np.random.default_rng(0).normal(3, 2, 50)
    mean, std = mean_and_std(values * scale)
    assert (mean, std) == (
        pytest.approx(values.mean() * scale, rel=1e-12),
        pytest.approx(values.std() * scale, rel=1e-12),
    )
    assert mean_and_std(np.full(56, 0.1) * scale)[1] == 0


def test_truth_values_are_numbers_and_two_classes(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    content = "a,b,y\n" + "".join(f"{i},{i % 3 == 0},{i % 2 == 0}\n" for i in range(40))
    data = read(tmp_path, content, "y")
    assert (data.spec.inputs, data.spec.target) == (Table(2), Classes(2, ("0", "1")))
    gaps = "a,b,y\n" + "".join(f"{i},{('True', 'False', '')[i % 3]},{i % 2}\n" for i in range(40))
    assert read(tmp_path, gaps, "y").spec.inputs == Table(3)  # and whether b is missing


@pytest.mark.parametrize(
    ("content", "target", "reason"),
    [
        (CSV, "cost", r"data\.target=cost: x\.csv has no such column; columns: size, kind, price"),
        (CSV.replace(",a,", ",b,"), "price", "column 'kind' is constant in the training rows"),
        (CSV.replace("\n5,b", "\n5,c"), "kind", r"class 'c' is seen 1 time\(s\)"),
        (
            CSV.replace(",7.5\n", ",much\n"),
            ["price", "size"],
            r"price: row 6 has 'much', and numbers",
        ),
        (CSV.replace(",7.5\n", ",much\n"), "price", r"has numbers, and in row 6 'much'; mend that"),
        (CSV.replace(",7.5\n", ",\n"), "price", r"data\.target=price: row 6 has no number"),
        (CSV.replace(",7.5\n", ",inf\n"), "price", r"data\.target=price: row 6 has inf"),
        (CSV.replace("\n5,", "\nfive,"), "price", r"'size' has numbers, and in row 6 'five'"),
        (CSV.replace("\n5,", "\n1e39,"), "price", r"column 'size': row 6 has 1e\+39"),
        (CSV.replace("kind", "price"), "price", "two columns are called 'price'"),
        (CSV.replace("size", ""), "price", "column 1 has no name; a saved index"),
        (CSV.replace("size,", ""), "price", "Expected 2 fields in line 2, saw 3"),
        (CSV.replace(",a,", ",b,"), ["price", "price"], "names a column twice"),
        ("".join(f"{line}\n" for line in ["y", *range(40)]), "y", "no column beside the target"),
        (
            "a,y\n" + "".join(f"on {i},{i / 3}\n" for i in range(40)),
            "y",
            "another text in every row",
        ),
        (
            "a,y\n" + "".join(f"{i},0.1\n" for i in range(80)),
            "y",
            r"data\.target=y: is constant in the training rows",
        ),
        (CSV.replace(",a,", ",NA,"), "kind", "row 1 has no value .in a .csv NA, None, null and"),
        ("a,y\n1,2\n", "y", "all rows are '2', one class"),
        ("a,y\n1,2.5\n", "y", "1 rows leave none for test"),
        ("", "price", "EmptyDataError"),
        ("size,price\n", "price", "has no rows"),
    ],
)
def test_bad_tables_give_one_line(
    tmp_path: Path, content: str, target: object, reason: str
) -> None:
    pytest.importorskip("pandas")
    with pytest.raises(InputError, match=reason) as raised:
        read(tmp_path, content, target)
    assert "\n" not in str(raised.value)


def test_without_pandas_the_line_installs_the_extra_as_the_readme_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    data = TableFile(file=str(tmp_path / "flats.csv"), target="price")
    with pytest.raises(InputError, match=r"pip install -c constraints\.txt -e '\.\[tables\]'"):
        data.setup()


def test_a_result_knows_the_most_frequent_class_of_a_file(tmp_path: Path) -> None:
    rows = [f"{number},{'yes' if number % 4 else 'no'}" for number in range(200)]
    (tmp_path / "t.csv").write_text("\n".join(["x,bought", *rows]))
    table = TableFile(file=str(tmp_path / "t.csv"), target="bought")
    table.setup("fit")
    classes = torch.cat([targets for _, targets in table.val_dataloader()])
    assert table.describe()["chance"] == int(classes.bincount().max()) / len(classes)
