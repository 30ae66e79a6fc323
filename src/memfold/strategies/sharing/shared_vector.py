"""The shared vector of a model and the weights that are views into it.

    theta_i = g_i (lambda_l(i) / nu_b) phi_b,   b = h(i)

phi is the only trained copy. lambda_l is the standard deviation of tensor l's own initial weights;
mu_b the root mean square of lambda over the weights in slot b; nu_b = mu_b, or one constant when an
initial scale is given. The gradient of phi is multiplied by

    Gamma_b = (nu_b / mu_b)^2 / load_b^p      p = 1 (projection), 1/2 (length);  1 for none.

With S_ib = g_i lambda / nu_b, S^T S = diag(load mu^2 / nu^2), so `projection` makes S Gamma S^T the
orthogonal projector: projected gradient descent in the space of the weights, whatever the initial
scales. mu, nu, Gamma and the loads follow from the lambdas and the hash: one number for each
segment of slots that all tensors treat alike, a few of them for RANDOMFOLD, m for random hashes.
"""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memfold.compression.budget import Stored, like
from memfold.compression.fingerprints import fingerprint, is_fingerprint
from memfold.compression.kept_weights import has_room
from memfold.compression.parts import ComputedWeights, Level
from memfold.compression.selection import CompressibleWeight, zero_row_of
from memfold.compression.strategy import Strategy
from memfold.compression.transforms import is_transformed
from memfold.errors import InputError
from memfold.strategies.sharing.custom_ops import compiled_weight, register_mapping
from memfold.strategies.sharing.evaluation import Evaluation
from memfold.strategies.sharing.forward_pass import ForwardPass, working_dtype
from memfold.strategies.sharing.gradient_scale import GradientScale, slot_factors
from memfold.strategies.sharing.mapping import SlotMapping
from memfold.strategies.sharing.products import Choice, RowProducts, Way
from memfold.strategies.sharing.running_passes import (
    RunningPass,
    RunningPasses,
    check_not_exported,
)
from memfold.strategies.sharing.sources import ProductView, View, autocasts
from memfold.strategies.sharing.whole_model import WholeModel, WholePass

__all__ = ["FINGERPRINT", "Autograd", "SharedVector", "stored_like"]

Autograd = Literal["auto", "whole", "lean", "classic"]

_VALUES = "shared_values"
_SCALES = "shared_scales"
FINGERPRINT = "shared_fingerprint"

# Options that the fingerprint holds as what they led to, or that do not change what values mean.
_FREE_OPTIONS = {
    *("ratio", "budget_bytes", "bits", "train_bits", "train_bits_from", "block_size"),
    *("coding", "untouched_bits", "merge_norms", "include", "exclude", "min_size", "structured"),
    *("gradient_scale", "autograd", "linear", "initial_values", "share_biases"),
}
# With `auto`, all weights are built at once if they take no more bytes.
_WHOLE_BYTES = 1 << 22
# Batch sizes of layers for which a choice is remembered.
_MOST_WAYS = 1024


