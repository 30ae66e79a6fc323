"""The command line of `scripts/wandb_dashboard.py`."""

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memfold.errors import InputError
from memfold.logging.wandb_credentials import has_wandb_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

__all__ = ["main"]

_NAME = "memfold: what is kept over stored bytes"
_FILE = Path("wandb_dashboard.json")
_EXAMPLES = """examples:
  python scripts/wandb_dashboard.py --entity me --project memfold --group first_sweep
  python scripts/wandb_dashboard.py --from wandb_dashboard.json

Without a key for W&B, or with WANDB_MODE=offline, the definition goes into a file."""


def main(arguments: Sequence[str]) -> int:
    """Save the comparison as a workspace of W&B, or in a file.

    Args:
        arguments: The command line after the program's name.

    Returns:
        The exit status: 0, or 1 (with one line on stderr) after a user's mistake or when W&B did
        not take the workspace.
    """
    options = _parser().parse_args(arguments)
    try:
        if importlib.util.find_spec("wandb_workspaces") is None:
            raise InputError(
                "the dashboard needs the extra wandb: pip install -c constraints.txt -e '.[wandb]'"
            )
        workspace = _workspace(options)
        if os.environ.get("WANDB_MODE") not in (None, "", "online"):
            return _keep(workspace, options, "WANDB_MODE says offline")
        if not has_wandb_key():
            return _keep(workspace, options, "W&B has no key here")
        return _publish(workspace, options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _workspace(options: argparse.Namespace) -> "Workspace":
    from memfold.reporting.wandb_workspace import Selection, build_workspace, read_workspace

    for key in ("entity", "project", "name"):
        value = getattr(options, key)
        if value is not None and (not value.strip() or (key != "name" and "/" in value)):
            raise InputError(f"--{key} must be a name, got {value!r}")
    if options.source is not None:
        if options.group or options.data or options.backbone:
            raise InputError("--from takes the runs that the file names, not --group and the like")
        given = {
            "entity": options.entity,
            "project": options.project,
            "displayName": options.name,
        }
        return read_workspace(options.source, {k: v for k, v in given.items() if v is not None})
    if options.entity is None or options.project is None:
        raise InputError("--entity and --project are needed (or --from FILE)")
    selection = Selection(options.group, options.data, options.backbone)
    name = options.name or _NAME
    try:
        return build_workspace(options.entity, options.project, name, selection)
    except ValueError as error:
        raise InputError(f"W&B has no such workspace: {' '.join(str(error).split())}") from error


def _publish(workspace: "Workspace", options: argparse.Namespace) -> int:
    try:
        workspace.save()
    except Exception as error:  # of the network, the server, the key: W&B has many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        _keep(workspace, options, "it was not published")
        raise InputError(f"W&B did not take the workspace: {reason}") from error
    print(f"saved: {workspace.url}")
    return 0


def _keep(workspace: "Workspace", options: argparse.Namespace, reason: str) -> int:
    from memfold.reporting.wandb_workspace import write_workspace

    write_workspace(workspace, options.out)
    command = shlex.join(["python", "scripts/wandb_dashboard.py", "--from", str(options.out)])
    print(f"{reason}: wrote {options.out}; publish it after `wandb login` with: {command}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wandb_dashboard.py",
        description="Compare runs in Weights & Biases: metric over stored bytes, memory, curves.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument("--project", help="W&B project, as in logger.project")
    parser.add_argument("--group", nargs="+", default=[], help="only runs of these groups: sweeps")
    parser.add_argument("--data", help="only runs on these data, as in the column data")
    parser.add_argument("--backbone", help="only runs with this backbone")
    parser.add_argument("--name", help=f"title of the workspace ({_NAME})")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="publish a file")
    parser.add_argument(
        "--out", type=Path, default=_FILE, help=f"the file, without a key ({_FILE})"
    )
    return parser
