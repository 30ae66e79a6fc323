"""Options are held against the signature of what they are for."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from memfold.errors import InputError
from memfold.training.signatures import check_options


def target(
    needed: int,
    rate: float | Tensor = 0.1,
    flag: bool = False,
    name: str | None = None,
    mode: Literal["min", "max"] = "min",
    pair: tuple[float, float] = (0.9, 0.999),
    sizes: Sequence[int] = (),
    table: Mapping[str, Any] | None = None,
    file: Path = Path(),
    loss: Callable[[], None] | None = None,
    odd: int = None,  # type: ignore[assignment]  # noqa: RUF013
    free=None,
) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"x\.needed is missing"),
        ({"needed": 1, "other": 2}, r"x\.other is no option; options: needed, rate,"),
        ({"needed": 1.5}, r"x\.needed must be a whole number, got 1\.5"),
        ({"needed": True}, r"x\.needed must be a whole number, got True"),
        ({"needed": None}, r"x\.needed must be a whole number, got None"),
        ({"needed": 1, "rate": "fast"}, r"x\.rate must be a number, got 'fast'"),
        ({"needed": 1, "rate": False}, r"x\.rate must be a number, got False"),
        ({"needed": 1, "flag": "maybe"}, r"x\.flag must be true or false, got 'maybe'"),
        ({"needed": 1, "flag": 1}, r"x\.flag must be true or false, got 1"),
        ({"needed": 1, "name": 3}, r"x\.name must be text or null, got 3"),
        ({"needed": 1, "mode": "mean"}, r"x\.mode must be min or max, got 'mean'"),
        ({"needed": 1, "pair": [0.9]}, r"x\.pair must be a list of 2 \(a number, a number\), got"),
        ({"needed": 1, "pair": 0.9}, r"x\.pair must be a list of 2"),
        ({"needed": 1, "sizes": [1, "b"]}, r"x\.sizes must be a list \(a whole number each\), got"),
        ({"needed": 1, "sizes": "ab"}, r"x\.sizes must be a list"),
        ({"needed": 1, "table": [1]}, r"x\.table must be a mapping or null, got \[1\]"),
        ({"needed": 1, "loss": "mse"}, r"x\.loss must be a Callable .* or null, got 'mse'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(target, options, "x", {})


def test_what_fits_and_what_cannot_be_known_passes() -> None:
    check_options(
        target,
        {
            "rate": 1,
            "flag": True,
            "mode": "max",
            "pair": [1, 0.5],
            "sizes": [],
            "table": {"a": 1},
            "file": "somewhere",
            "loss": {"_target_": "torch.nn.MSELoss"},
            "odd": None,
            "free": object(),
            "_convert_": "all",
        },
        "x",
        {"needed": 1},
    )
    check_options(dict, {"a": 1}, "x", {})
    check_options(torch.optim.AdamW, {"lr": 1, "betas": [0.9, 0.99]}, "x", {"params": []})
