"""What a backbone is told of the data: the facts that its signature names."""

import inspect
from collections.abc import Callable

from memfold.data.spec import DataSpec, Images, Table, Tokens
from memfold.errors import InputError

__all__ = ["facts_of", "named_facts"]

_KINDS = {
    Images: ("in_channels", "image_size"),
    Tokens: ("vocabulary_size", "length"),
    Table: ("num_numeric", "cardinalities"),
}


def facts_of(spec: DataSpec) -> dict[str, object]:
    """Return every fact that a backbone for `spec` may ask for by name.

    `spec` itself; `num_outputs`, also as `num_classes`; and of images `in_channels` and
    `image_size` (pixels; height and width where they differ), of tokens `vocabulary_size` and
    `length`, of tables `num_numeric` and `cardinalities`.
    """
    inputs = spec.inputs
    if isinstance(inputs, Images):
        is_square = inputs.height == inputs.width
        size = inputs.height if is_square else (inputs.height, inputs.width)
        values: tuple[object, object] = (inputs.channels, size)
    elif isinstance(inputs, Tokens):
        values = (inputs.vocabulary_size, inputs.length)
    else:
        values = (inputs.num_numeric, inputs.cardinalities)
    of_inputs = dict(zip(_KINDS[type(inputs)], values, strict=True))
    outputs = dict.fromkeys(("num_outputs", "num_classes"), spec.num_outputs)
    return {"spec": spec, **outputs, **of_inputs}


def named_facts(build: Callable[..., object], spec: DataSpec, key: str) -> dict[str, object]:
    """Return the facts that the signature of `build` names; none where it cannot be read.

    A bare `**kwargs` does not count: most would forward an unknown keyword to a class that refuses
    it.

    Raises:
        InputError: It needs facts about another kind of data, or one number for the size of images
            that are not square; the message begins with `key`.
    """
    try:
        parameters = inspect.signature(build).parameters.values()
    except (ValueError, TypeError):  # some builtins have none
        return {}
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    facts = facts_of(spec)
    for kind, names in _KINDS.items():
        needed = [n for n in names if n in named and named[n].default is inspect.Parameter.empty]
        if needed and not isinstance(spec.inputs, kind):
            raise InputError(
                f"{key} takes {kind.kind} (it needs {' and '.join(needed)}), and the data give "
                f"{spec.inputs.kind}; docs/backbones.md lists backbones for {spec.inputs.kind}"
            )
    size = facts.get("image_size")
    if isinstance(size, tuple) and "image_size" in named and named["image_size"].annotation is int:
        raise InputError(f"{key} takes square images, and the data give {size[0]} x {size[1]}")
    return {name: fact for name, fact in facts.items() if name in named}
