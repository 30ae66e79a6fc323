"""The W&B sweep file: every command that an agent would start is one that train.py knows."""

import itertools
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

ROOT = Path(__file__).parents[1]
SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())


def commands() -> list[list[str]]:
    """What W&B's agent makes of the file, for every point of the grid."""
    keys = SWEEP["parameters"].keys()
    found = []
    for values in itertools.product(*(SWEEP["parameters"][key]["values"] for key in keys)):
        arguments = {key: {"value": value} for key, value in zip(keys, values, strict=True)}
        macros = create_sweep_command_args({"args": arguments})
        macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
        macros["program"] = [SWEEP["program"]]
        command = []
        for part in create_sweep_command(list(SWEEP["command"])):
            is_macro = part.startswith("${") and part.endswith("}")
            command += macros[part[2:-1]] if is_macro else [part]
        found.append(command)
    return found


def test_every_command_starts_train_py_with_a_configuration_it_knows() -> None:
    started = commands()
    assert len(started) == len({tuple(command) for command in started}) >= 12
    for command in started:
        if "seed=1" not in command:
            continue
        assert command[:3] == ["/usr/bin/env", "python", "train.py"]
        assert (ROOT / command[2]).is_file()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name="train"):
            cfg = compose("train", command[3:])
        assert cfg.logger["_target_"] == "memfold.logging.wandb_run.wandb_logger"
    strategies = {text for command in started for text in command if "compression=" in text}
    assert len(strategies) == len(SWEEP["parameters"]["compression"]["values"])


def test_the_sweep_is_one_that_wandb_takes_and_is_judged_on_validation() -> None:
    assert SWEEP["method"] == "grid"
    assert SWEEP["metric"] == {"name": "val/best_acc", "goal": "maximize"}
    assert all(set(one) == {"values"} for one in SWEEP["parameters"].values())
    assert {"compression", "ratio", "seed"} <= SWEEP["parameters"].keys()
