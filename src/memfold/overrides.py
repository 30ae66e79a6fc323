"""Overrides of `train.py` as texts: which words of a command line they are, how to quote one."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

__all__ = [
    "GROUPS",
    "folder_override",
    "is_override",
    "parse",
    "path_of",
    "quote_value",
    "split",
    "texts_of",
    "unresolved",
]

GROUPS = (
    "backbone",
    "compression",
    "data",
    "task",
    "optimizer",
    "scheduler",
    "trainer",
    "logger",
    "callbacks",
)
"""Those of the configuration that have a choice in every run."""


def is_override(argument: str) -> bool:
    """Tell an override (key=value, ~key) from a flag of Hydra's or the value of one."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def parse(texts: Iterable[str]) -> list[Override]:
    """Read overrides as Hydra does.

    Raises:
        OverrideParseException: Hydra cannot.
    """
    return OverridesParser.create().parse_overrides(list(texts))


def split(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Divide a command line into flags and overrides.

    Raises:
        OverrideParseException: Hydra cannot read an override.
    """
    flags = [text for text in arguments if not is_override(text)]
    return flags, parse(text for text in arguments if is_override(text))


def texts_of(overrides: Iterable[Override]) -> list[str]:
    """Return overrides as they were typed."""
    return [str(override.input_line) for override in overrides]


def path_of(override: Override) -> Path:
    """Return the path that an override sets."""
    return Path(str(override.value()).replace(r"\${", "${"))  # OmegaConf's escape


def quote_value(text: str) -> str:
    """Write `text` so that Hydra reads it as one string, whatever characters it has."""
    return QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes()


def folder_override(key: str, folder: Path) -> str:
    """Return `key=folder` as a person would type it, quoted only where Hydra needs it."""
    text = f"{key}={folder}"
    with suppress(OverrideParseException):
        [override] = parse([text])
        if override.value() == str(folder) and "${" not in text:
            return text
    return f"{key}={quote_value(str(folder))}"


def unresolved(node: object) -> list[str]:
    """Return a list of overrides as they were typed.

    What an override refers to may be known to the jobs only, `${hydra:job.num}` for example.
    """
    texts = OmegaConf.to_container(node, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]
