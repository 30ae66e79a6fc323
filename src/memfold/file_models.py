"""Files that people write, and records that are read back: one line per mistake."""

import functools
import json
import re
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from memfold.errors import InputError
from memfold.files import read_json, read_yaml_text, write_text_atomically

__all__ = ["Model", "Number", "Seed", "Seeds", "Text", "check", "distinct", "read_yaml"]

_T = TypeVar("_T")
_UNKNOWN = "unknown_key"
_ALLOWED = {
    "bool_type": "be true or false",
    "dataclass_type": "be a mapping",
    "dict_type": "be a mapping",
    "finite_number": "be a finite number",
    "float_type": "be a number",
    "greater_than": "be above {gt:g}",
    "greater_than_equal": "be at least {ge}",
    "int_type": "be a whole number",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le:g}",
    "list_type": "be a list",
    "literal_error": "be {expected}",
    "string_pattern_mismatch": "be a text without NUL",
    "string_too_short": "be a text",
    "string_type": "be a text",
    "too_long": "have at most {max_length} entries",
    "too_short": "have at least {min_length} entry",
}
"""What is allowed, by pydantic's name of the mistake."""
_MAX_SHOWN = 60  # characters of a wrong value


class Model(BaseModel):
    """A mapping with known keys, whose values are taken as they stand."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, content: Any) -> Any:
        keys = {entry.alias or name for name, entry in cls.model_fields.items()}
        known = ", ".join(sorted(keys))
        if not isinstance(content, dict):
            raise ValueError(f"must be a mapping of {known}")
        for key in content:
            if key not in keys:
                facts = {"key": _show(key).strip("'"), "known": known}
                raise PydanticCustomError(_UNKNOWN, "is unknown; there are {known}", facts)
        return content

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `write` has written.

        Raises:
            FileNotFoundError: There is no such file.
            InputError: It is damaged, or cannot be read.
        """
        try:
            content = read_json(file)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged or cannot be read ({error})") from error
        return check(cls, content, f"{file} is damaged")

    @classmethod
    def find(cls, file: Path) -> Self | None:
        """Return what `read` does, or `None` where there is nothing that can be read."""
        with suppress(FileNotFoundError, InputError):
            return cls.read(file)
        return None

    def write(self, file: Path) -> None:
        """Write JSON.

        Raises:
            InputError: The file cannot be written; it is then what it was.
        """
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=2)
        write_text_atomically(file, text + "\n")


def distinct(values: list[Any]) -> list[Any]:
    """Check that nothing is named twice.

    Raises:
        ValueError: Something is.
    """
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value} is there twice")
    return values


Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=10_000, pattern=r"^[^\x00]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1, max_length=1000), AfterValidator(distinct)]


def check(kind: type[_T], content: object, place: object = "") -> _T:
    """Read the content of a file, or a value in it.

    Args:
        kind: What it must be: a `Model`, a dataclass or another type.
        content: Plain values.
        place: The file, or the value's key, for the message.

    Raises:
        InputError: A key is missing or unknown, or a value is not allowed.
    """
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        raise InputError(_describe(error, place)) from error


_adapter = functools.cache(TypeAdapter)


def read_yaml(path: Path, model: type[_T]) -> _T:
    """Read a YAML file that a person has written.

    Raises:
        InputError: It cannot be read, a mapping names a key twice, or as `check`.
    """
    try:
        content = yaml.load(read_yaml_text(path), _Loader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return check(model, content, path)


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML keeps the last; takes 1e-5 for the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            if key in seen:
                problem = f"{key} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _describe(error: ValidationError, place: object) -> str:
    """Say what the first mistake is: the file, the key, the value and what is allowed."""
    first = error.errors(include_url=False)[0]
    facts, kind = first.get("ctx", {}), first["type"]
    path = _path(*first["loc"], *([facts["key"]] if kind == _UNKNOWN else []))
    if kind == _UNKNOWN:
        text = first["msg"]
    elif kind == "missing":
        text = "is missing"
    elif kind == "value_error":
        text = str(facts["error"])
    else:
        allowed = _ALLOWED.get(kind)
        text = first["msg"] if allowed is None else f"must {allowed.format_map(facts)}"
        text += f", got {_show(first['input'])}"
    where = ": ".join(part for part in (str(place), path) if part)
    between = " " if text.startswith(("must ", "is ")) else ": "
    return f"{where}{between}{text}" if where else text


def _path(*parts: object) -> str:
    return ".".join(str(part)[:_MAX_SHOWN] for part in parts if part != "[key]")


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
