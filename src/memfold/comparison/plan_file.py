"""YAML files in which nothing is said twice."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from memfold.errors import InputError
from memfold.files import read_yaml_text

__all__ = ["read_mapping"]


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            if key in seen:
                problem = f"{key} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, place.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> Any:
    """Read a YAML file; what its content must be is for the caller to check.

    Raises:
        InputError: It cannot be read, or a mapping names a key twice.
    """
    try:
        return yaml.load(read_yaml_text(path), _Loader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
