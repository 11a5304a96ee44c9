"""Config files: one YAML mapping, every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapro.experiments.errors import UserError

__all__ = ["read_yaml"]

MOST_VALUES, MOST_LEVELS = 10_000, 50  # of a file, once its aliases are written out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping of names to values, a key given twice, of
            which YAML would silently keep the last, or aliases that hold themselves or grow beyond
            what a config can be. Tags that make Python objects are not known.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            _count(node, {}, ())
            return node

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
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a config") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
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


def _count(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values in a node with its aliases written out, as printing it would."""
    if id(node) in above:
        raise UserError("an alias in the config file holds itself; write its value out")
    if len(above) >= MOST_LEVELS:
        raise RecursionError
    if id(node) not in known:
        total, inner = 1, getattr(node, "value", None)
        for child in inner if isinstance(inner, list) else ():
            for part in child if isinstance(child, tuple) else (child,):
                total += _count(part, known, (*above, id(node)))
        if total > MOST_VALUES:
            raise UserError(
                f"the config file holds more than {MOST_VALUES:,} values once its aliases are "
                "written out"
            )
        known[id(node)] = total
    return known[id(node)]
