"""Whether Weights & Biases has a key here, found out without asking anybody."""

import wandb
from wandb.sdk.lib import wbauth

__all__ = ["has_wandb_key"]


def has_wandb_key() -> bool:
    """Look for credentials where `wandb.init` does (environment, netrc, settings), silently."""
    credentials = wbauth.authenticate_session(
        host=wandb.setup().settings.base_url,
        source="memfold",
        prompt=False,
        update_session=False,
    )
    return credentials is not None
