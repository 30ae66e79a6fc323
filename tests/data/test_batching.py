"""Order, sharding, augmentation and resumption of batches."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memfold.data.batching import (
    Chosen,
    EvaluationLoader,
    EvaluationSampler,
    TrainingLoader,
    TrainingSampler,
)
from memfold.data.images.augmentation import (
    TrainingImages,
    augment,
    draw_augmentations,
    normalise,
)
from memfold.data.images.image_set import ImageSet
from memfold.errors import InputError


def epoch_of(sampler: TrainingSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [positions.tolist() for positions in sampler]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_processes_share_the_batches_of_one(
    num_samples: int, batch_size: int, world_size: int, epoch: int
) -> None:
    global_batch = batch_size * world_size
    if global_batch > num_samples:
        return
    alone = epoch_of(TrainingSampler(num_samples, global_batch, seed=5), epoch)
    shares = [
        epoch_of(
            TrainingSampler(num_samples, batch_size, seed=5, rank=rank, world_size=world_size),
            epoch,
        )
        for rank in range(world_size)
    ]
    joined = [[*chain.from_iterable(parts)] for parts in zip(*shares, strict=True)]
    assert joined == alone
    seen = [*chain.from_iterable(alone)]
    assert len(set(seen)) == len(seen) == num_samples // global_batch * global_batch


def test_epochs_are_reached_directly_or_one_by_one() -> None:
    stepwise = TrainingSampler(50, 5, seed=1)
    epochs = [epoch_of(stepwise, epoch) for epoch in range(4)]
    assert epoch_of(TrainingSampler(50, 5, seed=1), 3) == epochs[3]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert epoch_of(TrainingSampler(50, 5, seed=2), 3) != epochs[3]


def test_the_global_generator_has_no_say() -> None:
    torch.manual_seed(0)
    first = epoch_of(TrainingSampler(30, 3, seed=1), 0)
    torch.manual_seed(1)
    assert epoch_of(TrainingSampler(30, 3, seed=1), 0) == first


def test_a_global_batch_larger_than_the_set() -> None:
    assert len(TrainingSampler(12, 6, seed=0, world_size=2)) == 1
    with pytest.raises(InputError, match=r"^data\.batch_size=7: 2 process.*at most 12"):
        TrainingSampler(12, 7, seed=0, world_size=2)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_sees_every_sample_once(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    if num_samples < world_size:
        return
    samplers = [
        EvaluationSampler(num_samples, batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [torch.cat(list(sampler)) for sampler in samplers]
    assert sorted(torch.cat(seen).tolist()) == list(range(num_samples))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert max(map(len, samplers)) - min(map(len, samplers)) <= 1
    assert all(len(batch) <= batch_size for sampler in samplers for batch in sampler)


def test_a_process_without_evaluation_samples() -> None:
    with pytest.raises(InputError, match=r"^trainer\.devices: 3 processes for 2 .*val_fraction"):
        EvaluationSampler(2, 4, rank=0, world_size=3)


def crop_and_flip_one(image: Tensor, draw: list[int], padding: int, flip: bool) -> Tensor:
    padded = F.pad(image, (padding,) * 4)
    row, column, flipped = draw
    crop = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return crop.flip(2) if flip and flipped else crop


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(40, 3, 6, 6), (40, 1, 5, 9)])
def test_augment_equals_a_loop_over_images(
    padding: int, flip: bool, shape: tuple[int, ...]
) -> None:
    images = torch.randint(1, 256, shape, dtype=torch.uint8)
    draws = draw_augmentations(shape[0], padding, seed=0, epoch=0)
    result = augment(images, draws, crop_padding=padding, horizontal_flip=flip)
    one_by_one = [
        crop_and_flip_one(image, draw.tolist(), padding, flip)
        for image, draw in zip(images, draws, strict=True)
    ]
    assert result.dtype == torch.uint8
    assert torch.equal(result, torch.stack(one_by_one))


def test_draws_cover_every_offset_evenly() -> None:
    draws = draw_augmentations(9000, 4, seed=3, epoch=2)
    assert draws.shape == (9000, 3)
    assert draws.dtype == torch.uint8
    for column, count in ((0, 9), (1, 9), (2, 2)):
        counts = torch.bincount(draws[:, column].long())
        assert len(counts) == count
        # the standard deviation of a count is below 50: five of them
        assert (counts - 9000 / count).abs().max() < 250
    # rows and columns are drawn apart
    assert (draws[:, 0] == draws[:, 1]).double().mean() < 0.2


def test_draws_depend_on_seed_and_epoch() -> None:
    draws = draw_augmentations(100, 4, seed=3, epoch=2)
    assert torch.equal(draws, draw_augmentations(100, 4, seed=3, epoch=2))
    assert not torch.equal(draws, draw_augmentations(100, 4, seed=3, epoch=1))
    assert not torch.equal(draws, draw_augmentations(100, 4, seed=2, epoch=2))


def test_normalise() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.125])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    result = normalise(images, mean, std)
    assert result.dtype == torch.float32
    # one rounding in another place, on values of at most 8
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6)


@pytest.fixture
def data() -> ImageSet:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 1, 2, 2).clone()
    return ImageSet(images, torch.arange(30) % 3)


def make_loader(data: ImageSet, batch_size: int = 4) -> TrainingLoader:
    samples = Chosen(TrainingImages(data, 2), torch.arange(5, 30))  # 25 samples: 6 batches of 4
    return TrainingLoader(samples, TrainingSampler(25, batch_size, seed=0))


def seen(batches: object) -> list[list[int]]:
    return [images[:, 0, 0, 0].tolist() for images, *_ in batches]


def test_loaders_pair_images_labels_and_draws(data: ImageSet) -> None:
    loader = make_loader(data)
    draws_of_epoch = draw_augmentations(30, 2, seed=0, epoch=0)
    numbers = []
    for images, labels, draws in loader:
        samples = images[:, 0, 0, 0].long()
        assert torch.equal(labels, samples % 3)
        assert torch.equal(draws, draws_of_epoch[samples])
        numbers += samples.tolist()
    assert len(loader) == 6
    assert len(set(numbers)) == 24
    assert min(numbers) >= 5
    three = Chosen(data, torch.tensor([7, 9, 29]))
    evaluation = EvaluationLoader(three, EvaluationSampler(3, 2))
    assert seen(evaluation) == [[7, 9], [29]]
    assert [labels.tolist() for _, labels in evaluation] == [[1, 0], [2]]


def take(loader: TrainingLoader, count: int) -> list[list[int]]:
    iterator = iter(loader)
    return seen(next(iterator) for _ in range(count))


def test_an_interrupted_epoch_goes_on_where_it_stopped(data: ImageSet) -> None:
    whole = make_loader(data)
    whole.sampler.set_epoch(2)
    expected = seen(whole)
    interrupted = make_loader(data)
    interrupted.sampler.set_epoch(2)
    before = take(interrupted, 2)
    resumed = make_loader(data)
    resumed.load_state_dict(interrupted.state_dict())
    iterator = iter(resumed)  # as Lightning does, before it sets the epoch
    resumed.sampler.set_epoch(2)
    assert before + seen(iterator) == expected
    # only once: the same epoch asked for again is whole, as is the next one
    assert seen(resumed) == expected
    resumed.sampler.set_epoch(3)
    assert len(seen(resumed)) == 6


def test_a_finished_epoch_leaves_nothing_to_skip(data: ImageSet) -> None:
    finished = make_loader(data)
    list(finished)
    resumed = make_loader(data)
    resumed.load_state_dict(finished.state_dict())
    resumed.sampler.set_epoch(1)
    assert len(seen(resumed)) == 6


def test_resuming_in_mid_epoch_with_another_batch_size(data: ImageSet) -> None:
    interrupted = make_loader(data)
    take(interrupted, 2)
    resumed = make_loader(data, batch_size=5)
    resumed.load_state_dict(interrupted.state_dict())
    with pytest.raises(InputError, match=r"^data\.batch_size=5: .*must be 4, as before"):
        list(resumed)


@pytest.mark.parametrize("make", [iter, list])
def test_a_pass_leaves_the_global_generator_alone(
    data: ImageSet, make: Callable[[object], object]
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make(make_loader(data))
    assert torch.equal(torch.rand(1), expected)
