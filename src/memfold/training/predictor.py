"""Predictions of a saved run for images, rows or a text as its data set has them."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from memfold.data.images.data_module import ImageDataModule
from memfold.data.images.pixels import Images, pixels_of
from memfold.data.spec import Classes, Reals
from memfold.data.tables.columns import Column, column_of
from memfold.data.tables.data_module import TableDataModule
from memfold.data.text.token_data_module import TokenDataModule
from memfold.errors import InputError
from memfold.options import Interval, Natural, check_arguments
from memfold.tasks.generation import generate
from memfold.tasks.task import logits_of
from memfold.training.load import load_model, read_data

__all__ = ["Predictor", "Samples"]

Samples = Images | Mapping[str, Sequence[object]] | str


class Predictor:
    """The network of a run behind what its data set does to a sample.

    `network` is what `load_model` returns; moved to a GPU, it predicts there. `class_names` are
    those of the logits, in their order; `None` where there are no classes, or nobody names them.
    """

    class_names: tuple[str, ...] | None

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        weights: Literal["artifact", "last", "best"] = "artifact",
        *,
        allow: Collection[str] = (),
    ) -> None:
        """Load a run; its data set itself is not needed.

        Args:
            run_dir: A run folder.
            weights: See `load_model`.
            allow: See `load_model`.

        Raises:
            InputError: As `load_model` does.
        """
        _, data = read_data(run_dir, allow=allow)
        if not isinstance(data, ImageDataModule | TableDataModule | TokenDataModule):
            raise InputError(
                f"{run_dir}: Predictor takes images, rows or text, and nobody says what "
                f"data={data.name} does to them: take load_model"
            )
        self._data = data
        target = data.spec.target
        self.class_names = (target.names or None) if isinstance(target, Classes) else None
        self.network = load_model(run_dir, weights, allow=allow)

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """Predict.

        Args:
            samples: See `prepare`.

        Returns:
            On the device of `network`: logits (B, classes) of images and rows, B being 1 for a
            single image; numbers (B, outputs), float64, in the unit of the target column; logits
            (B, tokens, vocabulary) of the token after each.

        Raises:
            InputError: As `prepare` does.
        """
        device = next(self.network.parameters()).device
        output = logits_of(self.network(self.prepare(samples, device)))
        target = self._data.spec.target
        if not isinstance(target, Reals):
            return output
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=device)
            for values in (target.mean, target.std)
        )
        return output.double().reshape(-1, len(mean)) * std + mean

    def generate(
        self,
        prompt: str,
        num_tokens: Natural,
        *,
        temperature: Annotated[float, Interval("(0, inf)")] = 1.0,
        seed: int = 0,
    ) -> str:
        """Draw the text that follows a prompt, from a language model.

        The text alone is returned, without the prompt.

        Args:
            prompt: At least one token.
            num_tokens: To draw.
            temperature: The logits are divided by it; above 0.
            seed: Of the draws.

        Raises:
            InputError: The run is of no text, the prompt is empty, or a number out of its range.
        """
        check_arguments(Predictor.generate, locals(), "")
        data = self._data
        if not isinstance(data, TokenDataModule) or data.tokenizer is None:
            raise InputError(f"generate: data={data.name} has no text")
        tokens = self.prepare(prompt, next(self.network.parameters()).device)[0]
        drawn = generate(
            self.network, tokens, num_tokens, length=data.length, temperature=temperature, seed=seed
        )
        return data.tokenizer.decode(drawn.numpy())

    def prepare(self, samples: Samples, device: torch.device | None = None) -> Tensor:
        """Turn samples into what the network takes: those of a test batch, bit for bit.

        Args:
            samples: What the run's data have.

                * Images: files, PIL images and uint8 pixels, see `pixels_of`; they are normalised
                  as in training.
                * Tables: column -> values, such as a dictionary of lists or a DataFrame: numbers or
                  texts, `None` or NaN where one is missing. Columns that the network does not know
                  are left out.
                * Text: one text, or int64 tokens (L,) or (B, L).
            device: Where to put it; where it is if `None`.

        Returns:
            The inputs of the network: (B, ...).

        Raises:
            InputError: A sample is of another kind, type or shape; a column is missing.
        """
        if isinstance(self._data, TableDataModule):
            if not hasattr(samples, "keys"):
                raise InputError(
                    f"rows must be given as column -> values, got {type(samples).__name__}"
                )
            encoding = self._data.encoding
            used = {column.name for column in (*encoding.numeric, *encoding.categorical)}
            return encoding.inputs(_columns(samples, used)).to(device)
        if isinstance(self._data, TokenDataModule):
            return self._tokens(samples).to(device)
        pixels = pixels_of(samples, self._data)
        labels = torch.empty(len(pixels), dtype=torch.int64)
        return self._data.on_after_batch_transfer((pixels.to(device), labels))[0]

    def _tokens(self, samples: Any) -> Tensor:
        """Return int64 (B, L), B being 1 for a text."""
        data = self._data
        assert isinstance(data, TokenDataModule)
        tokens = samples
        if isinstance(samples, str) and data.tokenizer is not None:
            encoded = data.tokenizer.encode(samples.encode())
            tokens = torch.from_numpy(encoded.astype(np.int64))
        if (
            not isinstance(tokens, Tensor)
            or tokens.dtype != torch.int64
            or tokens.ndim not in (1, 2)
        ):
            text = "one text (predict each of several by itself) or " if data.tokenizer else ""
            raise InputError(
                f"samples of {data.name} must be {text}int64 tokens (L,) or (B, L), got "
                f"{getattr(samples, 'dtype', type(samples).__name__)}"
            )
        size = data.vocabulary_size
        if tokens.numel() == 0 or not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise InputError(f"there must be tokens, and each from 0 to {size - 1}")
        return tokens.reshape(-1, tokens.shape[-1])


def _columns(table: Any, used: Collection[str]) -> dict[str, Column]:
    names = [name for name in table.keys() if str(name) in used]  # noqa: SIM118
    columns = {str(name): _column(name, table[name]) for name in names}
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the columns have different numbers of rows: {sizes}")
    return columns


def _column(name: object, values: Any) -> Column:
    """Return what training would read from such values."""
    try:
        return column_of(values.tolist() if isinstance(values, Tensor) else values)
    except TypeError as error:
        raise InputError(
            f"column {name!r} must be a sequence of numbers or of texts, None where one is missing"
        ) from error
