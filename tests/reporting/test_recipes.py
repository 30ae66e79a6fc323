from memfold.reporting.recipes import recipe, short_recipe
from reporting.page.comparisons import one_run


def test_a_recipe_lists_what_differs():
    given = {"optimizer": "sgd", "optimizer.lr": 0.1, "data.train_subset": None}
    runs = [one_run(recipe=given | {"optimizer.lr": rate}) for rate in (0.1, 0.03, 1.0, 0.1)]
    assert recipe(runs) == {
        "epochs": "6",
        "steps": "564",
        "optimizer": "sgd",
        "optimizer.lr": "0.03 | 0.1 | 1",
        "data.train_subset": "null",
    }
    assert short_recipe(runs) == (
        "epochs 6, steps 564, data.train_subset null, optimizer sgd, optimizer.lr 0.03 | 0.1 | 1"
    )


def test_many_values_are_cut_short_and_names_come_in_order():
    runs = [one_run(recipe={"optimizer.lr": 10.0**-n, "scheduler": f"s{n}"}) for n in range(7)]
    assert recipe(runs)["optimizer.lr"] == "1e-06 | 1e-05 | ... | 0.1 | 1"
    assert recipe(runs)["scheduler"] == "s0 | s1 | ... | s5 | s6"


def test_without_a_recipe_the_command_tells_what_it_can():
    command = "python train.py experiment=lenet optimizer.lr=0.1 seed=3 data.root=/data ratio=0.1"
    (run,) = [one_run(command=command, steps=None)]
    assert recipe([run]) == {"epochs": "6", "experiment": "lenet", "optimizer.lr": "0.1"}
    assert recipe([one_run(command="", epochs=None, steps=None)]) == {}
