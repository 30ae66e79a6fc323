"""Overrides of `train.py` as texts: which words of a command line they are, how to quote one."""

from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

__all__ = ["GROUPS", "folder_override", "is_override", "quote_value", "unresolved"]

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


def quote_value(text: str) -> str:
    """Write `text` so that Hydra reads it as one string, whatever characters it has."""
    return QuotedString(text=text.replace("${", r"\${"), quote=Quote.single).with_quotes()


def folder_override(key: str, folder: Path) -> str:
    """Return `key=folder` as a person would type it, quoted only where Hydra needs it."""
    text = f"{key}={folder}"
    with suppress(OverrideParseException):
        [override] = OverridesParser.create().parse_overrides([text])
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
