"""A sweep folder from somebody else: it may say what was trained, not which code runs here."""

from pathlib import Path

import pytest

from memfold.errors import InputError
from memfold.studies.sweep_plan import expand_sweep_arguments, resume_arguments
from runs.unsafe_overrides import UNSAFE
from studies.sweeps import write_plan


def sweep_folder(folder: Path, *arguments: str) -> Path:
    write_plan(folder, ["-m", *arguments], ["seed=1"])
    return folder


@pytest.mark.parametrize(
    "text",
    [
        *(text for text in UNSAFE if text != "hydra/launcher=joblib"),
        "backbone.target=os.system,a.B",
        "hydra.launcher.setup=[rm]",
        "+hydra.launcher._target_=os.system",
        "hydra.launcher.submitit_folder=/home",
        "hydra.launcher.partition='x y'",
        "+hydra.sweeper.params.seed='1,2'",
        "hydra.sweep.subdir=../x",
        "hydra.sweep.subdir='${oc.env:X}'",
        "hydra.sweep.subdir='${oc.decode:1}'",
        "--config-dir=/tmp/evil",
        "-cd",
    ],
)
def test_a_sweep_folder_names_no_code(text: str, tmp_path: Path) -> None:
    sweep_folder(tmp_path, "seed=1,2", text)
    with pytest.raises(InputError, match="give it again: ") as caught:
        expand_sweep_arguments(["-m", f"sweep.resume={tmp_path}"])
    assert "\n" not in str(caught.value)
    assert resume_arguments(tmp_path) == ["-m", f"sweep.resume={tmp_path}", text]
    if "sweep.dir" not in text:
        assert text in expand_sweep_arguments(resume_arguments(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "seed=range(1,5)",
        "ratio=0.1,0.2",
        "optimizer.lr=interval(0.1,1)",
        "compression=snip,rigl",
        "compression=glob(s*)",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=60",
        "hydra.sweep.subdir='${hydra:job.num}'",
        "hydra.sweep.subdir='lr${optimizer.lr}/s${seed}'",
    ],
)
def test_plain_arguments_of_a_sweep_are_kept(text: str, tmp_path: Path) -> None:
    sweep_folder(tmp_path, text)
    assert text in expand_sweep_arguments(["-m", f"sweep.resume={tmp_path}"])
    assert resume_arguments(tmp_path) == ["-m", f"sweep.resume={tmp_path}"]
