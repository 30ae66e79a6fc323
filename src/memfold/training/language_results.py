"""What the result of a run on text says beside its metrics."""

from typing import Any

import torch

from memfold.data.text.token_data_module import TOKENIZER, TokenDataModule
from memfold.processes.ranks import is_rank_zero
from memfold.tasks import LanguageModelling
from memfold.tasks.generation import generate
from memfold.training.build import Experiment

__all__ = ["describe_text", "tokenizer_bytes"]

_SAMPLE_TOKENS = 200
"""Of the text that is drawn from a language model at the end."""


def tokenizer_bytes(experiment: Experiment) -> dict[str, int]:
    """Count the tokenizer's file, which a run keeps where its tokens are not bytes."""
    file = experiment.folder / TOKENIZER
    return {"tokenizer_bytes": file.stat().st_size} if file.exists() else {}


def describe_text(experiment: Experiment) -> dict[str, Any]:
    """Draw a text from a language model, and say what counting reaches."""
    data, net = experiment.data, experiment.net
    if not isinstance(data, TokenDataModule) or not is_rank_zero():
        return {}
    found: dict[str, Any] = {"references": data.references()}
    if isinstance(experiment.module.task, LanguageModelling) and data.tokenizer is not None:
        device = next(net.parameters()).device
        start = torch.from_numpy(data.tokens("test")[0][: data.length // 2].astype("int64"))
        net.eval()
        drawn = generate(
            net,
            start.to(device),
            _SAMPLE_TOKENS,
            length=data.length,
            temperature=0.8,
            seed=experiment.config["seed"],
        )
        found["sample"] = data.tokenizer.decode(drawn.numpy())
    return found