class SharedVector(ComputedWeights):
    """phi on the root module, and a computed attribute wherever a weight was.

    phi is a parameter of the root itself, not of a child module (an `nn.Sequential` runs every
    child it has), and every access looks it up there, so that `.to()`, `load_state_dict(...,
    assign=True)` and `torch.func.functional_call` find one owner.
    """

    parts: Mapping[str, Level] = {_VALUES: "model"}
    root_names: ClassVar[tuple[str, ...]] = (_SCALES,)
    mark: ClassVar[str] = FINGERPRINT

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        weights: tuple[CompressibleWeight, ...],
        mapping: SlotMapping,
        scales: list[float],
        *,
        gradient_scale: GradientScale,
        initial_scale: float | None,
        autograd: Autograd,
        linear: Choice,
    ) -> None:
        super().__init__(strategy, model, weights)
        self.mapping = mapping
        self.gradient_scale: GradientScale = gradient_scale
        self.initial_scale = initial_scale
        if autograd == "auto":
            size = sum(weight.numel * weight.tensor.itemsize for weight in weights)
            small = size <= _WHOLE_BYTES and linear in ("auto", "weight")
            autograd = "whole" if small else "lean"
        self.autograd: Autograd = autograd
        self.linear: Choice = linear
        # At ratio 1 nothing is shared: the row is what the dense model makes of it.
        rows = [None if mapping.is_bijection else zero_row_of(weight) for weight in weights]
        self.zero_rows: list[int | None] = rows
        self.scales = scales
        self.fingerprint = _fingerprint(strategy, mapping)
        self._plans: dict[int, RowProducts] = {}
        self._ways: dict[tuple[int, int, str, bool, bool], Way] = {}
        self._factors: tuple[object, Tensor, Tensor] | None = None
        self._whole: WholeModel | None = None
        self._reach: tuple[list[float], Tensor] | None = None
        self._running = RunningPasses()
        self._evaluation: Evaluation | None = None

    def share(self, values: Tensor) -> None:
        """Register phi and turn the dense parameters into views. Nothing here fails."""
        self.attach({_VALUES: [values]})
        self.slot_factors(values.device, working_dtype(values.dtype))
        register_mapping(self.fingerprint, self.mapping)
        self._handles += (
            self.model.register_forward_pre_hook(self._begin_forward),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        )

    @property
    def values(self) -> Tensor:
        """Phi, shape (m,)."""
        return getattr(self.model, _VALUES)

    @property
    def num_values(self) -> int:
        """The m of the papers."""
        return self.mapping.num_slots

    def source(self, index: int, module: nn.Module) -> View:
        """See `ComputedWeights.source`."""
        multiplies = self.autograd == "lean" and self.linear != "weight"
        kind = ProductView if multiplies else View
        return kind(self, index, autocasts=autocasts(module))

    @property
    def index_bytes(self) -> int:
        """Bytes beside phi: a float32 scale per tensor, 8 for the fingerprint of the hash."""
        return 4 * len(self.scales) + 8

    def weight(self, index: int, *, autocasts: bool = False) -> Tensor:
        """Build dense weight number `index`.

        While the root's forward pass runs, a weight that something still holds is returned again.

        Args:
            index: Of the weight.
            autocasts: Whether the layer that asks takes it in the dtype of autocast, if that is on.
        """
        values = self.values
        dtype = values.dtype
        if autocasts and dtype != torch.float64 and torch.is_autocast_enabled(values.device.type):
            dtype = torch.get_autocast_dtype(values.device.type)
        if torch.compiler.is_compiling():
            return self._compiled_weight(values, index, dtype)
        return self._current_pass(values).weight(index, dtype)

    def product(self, index: int, inputs: Tensor) -> Tensor | None:
        """Multiply with weight number `index` without building it, where that is cheaper.

        Args:
            index: Of the weight, taken as a matrix: (first dimension, all others).
            inputs: Shape (..., columns).

        Returns:
            Shape (..., rows): inputs @ weight.T, in the dtype of autocast if that is on; `None`
            where the weight is to be built.
        """
        values = self.values
        if is_transformed(values):
            return None
        current = self._current_pass(values)
        assert isinstance(current, ForwardPass)
        way = self._way(current, index, inputs) if self.linear == "auto" else self.linear
        return None if way == "weight" else current.product(index, inputs, way)

    def _way(self, current: ForwardPass, index: int, inputs: Tensor) -> Way:
        """Choose, and remember for batches of the same size."""
        batch = inputs.numel() // max(1, inputs.shape[-1])
        key = index, batch, inputs.device.type, current.needs_graph(inputs), current.lasts
        if key not in self._ways:
            if len(self._ways) >= _MOST_WAYS:
                self._ways.clear()
            self._ways[key] = current.choose(index, batch, training=key[3])
        return self._ways[key]

    def release(self) -> None:
        """See `Compression.release`: the weights that an evaluation has built."""
        self._evaluation = None

    def slot_factors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return 1 / nu_b and Gamma_b / nu_b, of shape (segments,), 0 where no weight lies.

        They are kept until the scales, the device or the dtype change.
        """
        if self._factors is None or self._factors[0] != (device, dtype):
            with torch.inference_mode(False):
                found = slot_factors(
                    self.mapping, self.scales, self.initial_scale, self.gradient_scale, dtype
                )
                forward, backward = (factor.to(device, dtype) for factor in found)
            self._factors, self._whole = ((device, dtype), forward, backward), None
        return self._factors[1], self._factors[2]

    def reach(self, parameter: Tensor) -> Tensor | None:
        """See `Compression.reach`: sqrt(load_b) mu_b / nu_b for slot b."""
        if parameter is not self.values:
            return None
        dtype = working_dtype(self.dtype)
        forward, _ = self.slot_factors(parameter.device, dtype)
        if self._reach is None or self._reach[0] != self.scales:
            squares = self.mapping.accumulate([scale**2 for scale in self.scales])
            self._reach = (list(self.scales), squares.sqrt().to(forward))
        return self.mapping.scale(torch.ones_like(parameter, dtype=dtype), self._reach[1] * forward)

    @property
    def resident_bytes(self) -> int:
        """See `Compression.resident_bytes`: scales, factors of segments, signs, plans, reach."""
        kept = 0 if self._factors is None else 2 * self._factors[1].nbytes
        kept += 0 if self._whole is None else self._whole.nbytes
        kept += 0 if self._reach is None else self._reach[1].nbytes
        plans = sum(plan.nbytes for plan in self._plans.values())
        return self.index_bytes + kept + self.mapping.kept_bytes + plans

    @property
    def index_format(self) -> str:
        """The mapping is a function of the seed."""
        return "seed"

    def stored_values(self) -> dict[str, Tensor]:
        """See `Compression.stored_values`."""
        return {_VALUES: self.values}

    def sources(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Compression.sources`: h(i), and g_i lambda / nu_b."""
        mapping, scales, span = self.mapping, self.scales, self.mapping.spans[index]
        dtype = working_dtype(self.dtype)
        gains, _ = slot_factors(mapping, scales, self.initial_scale, self.gradient_scale, dtype)
        numbers = torch.arange(1, self.num_values + 1, dtype=torch.float64)
        gains = mapping.scale(torch.ones_like(numbers), gains)
        factors = mapping.gather(gains, span, scales[index])
        places = mapping.gather(numbers, span, 1.0).abs_().long().sub_(1).view(span.shape)
        if (row := self.zero_rows[index]) is not None:
            places[row] = -1
        return places, factors.view(span.shape)

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        device = self.values.device
        return {
            _SCALES: torch.tensor(self.scales, dtype=torch.float32, device=device),
            FINGERPRINT: torch.tensor(self.fingerprint, dtype=torch.int64, device=device),
        }

    def accept(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Take over the scales of stored tensors, and return their values.

        Raises:
            InputError: A tensor is missing, or does not fit.
        """
        for name in (_VALUES, _SCALES, FINGERPRINT):
            if name not in tensors:
                raise InputError(f"the artifact has no tensor {name}")
        values = tensors[_VALUES]
        if values.shape != (self.num_values,) or not values.is_floating_point():
            raise InputError(
                f"the artifact's {_VALUES} is {values.dtype} of shape {tuple(values.shape)}; "
                f"floating-point numbers of shape ({self.num_values},) are needed"
            )
        self.adopt(tensors)
        return values

    def structure(self) -> dict[str, Tensor]:
        """See `Compression.structure`: the scales, and what the values were folded with."""
        return self.index_tensors()

    def adopt(self, structure: Mapping[str, Tensor]) -> None:
        """Take over the scales of values that come from elsewhere.

        Raises:
            InputError: They do not fit.
        """
        scales = structure[_SCALES]
        if not is_fingerprint(structure[FINGERPRINT], self.fingerprint):
            raise InputError(
                "these values were folded with another strategy, seed, ratio, set of weights or "
                f"mapping option than this model's {self.strategy}"
            )
        if scales.shape != (len(self.scales),):
            raise InputError(
                f"{_SCALES} has shape {tuple(scales.shape)}, expected ({len(self.scales)},)"
            )
        if not bool((scales > 0).all() and scales.isfinite().all()):
            raise InputError(f"{_SCALES} must be finite numbers above 0")
        self.scales = [float(scale) for scale in scales]
        self._factors = self._whole = None
        if _VALUES in self.model._parameters:
            self.slot_factors(self.values.device, working_dtype(self.dtype))
        self.release()

    def dense_weights(self) -> list[Tensor]:
        """See `ComputedWeights.dense_weights`; from one pass."""
        source = self._make_pass(self.values)
        return [source.weight(index, self.dtype) for index in range(len(self.scales))]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the passes that run now."""
        fresh = {"_running": RunningPasses(), "_evaluation": None, "_plans": {}, "_ways": {}}
        return {**self.__dict__, **fresh, "_whole": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the mapping known in this process."""
        vars(self).update(state)
        register_mapping(self.fingerprint, self.mapping)

    def _current_pass(self, values: Tensor) -> RunningPass:
        """Return the pass that runs; outside the root's forward, one for this weight alone."""
        needs_graph = torch.is_grad_enabled() and values.requires_grad
        running = self._running.innermost()
        if running is None or running.values is not values:
            return self._make_pass(values)
        return running if running.tracked or not needs_graph else self._make_pass(values)

    def _make_pass(self, values: Tensor, *, lasts: bool = False) -> ForwardPass:
        check_not_exported()
        factors = self.slot_factors(values.device, working_dtype(values.dtype))
        lean = self.autograd != "classic" and not is_transformed(values)
        mapping, scales, rows = self.mapping, self.scales, self.zero_rows
        plans = self._plans
        return ForwardPass(values, mapping, scales, rows, factors, plans, lean=lean, lasts=lasts)

    def _whole_pass(self, values: Tensor) -> WholePass:
        check_not_exported()
        factors = self.slot_factors(values.device, working_dtype(values.dtype))
        if self._whole is None:
            with torch.inference_mode(False):
                self._whole = self.mapping.whole(self.scales, self.zero_rows, factors)
        return WholePass(values, self._whole)

    def _compiled_weight(self, values: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        # What `slot_factors` has computed last: a graph can convert it, not compute it.
        assert self._factors is not None
        _, forward, backward = self._factors
        dtype_of_slots = working_dtype(values.dtype)
        forward = forward.to(values.device, dtype_of_slots)
        backward = backward.to(values.device, dtype_of_slots)
        scale, row = self.scales[index], self.zero_rows[index]
        key = self.fingerprint
        return compiled_weight(values, (forward, backward), key, index, scale, dtype, row)

    def _begin_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self._running.innermost()  # lets go of those that were interrupted
        values = self.values
        transformed = is_transformed(values)
        if torch.is_grad_enabled() or module.training or transformed:
            self.release()
            # A new pass never uses an older one's tensors: phi may have been changed through
            # .data, which leaves no trace.
            whole = self.autograd == "whole" and not transformed
            started = self._whole_pass(values) if whole else self._make_pass(values)
        else:
            started = self._evaluation_pass(values)
        self._running.begin(started, sys._getframe(1))

    def _end_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # Nothing runs in a graph, or when a hook of the user's own failed before ours.
        if not torch.compiler.is_compiling():
            self._running.end()

    def _evaluation_pass(self, values: Tensor) -> ForwardPass:
        """Return the pass of the batch before if phi is the same, number by number."""
        known = self._evaluation
        if known is None or not known.fits(values):
            self.release()
            if not has_room(self.dense_bytes + values.nbytes, values.device):
                return self._make_pass(values)
            known = self._evaluation = Evaluation(values, self._make_pass(values, lasts=True))
        return known.forward_pass


def _fingerprint(strategy: Strategy, mapping: SlotMapping) -> int:
    """Hash what the values mean; the order of the tensors, their names and shapes included."""
    options = {k: v for k, v in strategy.to_dict().items() if k not in _FREE_OPTIONS}
    parts = [f"{key}={options[key]}" for key in sorted(options)]
    shapes = [f"{span.name}{tuple(span.shape)}" for span in mapping.spans]
    return fingerprint(*parts, mapping.num_slots, *shapes)


def stored_like(num_values: int, num_tensors: int, dtype: torch.dtype) -> Stored:
    """Describe what is stored: phi, and beside it what `SharedVector.index_bytes` counts."""
    indices = {_SCALES: like([num_tensors], torch.float32), FINGERPRINT: like([], torch.int64)}
    return Stored(num_values, {_VALUES: like([num_values], dtype)}, indices)
