"""A run folder from somebody else: it may say what was trained, not which code runs here."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from memfold.backbones import MLP
from memfold.data.digits import Digits
from memfold.errors import InputError
from memfold.files import replacing
from memfold.overrides import quote_value
from memfold.runs.locks import locked
from memfold.runs.recorded import is_setting, read_config, read_overrides
from memfold.runs.resume import expand_arguments, resume_command
from memfold.tasks import Classification
from memfold.training import load_model
from memfold.training.instantiate import instantiate
from memfold.training.load import fresh_network, read_data
from memfold.training.teacher import load_distillation
from runs.unsafe_overrides import UNSAFE
from training.jobs import SMALL, compose_job

CUSTOM = ("backbone=custom", "backbone.target=training.networks.DropoutNet")


@functools.cache
def composed(*overrides: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return OmegaConf.to_yaml(compose_job(Path(folder), *overrides))


def record(folder: Path, *overrides: str) -> None:
    """Leave what a run has recorded; nothing is trained."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(composed(*overrides))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / ".hydra" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    edit(config)
    file.write_text(yaml.safe_dump(config))


def hostile(folder: Path, text: str) -> Path:
    """Make a folder whose configuration makes the folder `ran`, if what it names is called."""
    record(folder, *SMALL)
    call = {"_target_": "os.mkdir", "path": str(folder / "ran")}
    group, *path = text.split(".")

    def edit(config: dict[str, Any]) -> None:
        place = config[group]
        for key in path[:-1]:
            place = place.setdefault(key, {})
        if path:
            place[path[-1]] = [call] if path[-1] == "listed" else call
        else:
            config[group] = call

    change(folder, edit)
    return folder


PLACES = [
    "backbone",
    "compression",
    "data",
    "backbone.width",
    "backbone.args.deep.er",
    "data.root",
    "data.listed",
    "compression.include",
    "compression.sparsity.x",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", [load_model, fresh_network, read_data])
def test_a_run_folder_names_no_code(read: Callable[[Path], object], place: str, tmp_path: Path):
    with pytest.raises(InputError, match=r"no other code|may name no code") as caught:
        read(hostile(tmp_path, place))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


TASK = Classification(Digits().spec, label_smoothing=0.0)


@pytest.mark.parametrize("place", [place for place in PLACES if place.startswith("backbone")])
def test_a_teacher_names_no_code(place: str, tmp_path: Path) -> None:
    config = student(tmp_path)
    hostile(tmp_path, place)
    with pytest.raises(InputError, match=r"no other code|may name no code"):
        load_distillation(config, TASK)
    assert not (tmp_path / "ran").exists()


def student(teacher: Path, *overrides: str) -> dict[str, Any]:
    record(teacher, *SMALL)
    (teacher / "result.json").write_text('{"status": "completed", "task": "classification"}')
    distill = {"teacher": str(teacher), "temperature": 4.0, "weight": 0.9, "allow": []}
    return {**read_config(teacher, ("backbone", "compression", "data", "task")), "distill": distill}


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("data", "memfold.data.source_files.unpack"),
        ("data", "memfold.data.source_files.shutil.rmtree"),
        ("data", "memfold.backbones.MLP"),
        ("backbone", "memfold.training.instantiate.hydra.utils.instantiate"),
        ("backbone", "memfold.backbones.custom.importlib.import_module"),
        ("backbone", "memfold.backbones.cnn.nn.Sequential"),
        ("backbone", "memfold.load"),
        ("backbone", "torch.nn.Identity"),
        ("backbone", "memfold.backbones.mlp"),
        ("backbone", "memfold..backbones.MLP"),
        ("backbone", ["memfold.backbones.MLP"]),
        ("compression", "memfold.artifact.load"),
        ("compression", None),
    ],
)
def test_only_classes_of_the_group_will_do(group: str, target: object, tmp_path: Path) -> None:
    record(tmp_path, *SMALL)
    change(tmp_path, lambda config: config[group].update(_target_=target))
    with pytest.raises(InputError, match=rf"{group}\._target_=.* is no {group} of memfold"):
        load_model(tmp_path)


def test_a_custom_backbone_is_named_again(tmp_path: Path) -> None:
    record(tmp_path, *SMALL[1:], *CUSTOM)
    with pytest.raises(InputError, match=r"allow=\['training\.networks\.DropoutNet'\]"):
        fresh_network(tmp_path)
    name = "training.networks.DropoutNet"
    assert type(fresh_network(tmp_path, allow=[name])).__name__ == "DropoutNet"
    change(tmp_path, lambda config: config["backbone"].update(target="memfold.backbones.MLP"))
    assert isinstance(fresh_network(tmp_path), MLP)

    teacher = tmp_path / "teacher"
    config = student(teacher)
    record(teacher, *SMALL[1:], *CUSTOM)
    with pytest.raises(InputError, match=rf"'distill\.allow=\[{name}\]'"):
        load_distillation(config, TASK)
    config["distill"]["allow"] = [name]
    with pytest.raises(InputError, match=r"artifact .* does not exist"):  # the next obstacle
        load_distillation(config, TASK)
    config["distill"]["allow"] = []
    config["backbone"]["target"] = name  # the student's own
    with pytest.raises(InputError, match=r"artifact .* does not exist"):
        load_distillation(config, TASK)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.create:{_target_: os.mkdir, path: ran}}",
        "${oc.decode:'{a: 1}'}",
        "${oc.env:A,${oc.env:B}}",
        "${hydra:run.dir}",
        "${now:%Y}",
        "${data}",
        "${data.long}",
        "${data.name}",
        "${.seed}",
        "${data[seed]}",
        r"\\${oc.create:{}}",
    ],
)
def test_a_configuration_refers_to_short_plain_values(value: str, tmp_path: Path) -> None:
    record(tmp_path, *SMALL)
    change(tmp_path, lambda c: c["data"].update(root=value, long="x" * 300, name="${seed}"))
    with pytest.raises(InputError, match=r"data\.root=.* may only refer to a plain value"):
        read_config(tmp_path, ["data"])


