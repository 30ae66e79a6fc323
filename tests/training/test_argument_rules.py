"""Command lines that Hydra would not answer in one line."""

import pytest

from memfold.errors import InputError
from memfold.training.argument_rules import refuse_wrong_arguments


@pytest.mark.parametrize(
    "argument",
    [
        "compression=5",
        "optimizer=null",
        "task=1.5",
        "data=true",
        "scheduler=[1,2]",
        "backbone={a:1}",
        "compression=dense,5",
        "debug=1",
        "debug=null",
        "experiment=null,fashion_mnist_cnn",
        "hydra/launcher=null",
        "hydra.job.name=a/b",
        "hydra.output_subdir=null",
        "hydra.output_subdir=elsewhere",
        f"seed={'9' * 5000}",
        f"seed={'[' * 3000}{']' * 3000}",
    ],
    ids=lambda argument: argument[:30],
)
def test_what_would_be_a_traceback_is_one_line(argument: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_wrong_arguments(["-m", argument])
    assert str(caught.value).startswith(argument[:50])
    assert len(str(caught.value)) < 200


def test_what_is_right_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_wrong_arguments(["-m", "compression=dense,rigl", "debug=fast", "ratio=0.1,0.2"])
    refuse_wrong_arguments(["--cfg", "job", "~debug", "seed=range(1,3)", "data='digits'"])
    refuse_wrong_arguments(["resume=runs/1", "hydra.output_subdir=null"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuse_wrong_arguments(["hydra.output_subdir=null"])
