"""Models built on the meta device: memory and values for the tensors of one module at a time.

A module on the meta device has shapes and no values. Its own initialiser gives it those that its
constructor would have given, so a dense model that fits in no memory can be measured, folded and
dropped module by module. Modules inside come before the module around them, and siblings in the
order in which they are registered: that is the order of most constructors, so PyTorch's global
generator hands every module the numbers that the dense construction would have drawn.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from memfold.compression.accounting import storage_key
from memfold.compression.initial_values import is_structured
from memfold.compression.initialisers import Initialisers, written_storages
from memfold.compression.selection import CompressibleWeight, plain_tensors, sample_names
from memfold.errors import InputError

__all__ = [
    "check_has_values",
    "dense_weights",
    "device_of",
    "filler",
    "structured_weights",
    "with_values",
]


@dataclass(frozen=True)
class _Place:
    """Where a tensor is registered, as a parameter or as a buffer."""

    module: nn.Module
    attribute: str
    name: str
    """State-dict name, also of a buffer that no state dict holds."""

    def registry(self) -> dict[str, Tensor | None]:
        own = self.module._parameters
        return own if self.attribute in own else self.module._buffers  # type: ignore[return-value]

    def get(self) -> Tensor:
        tensor = self.registry()[self.attribute]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        self.registry()[self.attribute] = tensor


@dataclass(frozen=True)
class _MetaTensor:
    """A tensor without values; one that is tied has several places."""

    originals: tuple[Tensor, ...]
    """What the model held there, place by place."""
    places: tuple[_Place, ...]
    """In the order of registration; the first one's module initialises it."""

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def key(self) -> tuple[object, ...]:
        return storage_key(self.originals[0])

    @property
    def storage(self) -> int:
        return self.originals[0].untyped_storage()._cdata

    def put(self, tensor: Tensor) -> None:
        for place in self.places:
            place.put(tensor)

    def drop(self) -> None:
        """Put back what has no values."""
        for place, original in zip(self.places, self.originals, strict=True):
            place.put(original)


def check_has_values(model: nn.Module) -> None:
    """Check that no parameter or buffer is on the meta device.

    Raises:
        InputError: One is.
    """
    for tensor in _meta_tensors(model):
        raise InputError(
            f"{tensor.name} is on the meta device and has no values: only strategies that draw "
            "weights anew (such as stable_rps) initialise such models; build the model on a device"
        )


def device_of(model: nn.Module, weights: Sequence[CompressibleWeight] = ()) -> torch.device:
    """Return the device for tensors that have none: that of all others.

    Args:
        model: The root module, on the meta device or partly on it.
        weights: Where some of these have values, their device is meant, and no other tensor's.

    Returns:
        PyTorch's default device where the whole model is on the meta device; the CPU where that
        is the default.

    Raises:
        InputError: The other tensors are on several devices.
    """
    chosen = {weight.tensor.device for weight in weights if not weight.tensor.is_meta}
    places = (place.get() for place in _places(model))
    devices = chosen or {tensor.device for tensor in places if not tensor.is_meta}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise InputError(
            f"the model is partly on the meta device and else on several ({names}); one is needed"
        )
    default = torch.get_default_device()
    return next(iter(devices), torch.device("cpu") if default.type == "meta" else default)


@contextmanager
def with_values() -> Iterator[None]:
    """Put what is made on the way on the CPU where PyTorch's default device is meta."""
    is_meta = torch.get_default_device().type == "meta"
    with torch.device("cpu") if is_meta else nullcontext():
        yield


@contextmanager
def dense_weights(
    model: nn.Module, weights: Sequence[CompressibleWeight], device: torch.device
) -> Iterator[Iterator[int]]:
    """Let the dense values of `weights` pass once: `weights[i].tensor` has them while i is out.

    On a plain model these are its parameters. On the meta device, each is initialised before it
    is its turn and dropped right after; whatever else had no values keeps those that it gets.
    Where the body raises, or an initialiser, the model is left as it was. Go through all of them.

    Args:
        model: The root module.
        weights: Weights of it; those without values get them on `device`.
        device: See `device_of`.

    Yields:
        The numbers of the weights, in the order in which they are initialised.

    Raises:
        InputError: A tensor on the meta device has no initialiser, or one that does not fill it.
    """
    tensors = _meta_tensors(model)
    if not tensors:
        yield iter(range(len(weights)))
        return
    plan = _Plan(model, weights, tensors, device)
    try:
        yield plan.run()
    except BaseException:
        plan.restore()
        raise


def structured_weights(model: nn.Module, weights: Sequence[CompressibleWeight]) -> frozenset[str]:
    """Name those of `weights` whose initial values are no noise (see `is_structured`).

    Weights on the meta device are initialised for it as `dense_weights` does, and dropped again;
    model and random state are as before, so that it can draw the same values. Initialisers run
    twice, therefore.

    Raises:
        InputError: See `dense_weights`.
    """
    tensors = _meta_tensors(model)
    passing: Iterator[int] = iter(range(len(weights)))
    with ExitStack() as stack:
        if tensors:
            device = device_of(model, weights)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # said when they are initialised for good
            cuda = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            plan = _Plan(model, weights, tensors, device)
            stack.callback(plan.restore)
            passing = plan.run()
        return frozenset(weights[i].name for i in passing if is_structured(weights[i].tensor))


