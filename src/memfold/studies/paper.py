"""The comparison of the STABLE-RPS paper: its runs, and the sweeps that they are divided into."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from memfold.errors import InputError
from memfold.file_models import Model
from memfold.overrides import folder_override, is_override
from memfold.strategies import strategy_names
from memfold.studies.composing import parse_overrides
from memfold.studies.sweep_folder import PLAN

__all__ = ["EXPERIMENTS", "METHODS", "NUM_EPOCHS", "RATIOS", "RECORD", "SEEDS", "Grid", "Sweep"]

RECORD = "reproduction.json"

EXPERIMENTS = (
    "cifar10_resnet20",
    "cifar10_vgg11",
    "cifar100_resnet20",
    "cifar100_vgg11",
    "tiny_imagenet_resnet18",
)
"""Those of `conf/experiment` that take `protocol/open_lth`."""
METHODS = (
    "dense",
    "stable_rps",
    "roast",
    "rand",
    "mag",
    "snip",
    "grasp",
    "synflow",
    "small",
)
"""The paper's, but for ltr, one run of which is up to 27 trainings at these ratios."""
RATIOS = (0.316, 0.1, 0.0316, 0.01, 0.00316)
SEEDS = (1, 2, 3)
NUM_EPOCHS = 160
"""Of `conf/experiment/protocol/open_lth.yaml`."""

_DENSE = "dense"
_OPTIONS = {
    "experiment": "--experiments",
    "compression": "--methods",
    "ratio": "--ratios",
    "seed": "--seeds",
    "trainer.max_epochs": "--epochs",
    "sweep.resume": "--out",
    "resume": "--out",
}
"""Keys of `train.py` that options decide."""


@dataclass(frozen=True)
class Sweep:
    """One sweep of `train.py`."""

    folder: Path
    overrides: tuple[str, ...]
    """Without the folder and the launcher."""
    num_runs: int

    def arguments(self, num_parallel: int) -> list[str]:
        """Return the command line that starts the sweep, or goes on with it.

        A resumed sweep gets its overrides again, so that `train.py` refuses another sweep's folder.

        Args:
            num_parallel: How many runs at once.
        """
        resume = folder_override("sweep.resume", self.folder)
        place = f"hydra.sweep.dir={resume.partition('=')[2]}"
        return [
            "-m",
            *self.overrides,
            *([f"hydra.launcher.n_jobs={num_parallel}"] if num_parallel > 1 else []),
            resume if (self.folder / PLAN).exists() else place,
        ]


class Record(Model):
    """`reproduction.json`: what a folder was started with, so that it never mixes two grids."""

    methods: str = Field(alias="--methods")
    ratios: str = Field(alias="--ratios")
    seeds: str = Field(alias="--seeds")
    epochs: str = Field(alias="--epochs")
    overrides: str = Field(alias="--")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All runs of the comparison."""

    experiments: tuple[str, ...] = EXPERIMENTS
    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = RATIOS
    seeds: tuple[int, ...] = SEEDS
    epochs: int = NUM_EPOCHS
    overrides: tuple[str, ...] = ()
    """Further ones of `train.py`, the same for all runs."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: One is unknown, out of range or given twice.
        """
        _check_names("--experiments", self.experiments, EXPERIMENTS)
        _check_names("--methods", self.methods, strategy_names())
        for option, values in (("--ratios", self.ratios), ("--seeds", self.seeds)):
            _check_distinct(option, values)
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise InputError(f"--ratios {ratio:g}: a ratio is above 0 and at most 1")
        for seed in self.seeds:
            if seed < 0:
                raise InputError(f"--seeds {seed}: a seed is a whole number of at least 0")
        _check_overrides(self.overrides)

    def sweeps(self, out: Path) -> list[Sweep]:
        """Return the sweeps in their order, below `out`.

        The dense model has a sweep of its own for each experiment: it has no ratio.
        """
        compressed = [method for method in self.methods if method != _DENSE]
        seeds = f"seed={_join(self.seeds)}"
        rest = self.overrides
        if not any(text.startswith("logger=") for text in rest):
            rest = ("logger=csv", *rest)
        if self.epochs != NUM_EPOCHS:
            # Milestones that are not given lie at 50 % and 75 %, as 80 and 120 do in 160.
            rest = (f"trainer.max_epochs={self.epochs}", "scheduler.milestones=null", *rest)
        found = []
        for name in self.experiments:
            experiment = f"experiment={name}"
            if _DENSE in self.methods:
                given = (experiment, f"compression={_DENSE}", seeds, *rest)
                found.append(Sweep(out / name / _DENSE, given, len(self.seeds)))
            if compressed:
                cells = (f"compression={_join(compressed)}", f"ratio={_join(self.ratios)}")
                num_runs = len(compressed) * len(self.ratios) * len(self.seeds)
                given = (experiment, *cells, seeds, *rest)
                found.append(Sweep(out / name / "compressed", given, num_runs))
        return found

    def admit(self, out: Path) -> Record:
        """Check that the folder `out` was started with this grid; experiments may differ.

        Returns:
            What is to be written there.

        Raises:
            InputError: It was another one, or the record cannot be read.
        """
        facts = {
            "--methods": _join(self.methods),
            "--ratios": _join(self.ratios),
            "--seeds": _join(self.seeds),
            "--epochs": str(self.epochs),
            "--": " ".join(self.overrides),
        }
        try:
            before = Record.read(out / RECORD).model_dump(by_alias=True)
        except FileNotFoundError:
            before = facts
        except InputError as error:
            raise InputError(f"{error}; choose another --out") from error
        for option, value in facts.items():
            if before[option] != value:
                was = f"with {option} {before[option]}" if before[option] else f"without {option}"
                given = f"{option} {value}" if value else f"no {option}"
                raise InputError(
                    f"--out {out} was started {was}, but {given} is given now; a folder keeps its "
                    "comparison (only --experiments may change): choose another --out"
                )
        return Record.model_validate(facts)

    def describe_schedule(self) -> str:
        """Say how long a run trains, and that it is shorter than the protocol where it is."""
        if self.epochs == NUM_EPOCHS:
            return f"{NUM_EPOCHS} epochs"
        drops = f"drops after {self.epochs / 2:g} and {self.epochs * 3 / 4:g}"
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        return f"{epochs} instead of {NUM_EPOCHS} ({drops})"


def _join(values: Sequence[object]) -> str:
    return ",".join(f"{value:.12g}" if isinstance(value, float) else str(value) for value in values)


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    _check_distinct(option, given)
    for name in given:
        if name not in known:
            raise InputError(f"{option} {name} is unknown; available: {', '.join(known)}")


def _check_distinct(option: str, values: Sequence[object]) -> None:
    if not values:
        raise InputError(f"{option} needs at least one value")
    if len({_join([value]) for value in values}) < len(values):
        raise InputError(f"{option} {_join(values)}: a value is given twice")


def _check_overrides(texts: Sequence[str]) -> None:
    for text in texts:
        if not is_override(text):
            raise InputError(f"{text}: after -- only overrides of train.py, such as data.root=DIR")
        [override] = parse_overrides([text])
        key = override.key_or_group
        if key in _OPTIONS:
            raise InputError(f"{text}: use {_OPTIONS[key]} instead")
        if key.startswith(("hydra.", "hydra/")):
            raise InputError(
                f"{text}: folders and launcher are chosen by --out and --jobs-per-device"
            )
        if override.is_sweep_override():
            raise InputError(f"{text}: an override after -- is the same for all runs")
