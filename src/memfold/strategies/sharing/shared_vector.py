"""The shared vector of a model and the weights that are views into it.

    theta_i = g_i (lambda_l(i) / nu_b) phi_b,   b = h(i)

phi is the only trained copy. lambda_l is the standard deviation of tensor l's own initial weights;
mu_b the root mean square of lambda over the weights in slot b; nu_b = mu_b, or one constant when an
initial scale is given. The gradient of phi is multiplied by

    Gamma_b = (nu_b / mu_b)^2 / load_b^p      p = 1 (projection), 1/2 (length);  1 for none.

With S_ib = g_i lambda / nu_b, S^T S = diag(load mu^2 / nu^2), so `projection` makes S Gamma S^T the
orthogonal projector: projected gradient descent in the space of the weights, whatever the initial
scales. mu, nu, Gamma and the loads are vectors of m numbers that follow from the lambdas and the
hash: they are computed once per forward pass and dropped, never stored.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal
from warnings import warn
from weakref import ref

import torch
from torch import Tensor, nn

from memfold.errors import InputError
from memfold.seeding import derive_seed
from memfold.strategies.base import Strategy
from memfold.strategies.compression import Compression
from memfold.strategies.computed import compute_parameters, restore_parameters
from memfold.strategies.selection import CompressibleWeight
from memfold.strategies.sharing.autograd import ReadWeight, ScaleSlots, working_dtype
from memfold.strategies.sharing.mapping import SlotMapping

__all__ = ["RESERVED_NAMES", "GradientScale", "SharedVector", "index_bytes"]

GradientScale = Literal["length", "projection", "none"]

_VALUES = "shared_values"
_SCALES = "shared_scales"
_FINGERPRINT = "shared_fingerprint"
RESERVED_NAMES = (_VALUES, _SCALES, _FINGERPRINT)
"""State-dict names on the root module."""

# Options that the fingerprint holds as what they led to, or that do not change what values mean.
_FREE_OPTIONS = frozenset(
    ("ratio", "budget_bytes", "bits", "gradient_scale", "include", "exclude", "min_size")
)


class _View:
    """What a module computes its weight with: a callable that copies and pickles."""

    def __init__(self, shared: "SharedVector", index: int) -> None:
        self.shared = shared
        self.index = index

    @property
    def root(self) -> nn.Module:
        return self.shared.model

    def __call__(self) -> Tensor:
        return self.shared.weight(self.index)


class _Pass:
    """What one forward pass of the root has built."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._built: dict[tuple[object, ...], ref[Tensor]] = {}
        self._held: list[Tensor] = []

    def recall(
        self,
        key: object,
        mode: tuple[bool, ...],
        build: Callable[[], Tensor],
        *,
        hold: bool = False,
    ) -> Tensor:
        """Return the tensor built before in the same mode, if anything holds it; else build it."""
        known = self._built.get((key, *mode))
        tensor = known() if known is not None else None
        if tensor is None:
            tensor = build()
            self._built[(key, *mode)] = ref(tensor)
            if hold:
                self._held.append(tensor)
        return tensor


