"""Copies of whole models, and keys by which equal states are known: by looking at the objects, field by field.

Nothing here knows what the objects are. A new field of a session is copied and compared from then on;
what does not tell states apart is named in ``IGNORED``.
"""

import enum
import itertools
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from copy import copy
from typing import Any

import msgspec

#: Fields that say how a state was reached, or follow from others.
IGNORED = frozenset({
    "name", "was", "_story", "_detail", "detail", "deadlines", "ended_total", "committed_bytes_total",
    "reused_bytes_total", "num_writes", "first_write", "last_landed",
})  # fmt: skip

_ATOMS = (
    int, float, str, bytes, type(None), enum.Enum, msgspec.Struct, type, types.FunctionType, types.BuiltinFunctionType,
    types.MappingProxyType, frozenset,
)  # fmt: skip


#: Of these there are many: no look at what they are.
_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})


def _fields(kind: type) -> tuple[str, ...] | None:
    """The fields of a class with slots; None: its objects have a dictionary."""
    names = tuple(name for each in kind.__mro__ for name in getattr(each, "__slots__", ()) if name != "__weakref__")
    return names or None


def _reduced(name: str, value: Any) -> Any:
    """The part of a field that tells states apart: the kind of an end, and not its words."""
    return "ended" if name == "reason" and value not in (None, "done") else value


def _frozen_dataclass(kind: type) -> bool:
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


class Snapshots:
    """Copies and keys.

    Args:
        shared: objects that never change, whatever their type: tables, for instance.
        alike: values that tell no states apart, and what stands for them.
    """

    def __init__(self, shared: tuple[object, ...] = (), alike: Mapping[enum.Enum, str] | None = None) -> None:
        self._alike = alike or {}
        self._shared = {id(thing) for thing in shared}
        self._kept = shared  # so that nothing else gets their ids
        self._copiers: dict[type, Callable[[Any, dict[int, Any]], Any]] = {}
        self._keys: dict[type, Callable[[Any], Hashable]] = {}

    # Copies.

    def copy(self, thing: Any) -> Any:
        """Copy everything except what never changes."""
        return self._copy(thing, {})

    def _copy(self, thing: Any, memo: dict[int, Any]) -> Any:
        kind = type(thing)
        copier = self._copiers.get(kind)
        if copier is None:
            copier = self._copiers[kind] = self._copier(kind)
        return copier(thing, memo)

    def _copier(self, kind: type) -> Callable[[Any, dict[int, Any]], Any]:  # noqa: PLR0911 -- one a kind
        if issubclass(kind, _ATOMS) or _frozen_dataclass(kind):
            return lambda thing, memo: thing
        if issubclass(kind, itertools.count):
            return lambda thing, memo: copy(thing)
        if issubclass(kind, types.MethodType):
            return lambda thing, memo: types.MethodType(thing.__func__, self._copy(thing.__self__, memo))
        if issubclass(kind, tuple):
            make = kind._make if hasattr(kind, "_make") else kind
            return lambda thing, memo: make([self._copy(each, memo) for each in thing])
        if issubclass(kind, (list, deque, set)):
            return self._copy_collection
        if issubclass(kind, dict):
            return self._copy_dict
        slots = _fields(kind)
        return self._copy_slots(slots) if slots else self._copy_object

    def _copy_collection(self, thing: Any, memo: dict[int, Any]) -> Any:
        new = memo.get(id(thing))
        if new is None:
            new = memo[id(thing)] = type(thing)([self._copy(each, memo) for each in thing])
        return new

    def _copy_dict(self, thing: Any, memo: dict[int, Any]) -> Any:
        if id(thing) in self._shared:
            return thing
        new = memo.get(id(thing))
        if new is not None:
            return new
        new = memo[id(thing)] = type(thing)()
        for key, value in thing.items():
            new[key] = self._copy(value, memo)
        return new

    def _copy_object(self, thing: Any, memo: dict[int, Any]) -> Any:
        known = memo.get(id(thing))
        if known is not None or id(thing) in self._shared:
            return known if known is not None else thing
        new = memo[id(thing)] = object.__new__(type(thing))
        fields = new.__dict__
        for name, value in thing.__dict__.items():
            fields[name] = value if type(value) in _PLAIN else self._copy(value, memo)
        return new

    def _copy_slots(self, slots: tuple[str, ...]) -> Callable[[Any, dict[int, Any]], Any]:
        def copy_of(thing: Any, memo: dict[int, Any]) -> Any:
            known = memo.get(id(thing))
            if known is not None:
                return known
            new = memo[id(thing)] = object.__new__(type(thing))
            for name in slots:
                value = getattr(thing, name)
                setattr(new, name, value if type(value) in _PLAIN else self._copy(value, memo))
            return new

        return copy_of

    # Keys.

    def key(self, thing: Any) -> Hashable:
        """Equal for equal states: who points at the same object does so in both."""
        return self._key(thing, {})

    def _key(self, thing: Any, seen: dict[int, int]) -> Hashable:
        kind = type(thing)
        keyer = self._keys.get(kind)
        if keyer is None:
            keyer = self._keys[kind] = self._keyer(kind)
        return keyer(thing, seen)

    def _keyer(self, kind: type) -> Callable[[Any, dict[int, int]], Hashable]:  # noqa: PLR0911 -- one a kind
        key = self._key
        if issubclass(kind, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            return lambda thing, seen: None
        if issubclass(kind, enum.Enum):
            return lambda thing, seen: self._alike.get(thing, thing)
        if issubclass(kind, _ATOMS):
            return lambda thing, seen: thing
        if issubclass(kind, Counter):
            return lambda thing, seen: frozenset(thing.items())
        if issubclass(kind, OrderedDict):
            return lambda thing, seen: tuple([(name, key(value, seen)) for name, value in thing.items()])
        if issubclass(kind, dict):
            return lambda thing, seen: (
                None
                if id(thing) in self._shared
                else tuple([(name, key(value, seen)) for name, value in sorted(thing.items(), key=_by_key)])
            )
        if issubclass(kind, set):
            return lambda thing, seen: frozenset([key(each, seen) for each in thing])
        if issubclass(kind, (list, tuple, deque)):
            return lambda thing, seen: tuple([key(each, seen) for each in thing])
        slots = _fields(kind)
        return self._object_key([name for name in slots if name not in IGNORED] if slots else None)

    def _object_key(self, slots: list[str] | None) -> Callable[[Any, dict[int, int]], Hashable]:
        def key(thing: Any, seen: dict[int, int]) -> Hashable:
            if id(thing) in seen:
                return seen[id(thing)]
            seen[id(thing)] = len(seen)
            if slots is not None:
                fields = [(name, getattr(thing, name)) for name in slots]
            else:
                fields = [(name, value) for name, value in thing.__dict__.items() if name not in IGNORED]
            return tuple([
                _reduced(name, value) if type(value) in _PLAIN else self._key(value, seen) for name, value in fields
            ])  # fmt: skip

        return key


def _by_key(item: tuple[Any, Any]) -> Any:
    return item[0]