def test_references_that_runs_have_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, *SMALL, "seed=5", "artifact.bits=8", "ratio=0.5")
    monkeypatch.setenv("MEMFOLD_DATA", "there")
    config = read_config(tmp_path, ["data", "compression", "seed", "task._target_"])
    assert (config["data"]["root"], config["data"]["seed"], config["seed"]) == ("there", 5, 5)
    assert (config["compression"]["bits"], config["compression"]["ratio"]) == (8, 0.5)
    assert config["task._target_"] == "memfold.tasks.task_for"
    change(tmp_path, lambda c: c["data"].update(root=r"a\${seed} ${oc.env:HOME}/${ratio}"))
    expected = f"a${{seed}} {os.environ['HOME']}/0.5"
    assert read_config(tmp_path, ["data"])["data"]["root"] == expected


@given(st.text("ab\\${}:."))
def test_arguments_are_not_resolved_again(text: str) -> None:
    assert instantiate({"_target_": "builtins.dict", "a": [text]}, "x") == {"a": [text]}


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "[" * 200_000, "a: &a {b: 1}\nc: *a", "\0", "a: !!python/name:os.system", "[1]"],
)
def test_a_damaged_configuration_is_one_line(text: str, tmp_path: Path) -> None:
    record(tmp_path, *SMALL)
    for name in ("config.yaml", "overrides.yaml"):
        (tmp_path / ".hydra" / name).write_text(text)
    for read in (load_model, read_overrides):
        if text == "[1]" and read is load_model:
            continue
        with pytest.raises(InputError, match="cannot be read: ") as caught:
            read(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", UNSAFE)
def test_overrides_of_a_folder_that_do_more_than_set_values(text: str, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    file = tmp_path / ".hydra" / "overrides.yaml"
    file.write_text(yaml.safe_dump(["seed=1", text]))
    with pytest.raises(InputError, match="give it again: ") as caught:
        expand_arguments([f"resume={tmp_path}"])
    assert "\n" not in str(caught.value)
    command = resume_command(tmp_path)
    assert command.startswith(f"python train.py resume={tmp_path} ")
    if not text.startswith("hydra.run.dir"):
        assert text in expand_arguments([f"resume={tmp_path}", text])


@pytest.mark.parametrize(
    "text",
    [
        "seed=1",
        "ratio=0.1",
        "budget_bytes=null",
        "backbone=mlp",
        "experiment=protocol/cifar10_resnet20",
        "data.root=/data/sets",
        "data.target=price",
        "data.target=[price,size]",
        "data.root='a b, [c]'",
        r"distill.teacher='/runs/\${x}'",
        "+backbone.args.width=48",
        "++backbone.args={width: 48, sizes: [1, 2]}",
        "optimizer.betas=[0.9,0.95]",
        "~callbacks.progress_bar",
        "callbacks.progress_bar=null",
        "compression.include=['fc*']",
        "logger.tags=[first,second]",
        "+callbacks.last_checkpoint.every_n_train_steps=10",
        "scheduler.milestones=[]",
    ],
)
def test_plain_overrides_of_a_folder_are_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([text]))
    assert expand_arguments([f"resume={tmp_path}"])[0] == text
    assert resume_command(tmp_path) == f"python train.py resume={tmp_path}"


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("new folder", "'resume={}/new folder'"),
        ("a,b", """'resume='"'"'{}/a,b'"'"''"""),
    ],
)
def test_the_command_quotes_no_more_than_shell_and_hydra_need(
    name: str, printed: str, tmp_path: Path
) -> None:
    assert resume_command(tmp_path / name) == f"python train.py {printed.format(tmp_path)}"


@given(st.text(st.characters(exclude_categories=["C"])))
def test_any_quoted_text_is_a_plain_value(text: str) -> None:
    assert is_setting(OverridesParser.create().parse_override(f"a.b={quote_value(text)}"))


@pytest.mark.parametrize("place", ["train.log", "checkpoints/last.ckpt", "rounds/0/result.json"])
def test_pipes_and_links_in_a_run_folder_are_refused(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record(folder, *SMALL)
    odd = folder / place
    odd.parent.mkdir(parents=True, exist_ok=True)
    (odd.parent / "inside").symlink_to(folder / ".hydra")
    (odd.parent / "loop").symlink_to("loop")
    expand_arguments([f"resume={folder}"])
    os.mkfifo(odd)
    with pytest.raises(InputError, match=f"{place} is no regular file"):
        expand_arguments([f"resume={folder}"])
    odd.unlink()
    for target in (tmp_path / "victim", tmp_path, Path("/dev/null")):
        odd.symlink_to(target)
        with pytest.raises(InputError, match=f"{place} is a link that leads out"):
            expand_arguments([f"resume={folder}"])
        odd.unlink()


def test_what_lies_where_a_file_is_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "a.partial").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "b.partial")
    for name in ("a", "b"):
        with replacing(tmp_path / name) as file:
            file.write(b"new")
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "victim").read_text() == "mine"
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(InputError, match="cannot write"), locked(tmp_path):
        pass


def test_weights_to_start_from_are_a_setting_wherever_they_are() -> None:
    parse = OverridesParser.create().parse_override
    assert is_setting(parse("init_from=/elsewhere/weights.pt"))
    assert not is_setting(parse("backbone=/elsewhere/weights.pt"))
