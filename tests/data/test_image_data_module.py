"""What every data set does: options, splits, stages, ranks, augmentation, resumption."""

import inspect
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from data.writers import write_cifar10, write_idx_set
from memfold.data.cifar10 import CIFAR10
from memfold.data.digits import Digits
from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.image_set import ImageSet
from memfold.data.mnist import MNIST
from memfold.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
NAMES = ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet"]


class Numbered(ImageDataModule):
    """60 images of 4x4 pixels; all pixels of image i are i, its class is i % 4."""

    name = "numbered"
    num_channels = 2
    image_size = 4
    num_classes = 4
    mean = (0.5, 0.25)
    std = (0.5, 0.25)

    def load_train(self) -> ImageSet:
        images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 2, 4, 4)
        return ImageSet(images.clone(), torch.arange(60) % 4)

    def load_test(self) -> ImageSet:
        raise AssertionError("the test set was read")


def ready(**options: object) -> Numbered:
    module = Numbered(**options)
    module.setup("fit")
    return module


def val_positions(module: Numbered) -> Tensor:
    return module.val_dataloader().samples.positions


def train_positions(module: Numbered) -> Tensor:
    return module.train_dataloader().samples.positions


def numbers(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_fit_does_not_read_the_test_set() -> None:
    module = ready(batch_size=8)
    module.setup("validate")
    list(module.train_dataloader())
    list(module.val_dataloader())
    with pytest.raises(RuntimeError, match=r"setup\('test'\)"):
        module.test_dataloader()
    with pytest.raises(AssertionError, match="was read"):
        module.setup("test")


def test_what_a_result_says_of_the_splits() -> None:
    module = ready(val_fraction=0.5, split_seed=1)
    classes = torch.cat([labels for _, labels in module.val_dataloader()]).tolist()
    chance = max(map(classes.count, range(4))) / 30
    assert module.describe() == {"samples": {"train": 30, "val": 30}, "chance": chance}
    module.val_dataloader().samples.samples.labels[:] = 2
    assert module.describe()["chance"] == 1
    assert Numbered().describe() == {"samples": {}, "chance": None}


def test_the_test_stage_does_not_read_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Digits()
    monkeypatch.setattr(module, "load_train", None)
    module.setup("test")
    assert sum(len(labels) for _, labels in module.test_dataloader()) == 360


def test_train_and_validation_part_the_training_file() -> None:
    module = ready(batch_size=1)
    train = [numbers(images)[0] for images, *_ in module.train_dataloader()]
    val = [numbers(images)[0] for images, _ in module.val_dataloader()]
    assert sorted(train + val) == list(range(60))
    assert len(val) == 6
    assert sorted(val) == val_positions(module).tolist()
    counts = torch.bincount(torch.tensor(val) % 4, minlength=4)
    assert counts.min() >= 1
    assert counts.max() <= 2


def test_the_split_depends_on_its_own_seed_alone() -> None:
    split = val_positions(ready())
    assert torch.equal(split, val_positions(ready(seed=9, batch_size=3, train_subset=5)))
    assert not torch.equal(split, val_positions(ready(split_seed=1)))


def test_train_subset_is_stratified_and_nested() -> None:
    module = ready(batch_size=8)
    small, large = (ready(train_subset=n, batch_size=8) for n in (8, 20))
    assert torch.bincount(train_positions(small) % 4).tolist() == [2, 2, 2, 2]
    chosen = set(train_positions(small).tolist())
    assert chosen < set(train_positions(large).tolist()) < set(train_positions(module).tolist())
    assert len(train_positions(large)) == 20
    assert len(train_positions(ready(train_subset=54, batch_size=8))) == 54
    with pytest.raises(InputError, match=r"^data\.train_subset=55: must be at most 54"):
        ready(train_subset=55)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_with_an_empty_part(fraction: float) -> None:
    with pytest.raises(InputError, match=rf"^data\.val_fraction={fraction}: parts"):
        ready(val_fraction=fraction)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("batch_size", True),
        ("batch_size", "8"),
        ("val_fraction", 0),
        ("val_fraction", 1),
        ("val_fraction", float("nan")),
        ("val_fraction", "0.1"),
        ("split_seed", None),
        ("seed", 0.5),
        ("crop_padding", -1),
        ("crop_padding", 5),
        ("horizontal_flip", 1),
        ("download", "yes"),
        ("train_subset", 0),
        ("root", ""),
        ("root", None),
    ],
)
def test_bad_options_name_the_key(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^data\.{key}( |=\d+ )must be .*") as raised:
        Numbered(**{key: value})
    assert "\n" not in str(raised.value)


def epoch_batches(module: ImageDataModule, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def on_rank(rank: int, world_size: int, **options: object) -> Numbered:
    module = ready(**options)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return module


@pytest.mark.parametrize("epoch", [0, 3])
def test_two_ranks_see_the_images_of_one(epoch: int) -> None:
    options = {"crop_padding": 2, "horizontal_flip": True, "seed": 4}
    alone = epoch_batches(ready(batch_size=6, **options), epoch)
    shares = [epoch_batches(on_rank(rank, 2, batch_size=3, **options), epoch) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 9
    for (images, labels), first, second in zip(alone, *shares, strict=True):
        assert torch.equal(images, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))


def test_overfit_batches_is_refused() -> None:
    module = on_rank(0, 1)
    module.trainer.overfit_batches = 2
    with pytest.raises(InputError, match=r"^trainer\.overfit_batches=2: .*data\.train_subset"):
        module.train_dataloader()


def test_two_ranks_share_the_validation_set() -> None:
    val = [
        numbers(images)
        for rank in range(2)
        for images, _ in on_rank(rank, 2, batch_size=2).val_dataloader()
    ]
    assert sorted(chain.from_iterable(val)) == val_positions(ready()).tolist()


def test_the_same_seed_gives_the_same_images() -> None:
    options = {"crop_padding": 2, "horizontal_flip": True, "batch_size": 6}
    first, again, other = (
        torch.cat([images for images, _ in epoch_batches(ready(seed=seed, **options), 1)])
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_augmentation_of_a_sample_does_not_depend_on_its_batch() -> None:
    def by_sample(batch_size: int) -> dict[int, Tensor]:
        module = ready(batch_size=batch_size, crop_padding=3, horizontal_flip=True)
        found = {}
        for images, labels, draws in module.train_dataloader():
            augmented, _ = module.on_after_batch_transfer((images, labels, draws))
            found.update(zip(numbers(images), augmented, strict=True))
        return found

    one, nine = by_sample(1), by_sample(9)
    assert one.keys() == nine.keys()
    assert all(torch.equal(one[number], nine[number]) for number in one)


def test_padding_is_black_and_only_training_is_augmented() -> None:
    module = ready(crop_padding=4, batch_size=54)
    ((images, _),) = epoch_batches(module)
    black = torch.tensor([-1.0, -1.0])  # (0 - mean) / std
    corners = images[:, :, 0, 0]
    is_black = (corners == black).all(dim=1)
    assert 0 < is_black.sum() < 54
    for batch in module.val_dataloader():
        evaluated, _ = module.on_after_batch_transfer(batch)
        expected = (batch[0] / 255 - torch.tensor([0.5, 0.25]).view(2, 1, 1)) / torch.tensor(
            [0.5, 0.25]
        ).view(2, 1, 1)
        # one rounding in another place, on values of at most 3
        torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-6)


def test_without_augmentation_training_images_are_whole() -> None:
    module = ready(batch_size=6)
    for batch in module.train_dataloader():
        images, labels = module.on_after_batch_transfer(batch)
        assert torch.equal(images, module.on_after_batch_transfer(batch[:2])[0])
        assert torch.equal(labels, batch[1])


def test_what_is_scored_does_not_depend_on_the_batches_of_training() -> None:
    small, large = (list(Digits(batch_size=n).scoring_batches(5)) for n in (50, 100))
    assert [len(images) for images, _ in small] == [128] * 10 + [13]
    torch.testing.assert_close(small, large, rtol=0, atol=0)


def test_digits() -> None:
    module = Digits()
    train, test = module.load_train(), module.load_test()
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    assert len(train.images.unique()) == 17
    counts = torch.bincount(test.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37
    pixels = train.images / 255
    assert pixels.mean().item() == pytest.approx(module.mean[0], abs=5e-4)
    assert pixels.std().item() == pytest.approx(module.std[0], abs=5e-4)


def test_the_test_set_of_digits_is_fixed() -> None:
    reference = Digits().load_test()
    other = Digits(seed=3, split_seed=4, val_fraction=0.3).load_test()
    assert torch.equal(reference.images, other.images)
    # A changed split would make results incomparable with those already reported.
    weights = torch.arange(1, 361)
    assert int((reference.labels * weights).sum()) == 300_280
    assert int((reference.images.long().sum(dim=(1, 2, 3)) * weights).sum()) == 319_893_958


@pytest.mark.parametrize("name", NAMES)
def test_configs_list_every_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFOLD_DATA", "elsewhere")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"data={name}", "seed=11"]).data
    parameters = inspect.signature(ImageDataModule).parameters.values()
    assert set(config) == {"_target_"} | {parameter.name for parameter in parameters}
    module = instantiate(config)
    assert module.name == name
    assert module.root == Path("elsewhere")
    assert module.seed == 11
    assert module.batch_size == (64 if name == "digits" else 128)
    assert len(module.mean) == len(module.std) == module.num_channels


def test_the_options_of_all_sets_have_the_defaults_of_their_class() -> None:
    given = yaml.safe_load((CONF / "images.yaml").read_text())
    assert (given.pop("root"), given.pop("seed")) == ("${oc.env:MEMFOLD_DATA,data}", "${seed}")
    parameters = inspect.signature(ImageDataModule).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert given.items() <= defaults.items()


@pytest.mark.parametrize("build", [MNIST, CIFAR10])
def test_from_files_to_batches(build: type[ImageDataModule], tmp_path: Path) -> None:
    write_idx_set(tmp_path / "mnist")
    write_cifar10(tmp_path / "cifar10" / "cifar-10-batches-bin")
    module = build(
        root=str(tmp_path), batch_size=8, val_fraction=0.2, crop_padding=2, download=False
    )
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    size = build.image_size
    images, labels = epoch_batches(module)[0]
    assert images.shape == (8, build.num_channels, size, size)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert sum(len(labels) for _, labels in module.test_dataloader()) == 20


class Recorder(pl.LightningModule):
    """A linear model that notes the first pixels of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 4)
        self.seen: list[Tensor] = []
        self.num_validated = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        self.seen.append(images.clone())
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.num_validated += len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Schedules need it; it makes Lightning ask for the loader before a checkpoint is restored.
        assert self.trainer.estimated_stepping_batches == 18
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SaveEveryStep(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(folder: Path | None = None, *, checkpoint: Path | None = None) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[] if folder is None else [SaveEveryStep(folder)],
    )
    module = Numbered(batch_size=8, crop_padding=1, horizontal_flip=True)  # 6 batches an epoch
    trainer.fit(model, datamodule=module, ckpt_path=checkpoint)
    return model


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's use of torch
def test_a_trainer_resumes_with_the_very_next_batch(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    assert len(whole.seen) == 18
    assert whole.num_validated == 18
    for step in (2, 6, 9, 12, 17):  # in an epoch and at the end of one
        resumed = fit(checkpoint=tmp_path / f"{step}.ckpt")
        assert len(resumed.seen) == 18 - step
        expected = whole.seen[step:]
        assert all(map(torch.equal, resumed.seen, expected))
        assert torch.equal(resumed.layer.weight, whole.layer.weight)
