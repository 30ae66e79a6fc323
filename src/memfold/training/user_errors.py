"""What the user can put right, in one line."""

import sys
import traceback

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from memfold.errors import InputError
from memfold.processes.ranks import is_rank_zero

__all__ = ["USER_ERRORS", "describe_error", "report_error"]

USER_ERRORS = (InputError, HydraException, OmegaConfBaseException)


def report_error(error: BaseException, *, with_traceback: bool) -> int:
    """Print `error: ...` on stderr, on rank 0 alone, and return exit status 1."""
    if is_rank_zero():
        if with_traceback:
            traceback.print_exception(error)
        print(f"error: {describe_error(error)}", file=sys.stderr)
    return 1


def describe_error(error: BaseException) -> str:
    """Say in one line what is wrong and what is allowed."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        hint = (
            " (more with: pip install -c constraints.txt -e '.[cluster]')"
            if error.options == ["basic"]
            else ""
        )
        return f"{group}={choice} is unknown; available: {', '.join(sorted(error.options))}{hint}"
    if isinstance(error, MissingMandatoryValue) and isinstance(error.parent_node, DictConfig):
        group = error.parent_node
        prefix = (error.full_key or "").removesuffix(str(error.key))
        missing = [f"{prefix}{key}" for key in group if OmegaConf.is_missing(group, key)]
        verb = "is" if len(missing) == 1 else "are"
        values = " ".join(f"{key}=..." for key in missing)
        return f"{' and '.join(missing)} {verb} missing: set {values}"
    message = str(error)
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        message = f"{error.override}: {message}"
    elif isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        keys = cause.parent_node if isinstance(cause.parent_node, DictConfig) else ()
        known = ", ".join(sorted(str(key) for key in keys if key not in ("hydra", "_target_")))
        message = f"{cause.full_key} is no key of the configuration; keys there: {known}"
    elif isinstance(cause, OmegaConfBaseException):
        message += f" ({cause})"
    return " ".join(message.split())
