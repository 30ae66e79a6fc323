"""What the data of runs are called."""

import json

from hypothesis import given
from hypothesis import strategies as st

from memfold.runs.data_names import name_data, source_of

_PATHS = st.lists(st.sampled_from(["a", "b", "", "x.csv"]), max_size=4).map("/".join)
_VALUES = st.one_of(_PATHS, st.lists(_PATHS, max_size=5), st.integers(0, 3))
_SOURCES = st.dictionaries(st.sampled_from(["file", "files", "target"]), _VALUES, max_size=3)
_DATA = st.tuples(st.sampled_from(["table", "text"]), _SOURCES)


@given(st.lists(_DATA, max_size=6))
def test_names_are_equal_where_the_data_are_and_nowhere_else(data):
    names = name_data(data)
    keys = [json.dumps(one, sort_keys=True) for one in data]
    for name, key in zip(names, keys, strict=True):
        assert [other == name for other in names] == [other == key for other in keys]


def test_as_much_of_a_path_is_shown_as_tells_it_from_others():
    files = [("table", {"file": file}) for file in ("/a/b/x.csv", "/a/c/x.csv", "x.csv", "/y.csv")]
    assert name_data(files[:1]) == ["table x.csv"]
    assert name_data(files) == ["table b/x.csv", "table c/x.csv", "table x.csv", "table y.csv"]


def test_other_sources_are_written_shortly():
    texts = [f"/{number}.txt" for number in range(9)]
    data = [
        ("digits", {}),
        ("text", {"files": texts, "val_files": ["/v.txt"]}),
        ("custom", {"target": "pkg.Data", "args": {"n": 2, "kind": "a/b"}}),
        ("table", {"file": "/x.csv", "target": "km/h", "folds": 5}),
    ]
    assert name_data(data) == [
        "digits",
        "text 0.txt + 1.txt + 2.txt + 6 more, v.txt",
        "custom pkg.Data, n=2, kind=a/b",
        "table x.csv, km/h, folds=5",
    ]
    long, longer = (("custom", {"args": {"text": "x" * length}}) for length in (100, 101))
    assert max(map(len, name_data([long]))) == 80
    assert len(set(name_data([long, longer]))) == 2


def test_the_source_is_what_the_data_say_or_the_recipe():
    recipe = {"data.folder": "/p/q/", "data.target": None, "data.args": {}, "optimizer": "sgd"}
    assert source_of({}) == {}
    assert source_of({"recipe": None, "data_source": []}) == {}
    assert source_of({"recipe": recipe}) == {"folder": "/p/q"}
    assert source_of({"recipe": recipe, "data_source": {"folder": "/r"}}) == {"folder": "/r"}
    assert source_of({"recipe": {"data.fold": 0, "data.num_folds": 5}}) == {"folds": 5}