def filler(model: nn.Module, names: Collection[str]) -> Callable[[Mapping[str, Tensor]], None]:
    """Prepare to give tensors on the meta device memory, and values that are stored elsewhere.

    Args:
        model: The root module.
        names: State-dict names of what is stored, and of what will need no memory.

    Returns:
        A function that takes stored tensors by name, of the same shapes, and fills those of the
        model that had no values when it was prepared; they keep their dtype.

    Raises:
        InputError: The model has other tensors on the meta device, or those that are not are on
            several devices.
    """
    tensors = _meta_tensors(model)
    for tensor in tensors:
        if not any(place.name in names for place in tensor.places):
            raise InputError(
                f"{tensor.name} is on the meta device and not in the artifact: give it values "
                "before"
            )
    device = device_of(model) if tensors else None

    def fill(values: Mapping[str, Tensor]) -> None:
        for tensor in tensors:
            name = next((place.name for place in tensor.places if place.name in values), None)
            if name is not None and device is not None:
                real = _empty_like(tensor.originals[0], device)
                real.detach().copy_(values[name])
                tensor.put(real)

    return fill


class _Plan:
    """Which module initialises which tensors, and in what order."""

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[CompressibleWeight],
        tensors: Sequence[_MetaTensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self._tensors = tensors
        self._numbers = {storage_key(weight.tensor): i for i, weight in enumerate(weights)}
        self._real = [place for place in _places(model) if not place.get().is_meta]
        self._dropped: dict[int, str] = {}
        self._initialisers = Initialisers(model)
        self._own: dict[nn.Module, list[_MetaTensor]] = {}
        self._tied: dict[nn.Module, list[_Place]] = {}
        for name, tensor in plain_tensors(model):
            if tensor.is_meta:
                raise InputError(
                    f"{name} holds a tensor on the meta device that is no parameter or buffer "
                    "there, so nothing can initialise it: give it values first"
                )
        self._assign()
        owners = {place.module for tensor in tensors for place in tensor.places}
        self._order = list(self._initialisers.inside_out(owners))
        self._initialisers.warn_ignored([m for m in self._order if not self._has_tensors(m)])

    def run(self) -> Iterator[int]:
        """See `dense_weights`; the weights of one module have memory at a time."""
        without_values = {tensor.key for tensor in self._tensors}
        yield from (number for key, number in self._numbers.items() if key not in without_values)
        for module in self._order:
            own = self._own.get(module, [])
            self._initialise(module, own)
            for tensor in own:
                number = self._numbers.get(tensor.key)
                if number is not None:
                    yield number
                    tensor.drop()
                    self._dropped[tensor.storage] = tensor.name

    def restore(self) -> None:
        """Undo everything."""
        for tensor in self._tensors:
            tensor.drop()

    def _has_tensors(self, module: nn.Module) -> bool:
        return module in self._own or module in self._tied

    def _assign(self) -> None:
        """Find for every tensor the module that initialises it.

        Raises:
            InputError: There is none.
        """
        without: list[str] = []
        for tensor in self._tensors:
            units = [self._initialisers.responsible_for(place.module) for place in tensor.places]
            first = units[0]
            if first is None:
                without.append(tensor.name)
                continue
            self._own.setdefault(first, []).append(tensor)
            for place, unit in zip(tensor.places, units, strict=True):
                if unit is not None and unit is not first:
                    self._tied.setdefault(unit, []).append(place)
        if without:
            raise InputError(
                f"{sample_names(without)}: on the meta device, and nothing initialises them; their "
                "module needs reset_parameters(), or the model _init_weights(module), or they "
                "need values before"
            )

    def _initialise(self, module: nn.Module, own: Sequence[_MetaTensor]) -> None:
        """Give the tensors of one module memory, and let its initialiser fill them."""
        made = [_empty_like(tensor.originals[0], self._device) for tensor in own]
        for tensor, real in zip(own, made, strict=True):
            if real.is_floating_point():
                # What an initialiser only scales, or fills in part, is not taken for a value.
                real.detach().fill_(nan)
            tensor.put(real)
        with ExitStack() as stack:
            self._hide(stack, module)
            stack.enter_context(self._device)
            written = stack.enter_context(written_storages())
            self._initialisers.call(module, own=self._has_tensors(module))
        unfilled = [
            tensor.name
            for tensor, real in zip(own, made, strict=True)
            if tensor.places[0].get() is not real
            or real.untyped_storage()._cdata not in written
            or bool(real.detach().sum().isnan())
        ]
        what = self._initialisers.describe(module)
        if unfilled:
            raise InputError(
                f"{sample_names(unfilled)}: on the meta device, and {what} does not fill it in "
                "place with numbers; it needs values before"
            )
        lost = [name for storage, name in self._dropped.items() if storage in written]
        if lost:
            warnings.warn(
                f"{what} also writes to {sample_names(lost)} of other modules: on the meta device "
                "these keep what their own initialiser gave them",
                stacklevel=2,
            )

    def _hide(self, stack: ExitStack, module: nn.Module) -> None:
        """Keep from an initialiser what is not its own to change, until the stack is closed.

        Tensors that had values before give way to some without. A tied tensor of another module
        gives way to memory that is thrown away: constructors, too, draw values for both places
        before they tie them.
        """
        for place in self._tied.get(module, []):
            stack.callback(place.put, place.get())
            place.put(_empty_like(place.get(), self._device))
        inside = set(module.modules()) if self._real else set()
        for place in self._real:
            if place.module in inside:
                stack.callback(place.put, place.get())
                place.put(_empty_like(place.get(), torch.device("meta")))


def _places(model: nn.Module) -> Iterator[_Place]:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield _Place(module, attribute, prefix + attribute)


def _meta_tensors(model: nn.Module) -> list[_MetaTensor]:
    """List the tensors without values, tied ones once, in the order of registration."""
    found: dict[tuple[object, ...], list[_Place]] = {}
    for place in _places(model):
        if place.get().is_meta:
            found.setdefault(storage_key(place.get()), []).append(place)
    return [_MetaTensor(tuple(p.get() for p in places), tuple(places)) for places in found.values()]


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():
        setattr(parameter, name, value)
    return parameter
