"""Training that knows the bits of the artifact: fake quantisation, straight through.

Matthieu Courbariaux, Yoshua Bengio and Jean-Pierre David, "BinaryConnect: training deep neural
networks with binary weights during propagations", NeurIPS 2015, arXiv 1511.00363; here with the
numbers that the artifact would hold. With x what is trained and Q what an artifact makes of it,

    loss(Q(x)),    dx := d loss / dQ(x)        the gradient goes straight through Q

Q(x) stands in the parameters themselves, from the forward pass to the optimizer's step, and x
beside them: whatever reads a parameter meanwhile (layers, a backward pass that computes weights
again, DDP) needs to know nothing of it, and optimizers, checkpoints and averages know x alone.
"""

from collections.abc import Iterator
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import

from memfold.compression.accounting import storage_key
from memfold.errors import InputError
from memfold.quantisation import rounded

if TYPE_CHECKING:
    from memfold.compression.state import Compression

__all__ = ["FakeQuantisation"]

# One for all models, which can be copied: threads that evaluate take turns only to round.
_LOCK = RLock()


class FakeQuantisation:
    """Rounds the stored values of a model for its passes; what is trained comes back after them.

    A pass in evaluation mode is always rounded, so that every metric is that of the artifact; one
    in training mode from a given part of the training on. Without gradients, the values are back
    when the last of the passes that run ends (a model may call itself, and several threads may call
    it); with them, in `before_step`.
    """

    def __init__(self, compression: "Compression", start: float) -> None:
        """Watch the passes of a model that was just compressed.

        Args:
            compression: Its `stored_values` are rounded, as its strategy stores them.
            start: Part of the training after which training passes are rounded, in [0, 1].
        """
        self._compression = compression
        self._start = start
        self._is_due = start == 0
        self._steps_are_told = False
        """Whether `before_step` or `prepare_step` has ever been called."""
        self._last_versions: list[int] | None = None
        """How often parameters had been changed at the last training pass, until they are."""
        self._num_passes = 0
        """How many passes hold the rounded values till they end; none if `before_step` ends it."""
        self._trained: list[tuple[Tensor, Tensor, int]] = []
        """Parameters that are rounded now, what they were, and how often they were changed."""
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        """What an evaluation has rounded, and what came out, by name in the artifact: batch after
        batch it is the same."""
        model = compression.model
        self._handles = (
            # First: strategies read their values when a pass begins.
            model.register_forward_pre_hook(self._begin, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
            # PyTorch marks this hook with an attribute, which a bound method cannot take.
            model.register_state_dict_post_hook(partial(self._save)),
            model.register_load_state_dict_pre_hook(self._load),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the copy of all stored values that a step needs."""
        return sum(tensor.nbytes for _, tensors in self._tensors() for tensor in tensors)

    def prepare_step(self, step: int, total_steps: int) -> None:
        """Get ready for the forward pass of optimizer step number `step`, counted from 0."""
        self._steps_are_told = True
        self._is_due = step >= self._start * total_steps

    def trained(self, parameter: Tensor) -> Tensor:
        """Return what is trained in a parameter, which may be rounded now."""
        return next((values for p, values, _ in self._trained if p is parameter), parameter)

    def release(self) -> None:
        """Put what is trained back into the parameters, and keep nothing else.

        Raises:
            InputError: They were changed meanwhile, which would be lost.
        """
        self._restore()
        self._known.clear()

    def _restore(self) -> None:
        self._check()
        trained, self._trained = self._trained, []
        for parameter, values, _ in trained:
            self._write(parameter, values)
        self._num_passes = 0

    def conclude(self) -> None:
        """Round for good, and watch no more."""
        if not self._trained:
            self._round()
        self._trained = []
        self._known.clear()
        for handle in self._handles:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the parameters of a copy, which count their changes anew."""
        vars(self).update(state)
        self._last_versions = None
        self._note_versions()

    @_disable_dynamo
    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        with _LOCK:
            if module.training and not self._is_due:
                self.release()
                self._check_told()
                return
            self._check()
            is_held = bool(self._trained) and self._num_passes == 0
            # A pass with gradients takes them over, also from one that was interrupted.
            lasts = is_held or torch.is_grad_enabled()
            self._num_passes = 0 if lasts else self._num_passes + 1
            if not self._trained:
                self._round()

    @_disable_dynamo
    def _end(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        with _LOCK:
            if self._num_passes == 1:
                self._restore()
            else:
                self._num_passes = max(0, self._num_passes - 1)

    def _tensors(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield the parameters that an artifact quantises together, and their name there."""
        for name, tensors in self._compression.stored_values().items():
            yield name, [tensors] if isinstance(tensors, Tensor) else list(tensors)

    def _round(self) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
            raise _replaced()
        stored = list(self._tensors())
        if not all(isinstance(tensor, nn.Parameter) for _, tensors in stored for tensor in tensors):
            raise _replaced()
        for name, tensors in stored:
            trained = [tensor.detach().clone() for tensor in tensors]
            together = torch.cat([values.reshape(-1) for values in trained])
            parts = self._rounded(name, together).split([values.numel() for values in trained])
            for tensor, values, part in zip(tensors, trained, parts, strict=True):
                # Before it is written, whatever interrupts that.
                self._trained.append((tensor, values, tensor._version + (self._num_passes == 0)))
                self._write(tensor, part.view(tensor.shape))
        self._note_versions()  # views of one tensor count together

    def _note_versions(self) -> None:
        self._trained = [(tensor, values, tensor._version) for tensor, values, _ in self._trained]

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        before, found = self._known.get(name, (None, None))
        if before is not None and found is not None and torch.equal(before, values):
            return found
        found = rounded(values, self._compression.strategy.packing)
        if self._num_passes:
            self._known[name] = values, found
        else:
            self._known.clear()
        return found

    @torch.no_grad()
    def _write(self, parameter: Tensor, values: Tensor) -> None:
        # Without gradients, no graph has to notice a change, and what strategies keep from one
        # evaluation batch to the next goes on to fit.
        target = parameter.data if self._num_passes else parameter
        target.copy_(values)

    def _check_told(self) -> None:
        """Refuse a training of which nobody says how far it is: it would never be rounded."""
        if self._steps_are_told or not torch.is_grad_enabled():
            return
        versions = [tensor._version for _, tensors in self._tensors() for tensor in tensors]
        if self._last_versions not in (None, versions):
            raise _changed()
        self._last_versions = versions

    def _check(self) -> None:
        if any(parameter._version > version for parameter, _, version in self._trained):
            raise _changed()

    def _save(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Let a state dict hold what is trained, but where it holds the parameters themselves."""
        self._check()
        trained = {storage_key(entry[0]): entry[:2] for entry in self._trained}
        for name, found in state.items():
            if trained and name.startswith(prefix) and isinstance(found, Tensor):
                parameter, values = trained.get(storage_key(found), (found, found))
                state[name] = found if found is parameter else values

    def _load(self, module: nn.Module, *arguments: object) -> None:
        self.release()
        self._last_versions = None


def _changed() -> InputError:
    return InputError(
        "artifact.train_bits: parameters were changed between a forward pass and "
        "memfold.before_step, which has to come before every step of the optimizer"
    )


def _replaced() -> InputError:
    return InputError(
        "artifact.train_bits rounds the model's own parameters, and others were put in their "
        "place: give memfold.densify(model) to torch.func"
    )
