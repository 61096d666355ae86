"""Finds the reasons that the source says, so that they can be compared with the registry.

In ``transfer/``, which says most of them, and in the proxy's plan every word is taken for a reason: a string constant
of lower-case letters, digits and underscores, unless it is a value of an enumeration or one of ``NOT_REASONS``. The
tables of states name moves, and say none. Elsewhere a reason is a word in one of these places:

* the argument ``reason`` of a call; what is assigned to, or compared with, a name or attribute called ``reason`` (or
  ``outcome``, ``failure``, ``why``); the entry ``"reason"`` of a dictionary;
* the positional argument of a function of ``POSITIONS`` that is its reason;
* what a function of ``RETURNS`` returns.

``f"refused_{field}"`` counts as the family ``refused_*``.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "kvbelt"

#: Rooms that say reasons. The registry itself only lists them.
ROOMS = ("proxy", "routing", "security", "vllm", "worker")
FILES = ("engine/loading.py", "wire/codec.py", "wire/notification.py")

#: Words there that are none: of devices, settings, fields of messages, names of sockets, formats, kinds of errors.
NOT_REASONS = frozenset(
    {
        "cpu", "cuda", "off", "sample", "always", "bind_host", "init", "alloc", "prefill", "decode", "both",
        "engine_id", "role", "key", "protocol", "slot", "committed", "ascii", "replace", "g", "inf",
        "reason", "transfer_id", "write", "read", "liveness", "sha256", "ipv4_mapped", "tcp", "tcp6", "sender",
        "receiver", "region", "offset", "first_block", "part_blocks", "verify", "num_tokens", "num_blocks", "prefix",
        "seconds", "unavailable", "upstream_error", "timeout_error", "internal_error", "local",
        "rate_limit_error", "memory",
    }
)  # fmt: skip
_SETTING = re.compile(r"\w+_(seconds|bytes|port)")

_NAMES = frozenset({"reason", "outcome", "failure", "why"})

#: Which positional argument is a reason, by the called function's name.
POSITIONS = {
    "Lost": 0,
    "KVOutcome": 1,
    "KVLostError": 0,
    "NotPlacedError": 0,
    "Decision": 1,
    "cancel": 0,
    "_failed": 1,
    "Result": 1,
    "end": 0,
    "as_word": 1,
}

#: The same where a name is used for something else elsewhere.
POSITIONS_IN = {"proxy/workers/notifications.py": {"add": 1}, "security/authenticator.py": {"add": 1}}

#: Functions that return a reason.
RETURNS = frozenset(
    {
        "_why_not_fast",
        "_why_not_continue",
        "_why_not_same",
        "why_not_fast",
        "_fill",
        "run",
        "why_whole",
        "why_not_split",
    }
)

_WORD = re.compile(r"[a-z][a-z0-9_]*")


def said() -> dict[str, str]:
    """Every reason that is said, and a place where."""
    found: dict[str, str] = {}
    places = [place for room in ROOMS for place in _files(room)]
    for place in (*places, *FILES):
        for word, line in _in_places(_parse(place), POSITIONS | POSITIONS_IN.get(place, {})):
            found.setdefault(word, f"{place}:{line}")
    for place in ("proxy/request/plan.py", *_files("transfer")):
        if place.endswith("/states.py"):
            continue
        for word, line in _all_words(_parse(place)):
            found.setdefault(word, f"{place}:{line}")
    return found


def _files(room: str) -> list[str]:
    """Every module of a package and of its subpackages."""
    return [str(file.relative_to(SOURCE)) for file in sorted((SOURCE / room).rglob("*.py"))]


def _parse(place: str) -> ast.Module:
    return ast.parse((SOURCE / place).read_text(encoding="utf-8"))


def _all_words(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Every word below a node, but for values of enumerations, names of slots and ``NOT_REASONS``."""
    match node:
        case ast.ClassDef(bases=bases) if any(_name(base) in ("StrEnum", "Enum") for base in bases):
            return
        case ast.Assign(targets=[ast.Name(id="__slots__")]):
            return
        case ast.JoinedStr():
            yield from ((word, node.lineno) for word in _words(node))
        case ast.Constant(value=str(word)) if _WORD.fullmatch(word):
            if word not in NOT_REASONS and not _SETTING.fullmatch(word):
                yield word, node.lineno
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _all_words(child)


def _in_places(tree: ast.Module, positions: dict[str, int]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for value in _values(node, positions):
            for word in _words(value):
                yield word, value.lineno


def _values(node: ast.AST, positions: dict[str, int]) -> Iterator[ast.expr]:
    match node:
        case ast.Call(func=func, args=args, keywords=keywords):
            yield from (keyword.value for keyword in keywords if keyword.arg in _NAMES)
            position = positions.get(_name(func), len(args))
            yield from args[position : position + 1]
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            yield from (value for name, value in zip(names, values, strict=False) if _name(name) in _NAMES)
        case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
            if _name(target) in _NAMES:
                yield value
        case ast.Compare(left=left, comparators=[right]) if _name(left) in _NAMES:
            yield right
        case ast.Dict(keys=keys, values=values):
            yield from (value for key, value in zip(keys, values, strict=True) if _is_reason(key))
        case ast.FunctionDef(name=name, body=body) if name in RETURNS:
            for inner in (inner for statement in body for inner in ast.walk(statement)):
                match inner:
                    case ast.Return(value=ast.expr() as value):
                        yield value
                    case ast.Tuple(elts=[_, ast.Constant() as second]):
                        yield second


def _words(value: ast.expr) -> Iterator[str]:
    match value:
        case ast.Constant(value=str(word)) if _WORD.fullmatch(word):
            yield word
        case ast.JoinedStr(values=[ast.Constant(value=str(head)), *_]) if _WORD.fullmatch(head) and head[-1] == "_":
            yield f"{head}*"
        case ast.IfExp(body=body, orelse=orelse):
            yield from (*_words(body), *_words(orelse))
        case ast.BoolOp(values=values) | ast.Set(elts=values) | ast.Tuple(elts=values) | ast.Dict(values=values):
            for inner in values:
                yield from _words(inner)
        case ast.Call(func=ast.Attribute(value=inner, attr="get"), args=[_, *otherwise]):
            yield from _words(inner)
            for one in otherwise:
                yield from _words(one)


def _is_reason(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "reason"


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""
