"""Config files: one YAML mapping, every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapro.experiments.errors import UserError

__all__ = ["read_yaml"]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping of names to values, or a key given twice,
            of which YAML would silently keep the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{path} gives {key!r} more than once; keep one of them")
            return super().construct_mapping(node, deep)

    file = Path(path)
    if not file.is_file():
        raise UserError(f"no config file {str(path)!r}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a YAML file: {reason}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path} must hold 'key: value' lines, found {found}")
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{path}: the key {key!r} is not a word; expected 'key: value' lines")
        if value is None:
            raise UserError(f"{path}: {key!r} has no value; give it one or leave the key out")
    return values
