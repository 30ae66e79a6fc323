"""The next token of a text: cross-entropy, perplexity, and bits per byte."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from memfold.data.spec import IGNORED, DataSpec, NextToken, Tokens
from memfold.errors import InputError
from memfold.options import check_arguments
from memfold.tasks.task import Measure, Smoothing, Task, logits_of

__all__ = ["LanguageModelling"]

_BITS_PER_BYTE = Measure("bpb", "min", "bits per byte")
_PERPLEXITY = Measure("ppl", "min", "perplexity")
_LOSS = Measure("loss", "min", "nats per token")


class LanguageModelling(Task):
    """Cross-entropy of logits (B, L, vocabulary), in nats per token.

    Bits per byte is comparable between tokenizers: the sum of nats over ln 2 times the bytes that
    the targets stand for. Both are sums over a split and over ranks, never means of means. Tokens
    of no bytes are left out of both. Where nobody knows the bytes, the loss is the primary metric.
    """

    name = "language_modelling"
    target = NextToken
    measures = (_BITS_PER_BYTE, _PERPLEXITY)

    def __init__(self, spec: DataSpec, *, label_smoothing: Smoothing) -> None:
        """Check the options.

        Args:
            spec: Its target is `NextToken`.
            label_smoothing: Share of the target spread over the vocabulary, in [0, 1); in the
                training loss only.

        Raises:
            InputError: `label_smoothing` is out of range, or the data ask for another task.
        """
        super().__init__(spec)
        check_arguments(LanguageModelling.__init__, locals(), "task.")
        self.label_smoothing = label_smoothing
        assert isinstance(spec.target, NextToken)
        self._bytes_of = spec.target.bytes_of
        if self._bytes_of is None:
            self.measures = (_LOSS, _PERPLEXITY)

    def check_network(self, net: nn.Module) -> None:
        """Refuse a network whose outputs depend on later tokens: those it would read off.

        One that does not run here, such as one for a GPU alone, is not looked at.
        """
        inputs = self.spec.inputs
        if not isinstance(inputs, Tokens) or min(inputs.length, inputs.vocabulary_size) < 2:
            return
        tokens = torch.arange(inputs.length).remainder(inputs.vocabulary_size).repeat(2, 1)
        tokens[1, -1] = (tokens[0, -1] + 1) % inputs.vocabulary_size
        is_training = net.training
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                first, second = logits_of(net.eval()(tokens))[:, :-1].double()
        except Exception:  # whatever the user's code raises; training will tell
            return
        finally:
            net.train(is_training)
        if (first - second).abs().max() > 1e-4 * first.abs().max():
            raise InputError(
                "the network sees the tokens that it is to predict: the last token changes the "
                "outputs before it; a language model needs one that looks back alone"
            )

    def loss(self, output: object, target: Tensor) -> Tensor:
        """Return the mean over the tokens (B, L) that count, in nats."""
        return self._cross_entropy(output, target, 0.0)

    def training_loss(self, output: object, target: Tensor) -> Tensor:
        """Return it with smoothed targets."""
        return self._cross_entropy(output, target, self.label_smoothing)

    def meters(self) -> Mapping[str, Metric]:
        """Return perplexity and, where bytes are known, bits per byte over all tokens."""
        if self._bytes_of is None:
            return {"ppl": Perplexity()}
        return {"bpb": BitsPerByte(self._bytes_of), "ppl": Perplexity()}

    def rows(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return those of the tokens that count."""
        return logits[target != IGNORED]

    def weight(self, target: Tensor) -> float:
        """Return the number of tokens that count."""
        return float((target != IGNORED).sum())

    def _cross_entropy(self, output: object, target: Tensor, label_smoothing: float) -> Tensor:
        logits = logits_of(output)
        # A model may know more tokens than the data have.
        vocabulary_size = max((self.spec.num_outputs, *logits.shape[-1:]))
        return F.cross_entropy(
            logits_of(logits, (*target.shape, vocabulary_size)).flatten(0, 1),
            target.flatten(),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )


class BitsPerByte(Metric):
    """Sum of nats over ln 2 times the sum of bytes."""

    full_state_update = False
    nats: Tensor
    num_bytes: Tensor

    def __init__(self, bytes_of: tuple[int, ...] | float) -> None:
        """Take the bytes that tokens stand for: a number for each, or one for all."""
        super().__init__()
        self._bytes_of = torch.tensor(bytes_of, dtype=torch.float64)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count logits (B, L, V) and targets (B, L)."""
        nats = _nats(logits, target)
        counts = target != IGNORED
        self._bytes_of = self._bytes_of.to(target.device)
        is_one_for_all = self._bytes_of.dim() == 0
        of_each = self._bytes_of if is_one_for_all else self._bytes_of[target.clamp(min=0)]
        num_bytes = of_each * counts
        self.nats += nats[num_bytes > 0].double().sum()
        self.num_bytes += num_bytes.sum()

    def compute(self) -> Tensor:
        """Return bits per byte."""
        return (self.nats / (math.log(2) * self.num_bytes)).float()


class Perplexity(Metric):
    """The exponential of the mean nats per token."""

    full_state_update = False
    nats: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count logits (B, L, V) and targets (B, L)."""
        self.nats += _nats(logits, target).double().sum()
        self.num_tokens += (target != IGNORED).sum()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (self.nats / self.num_tokens).exp().float()


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each token (B, L), 0 where none counts."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = F.cross_entropy(
        logits.to(dtype).flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(target.shape)
