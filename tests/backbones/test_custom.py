"""`backbone=custom`: what it passes, and how it refuses."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from memfold.backbones import build_custom
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.training.networks import build_backbone

CONF = Path(__file__).parents[2] / "conf"

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes, depth=1):
        super().__init__()
        self.received = (in_channels, num_classes, depth)

class Outer:
    class Inner(nn.Module):
        def __init__(self, *, image_size):
            super().__init__()
            self.received = image_size

def forwards(**options):
    assert set(options) <= {"depth"}, options
    return nn.Linear(2, options["depth"])

def returns_number(num_classes):
    return num_classes

def raises(num_classes):
    raise RuntimeError("own trouble")

CONSTANT = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(MODULE)
    (folder / "broken.py").write_text("import a_package_that_is_not_there\n")
    (folder / "invalid.py").write_text("def :\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("outside", "outside.nets"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return "outside"


def image_spec(channels: int, size: int, num_classes: int) -> DataSpec:
    return DataSpec(Images(channels, size, size), Classes(num_classes))


def build(target: object, args: dict[str, object] | None = None) -> nn.Module:
    return build_custom(image_spec(3, 32, 10), target=target, args=args)


def test_passes_what_the_signature_names(package: str) -> None:
    assert build(f"{package}.nets.Net").received == (3, 10, 1)
    assert build(f"{package}.nets.Net", {"depth": 4}).received == (3, 10, 4)
    assert build(f"{package}.nets.Outer.Inner").received == 32


def test_args_win_over_the_facts(package: str) -> None:
    assert build(f"{package}.nets.Net", {"num_classes": 1000}).received == (3, 1000, 1)


def test_keyword_catch_alls_get_args_alone(package: str) -> None:
    assert build(f"{package}.nets.forwards", {"depth": 5}).out_features == 5


def test_a_class_of_torch() -> None:
    model = build("torch.nn.Linear", {"in_features": 4, "out_features": 2})
    assert isinstance(model, nn.Linear)


def test_the_target_keeps_its_own_errors(package: str) -> None:
    with pytest.raises(RuntimeError, match="own trouble"):
        build(f"{package}.nets.raises")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (None, "must be a dotted path"),
        ("Net", "must be a dotted path"),
        ("outside..Net", "must be a dotted path"),
        ("no_such_package.Net", "no module named 'no_such_package'"),
        ("outside.missing.Net", "outside has no module or attribute 'missing'"),
        ("outside.nets.Nett", r"outside.nets has no (module or )?attribute 'Nett'"),
        ("outside.nets.Net.Inner", "outside.nets.Net has no attribute 'Inner'"),
        ("outside.nets.CONSTANT", "is of type int, must be a class or function"),
        ("outside.nets", "is of type module, must be a class or function"),
        ("outside.broken.Net", "importing outside.broken failed: .*a_package_that_is_not_there"),
        ("outside.invalid.Net", "importing outside.invalid failed: SyntaxError"),
        ("outside.nets.returns_number", "returned int, must return a torch.nn.Module"),
    ],
)
def test_a_bad_target_gives_one_line(package: str, target: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        build(target)
    message = str(raised.value)
    assert message.startswith(f"backbone.target={target}: ")
    assert "\n" not in message


@pytest.mark.parametrize("args", [{"width": 3}, {"depth": 1, "heads": 2}])
def test_args_that_do_not_fit(package: str, args: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"^backbone\.args=.*unexpected keyword") as raised:
        build(f"{package}.nets.Net", args)
    assert "(in_channels, num_classes, depth=1)" in str(raised.value)


def test_a_missing_argument() -> None:
    with pytest.raises(InputError, match=r"^backbone\.args=.*missing .*'in_features'"):
        build("torch.nn.Linear")


def test_the_config(package: str) -> None:
    with initialize_config_dir(str(CONF / "backbone"), version_base="1.3"):
        config = compose("custom", overrides=[f"target={package}.nets.Net", "+args.depth=2"])
    options = OmegaConf.to_container(config)
    assert isinstance(options, dict)
    model = build_backbone(options, image_spec(1, 8, 10))
    assert model.received == (1, 10, 2)
