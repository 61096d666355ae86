"""JSON values of another type than a field's, where their meaning is clear: ``4.0`` and ``"4"`` for 4.

vLLM parses requests with pydantic, whose lax mode accepts these, and clients rely on it. What is accepted here is what
it accepts: an integer also as a number without a fraction, as its text or as a boolean; a number also as its text or as
a boolean; a boolean also as 0, 1 or one of a few words. A text is only a text. A few numbers are none as a text: those
that vLLM compares before pydantic has read them.
"""

import re
from collections.abc import Callable, Mapping
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

NO_TEXT = "no text"  #: in ``Annotated``: a number that no text stands for

_INTEGER = re.compile(r"\s*([+-]?\d+(?:_\d+)*)(?:\.0*)?\s*\Z")
_MOST_DIGITS = 40  #: of an integer in a text; Python refuses to read thousands
_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE = frozenset({"0", "off", "f", "false", "n", "no"})


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= _MOST_DIGITS and (found := _INTEGER.match(value)):
        return int(found[1])
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and len(value) <= _MOST_DIGITS:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _boolean(value: Any) -> Any:
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else value
    return value


_SCALARS: Mapping[Any, Callable[[Any], Any]] = {int: _integer, float: _number, bool: _boolean}


def relaxed(value: Any, shape: Any) -> Any:
    """``value`` with its scalars as ``shape`` wants them, where it may be read so; what does not fit stays."""
    origin, args = get_origin(shape), get_args(shape)
    if origin is Annotated:
        if isinstance(value, str) and NO_TEXT in args[1:]:
            return value
        shape, origin = args[0], get_origin(args[0])
    if shape in _SCALARS:
        value = _SCALARS[shape](value)
    elif origin in (Union, UnionType):
        value = _of_union(value, args)
    elif isinstance(value, list) and origin is list:
        value = [relaxed(item, args[0]) for item in value]
    elif isinstance(value, dict) and origin is dict:
        value = {key: relaxed(item, args[1]) for key, item in value.items()}
    elif isinstance(value, dict) and isinstance(shape, type) and issubclass(shape, msgspec.Struct):
        value = fields_relaxed(value, shape)
    return value


def fields_relaxed(members: dict[str, Any], shape: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(shape, include_extras=True)
    return {name: relaxed(value, hints[name]) if name in hints else value for name, value in members.items()}


def _of_union(value: Any, shapes: tuple[Any, ...]) -> Any:
    """The first of the shapes that fits as it is, else the first that fits relaxed."""
    if any(_fits(value, shape) for shape in shapes):
        return value
    for shape in shapes:
        if shape not in (NoneType, msgspec.UnsetType) and _fits(read := relaxed(value, shape), shape):
            return read
    return value


def _fits(value: Any, shape: Any) -> bool:
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError:
        return False
    return True
