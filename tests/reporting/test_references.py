import pytest

from memfold.errors import InputError
from memfold.reporting.records import Problem, Reference, Setting
from memfold.reporting.references import read_references
from memfold.runs.primary import Primary

HEAD = "method,dataset,model,ratio,accuracy\n"
SETTINGS = {Setting("cifar10", "vgg11_bn")}


def read_text(folder, text):
    file = folder / "published.csv"
    file.write_text(text)
    return read_references([file], SETTINGS)


def test_points_of_the_settings_at_hand_are_read(tmp_path):
    text = HEAD + "snip,cifar10,vgg11_bn,0.1,0.9\nsnip,cifar10,resnet20,0.1,0.8\n"
    references, problems = read_text(tmp_path, text)
    assert references == [Reference(Setting("cifar10", "vgg11_bn"), "snip", 0.1, 0.9)]
    assert problems == [
        Problem(
            "published.csv",
            "published curves for dataset cifar10, model resnet20 are not drawn: "
            "the runs are of cifar10, vgg11_bn",
        )
    ]


def test_columns_may_come_in_any_order_with_others(tmp_path):
    text = "source,accuracy,ratio,model,dataset,method\nx,0.9, 1 ,vgg11_bn,cifar10,rand\n"
    references, _ = read_text(tmp_path, "\ufeff" + text)
    assert [(r.method, r.ratio, r.accuracy) for r in references] == [("rand", 1.0, 0.9)]


def test_a_point_that_is_published_twice_is_drawn_once(tmp_path):
    text = HEAD + "".join(f"snip,cifar10,vgg11_bn,0.1,{share}\n" for share in (0.9, 0.9, 0.8))
    references, (problem,) = read_text(tmp_path, text)
    assert [reference.accuracy for reference in references] == [0.9]
    assert problem.reason == (
        "snip at ratio 0.1 of cifar10, vgg11_bn is published twice, as 0.9 and 0.8: "
        "the first is drawn"
    )


def test_a_file_without_points_is_named(tmp_path):
    assert read_text(tmp_path, HEAD)[1] == [Problem("published.csv", "holds no published accuracy")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns must be method,dataset,model,ratio,accuracy"),
        ("method,ratio\n", "missing: dataset, model, accuracy"),
        (
            HEAD + "snip,cifar10,vgg11_bn,0.1,90.5\n",
            "line 2: accuracy must be a number from 0 to 1",
        ),
        (HEAD + "snip,cifar10,vgg11_bn,0.1,nan\n", "not percent; got nan"),
        (HEAD + "snip,cifar10,vgg11_bn,0,0.9\n", "ratio must be a number"),
        (HEAD + "snip,cifar10,vgg11_bn,ten,0.9\n", "got ten"),
        (HEAD + "snip,cifar10,vgg11_bn,0.1\n", "line 2: no value for accuracy"),
        (HEAD + ",cifar10,,0.1,0.9\n", "no value for method, model"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read_text(tmp_path, text)
    assert message in str(caught.value)
    assert "published.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv cannot be read"):
        read_references([tmp_path / "nowhere.csv"], SETTINGS)


def test_published_accuracies_are_not_drawn_beside_another_metric(tmp_path):
    (tmp_path / "p.csv").write_text(HEAD + "snip,shakespeare,gpt,0.1,0.9\n")
    language = Setting("shakespeare", "gpt", Primary("val/bpb", "min", "bits per byte"))
    references, (problem,) = read_references([tmp_path / "p.csv"], {language})
    assert references == []
    assert problem.reason.endswith("the runs are of shakespeare, gpt, bits per byte")