class SharedVector(Compression):
    """phi on the root module, and a computed attribute wherever a weight was.

    phi is a parameter of the root itself, not of a child module (an `nn.Sequential` runs every
    child it has), and every access looks it up there, so that `.to()`, `load_state_dict(...,
    assign=True)` and `torch.func.functional_call` find one owner.
    """

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
    ) -> None:
        super().__init__(strategy, model, weights)
        self.mapping = mapping
        self.gradient_scale: GradientScale = gradient_scale
        self.initial_scale = initial_scale
        self.places = [[(o.module, o.attribute) for o in weight.owners] for weight in weights]
        # At ratio 1 nothing is shared: the row is what the dense model makes of it.
        rows = [None if mapping.is_bijection else _zero_row(weight) for weight in weights]
        self.zero_rows: list[int | None] = rows
        self.scales = scales
        self.fingerprint = _fingerprint(self)
        self._pass: _Pass | None = None

    def attach(self, values: Tensor) -> None:
        """Register phi and turn the dense parameters into views. Nothing here fails."""
        sources: dict[nn.Module, dict[str, _View]] = {}
        for index, places in enumerate(self.places):
            for module, attribute in places:
                sources.setdefault(module, {})[attribute] = _View(self, index)
        for module, views in sources.items():
            compute_parameters(module, views)
        self.model.register_parameter(_VALUES, nn.Parameter(values))
        self._handles = (
            # PyTorch marks this hook with an attribute, which a bound method cannot take.
            self.model.register_state_dict_post_hook(partial(self._save_scales)),
            self.model.register_load_state_dict_pre_hook(self._load_scales),
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

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of phi, and of every weight built from it."""
        return self.values.dtype

    @property
    def index_bytes(self) -> int:
        """See `index_bytes`."""
        return index_bytes(len(self.scales))

    def weight(self, index: int) -> Tensor:
        """Build dense weight number `index`.

        While the root's forward pass runs, a weight that something still holds is returned again.
        """
        values = self.values
        running = self._pass
        if running is None or running.values is not values:
            return self._read(index, self._slots(values))
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        slots = running.recall("slots", mode, lambda: self._slots(values), hold=True)
        return running.recall(index, mode, lambda: self._read(index, slots))

    def slot_factors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute 1 / nu_b and Gamma_b / nu_b, each of shape (m,); 0 for a slot with no weight.

        In place as far as possible: at mild ratios these vectors are as large as the model.
        """
        load = self.mapping.accumulate([1.0] * len(self.scales), device, dtype)
        mean_square = self.mapping.accumulate([s**2 for s in self.scales], device, dtype)
        unused = load == 0
        load.clamp_(min=1)
        # The square of a scale below 1e-19 is 0 in float32: such a slot has less than unit gain.
        mean_square.div_(load).clamp_(min=torch.finfo(dtype).tiny).masked_fill_(unused, 1)
        if self.initial_scale is None:
            forward = mean_square.rsqrt()
        else:
            forward = torch.full_like(load, 1 / self.initial_scale)
        forward.masked_fill_(unused, 0)
        if self.gradient_scale == "none":
            return forward, forward
        if self.gradient_scale == "length":
            load.sqrt_()
        # Gamma / nu = nu / (mu^2 load^p), where 1 / nu is at hand.
        backward = load.mul_(mean_square).mul_(forward).reciprocal_().masked_fill_(unused, 0)
        return forward, backward

    def owned_names(self) -> frozenset[str]:
        """See `Compression.owned_names`."""
        return frozenset((_VALUES, _SCALES, _FINGERPRINT))

    @property
    def index_format(self) -> str:
        """The mapping is a function of the seed."""
        return "seed"

    def value_tensors(self) -> dict[str, Tensor]:
        """See `Compression.value_tensors`."""
        return {_VALUES: self.values.detach()}

    def index_tensors(self) -> dict[str, Tensor]:
        """See `Compression.index_tensors`."""
        return self._scale_tensors()

    def accept(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Take over the scales of stored tensors, and return their values.

        Raises:
            InputError: A tensor is missing, or does not fit.
        """
        for name in RESERVED_NAMES:
            if name not in tensors:
                raise InputError(f"the artifact has no tensor {name}")
        values = tensors[_VALUES]
        if values.shape != (self.num_values,) or not values.is_floating_point():
            raise InputError(
                f"the artifact's {_VALUES} is {values.dtype} of shape {tuple(values.shape)}; "
                f"floating-point numbers of shape ({self.num_values},) are needed"
            )
        problem = self._take_scales(tensors[_SCALES], tensors[_FINGERPRINT])
        if problem is not None:
            raise InputError(problem)
        return values

    def check_places(self) -> None:
        """See `Compression.check_places`."""
        modules = set(self.model.modules())
        for name, places in zip(self.names, self.places, strict=True):
            if any(module not in modules for module, _ in places):
                raise InputError(f"{name}: its module was replaced after the model was compressed")

    def restore_dense(self) -> None:
        """See `Compression.restore_dense`."""
        for handle in self._handles:
            handle.remove()
        with torch.no_grad():
            trains = self.values.requires_grad
            slots = self._slots(self.values)
            built = [self._read(index, slots) for index in range(len(self.scales))]
        weights = [nn.Parameter(weight, requires_grad=trains) for weight in built]
        dense: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for weight, places in zip(weights, self.places, strict=True):
            for module, attribute in places:
                dense.setdefault(module, {})[attribute] = weight
        del self.model._parameters[_VALUES]
        for module, parameters in dense.items():
            restore_parameters(module, parameters)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the pass that runs now."""
        return {**self.__dict__, "_pass": None}

    def _slots(self, values: Tensor) -> Tensor:
        dtype = working_dtype(values.dtype)
        forward, backward = self.slot_factors(values.device, dtype)
        if torch.is_grad_enabled() and values.requires_grad:
            return ScaleSlots.apply(values, forward, backward)
        return values.to(dtype) * forward

    def _read(self, index: int, slots: Tensor) -> Tensor:
        span, scale, row = self.mapping.spans[index], self.scales[index], self.zero_rows[index]
        return ReadWeight.apply(slots, self.mapping, span, scale, self.dtype, row)

    def _begin_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A new pass never uses an older one's tensors: phi may have been changed through .data,
        # which leaves no trace.
        self._pass = _Pass(self.values)

    def _end_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._pass = None

    def _scale_tensors(self) -> dict[str, Tensor]:
        device = self.values.device
        return {
            _SCALES: torch.tensor(self.scales, dtype=torch.float32, device=device),
            _FINGERPRINT: torch.tensor(self.fingerprint, dtype=torch.int64, device=device),
        }

    def _take_scales(self, scales: Tensor, fingerprint: Tensor) -> str | None:
        """Take over another model's scales, or say why they do not fit."""
        if fingerprint.numel() != 1 or int(fingerprint) != self.fingerprint:
            return (
                "these values were folded with another strategy, seed, ratio, set of weights or "
                f"mapping option than this model's {self.strategy}"
            )
        if scales.shape != (len(self.scales),):
            return f"{_SCALES} has shape {tuple(scales.shape)}, expected ({len(self.scales)},)"
        if not bool((scales > 0).all() and scales.isfinite().all()):
            return f"{_SCALES} must be finite numbers above 0"
        self.scales = [float(scale) for scale in scales]
        return None

    def _save_scales(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        state.update({prefix + name: tensor for name, tensor in self._scale_tensors().items()})

    def _load_scales(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_messages: list[str],
    ) -> None:
        tensors = [state.pop(prefix + name, None) for name in (_SCALES, _FINGERPRINT)]
        if tensors[0] is None or tensors[1] is None:
            if prefix + _VALUES in state:
                error_messages.append(
                    f"{_VALUES} came without {_SCALES} and {_FINGERPRINT}: nothing tells whether "
                    "they fit this model's mapping"
                )
            missing_keys += [prefix + _SCALES, prefix + _FINGERPRINT]
            return
        problem = self._take_scales(tensors[0], tensors[1])
        if problem is not None:
            error_messages.append(problem)


def index_bytes(num_tensors: int) -> int:
    """Bytes stored beside phi: a float32 scale per tensor, 8 for the fingerprint of the hash."""
    return 4 * num_tensors + 8


def _fingerprint(shared: SharedVector) -> int:
    """Hash what the values mean; the order of the tensors, their names and shapes included."""
    options = {
        key: value for key, value in shared.strategy.to_dict().items() if key not in _FREE_OPTIONS
    }
    parts = [f"{key}={options[key]}" for key in sorted(options)]
    shapes = [f"{span.name}{tuple(span.shape)}" for span in shared.mapping.spans]
    return derive_seed(*parts, shared.num_values, *shapes)


def _zero_row(weight: CompressibleWeight) -> int | None:
    """Row of an embedding that stays zero: the padding, unless a tied layer trains it."""
    module = weight.owners[0].module
    if len(weight.owners) > 1 or not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    row = module.padding_idx
    if row is not None and bool(weight.tensor.detach()[row].any()):
        warn(
            f"{weight.name}: the padding row {row} is not zero and cannot be kept; it becomes zero",
            stacklevel=2,
        )
    return row
