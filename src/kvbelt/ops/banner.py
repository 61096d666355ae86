"""What ``kvbelt up`` says once it serves."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from kvbelt.ops.proxy_client import DEFAULT_URL

#: Of an answer with an end: a small model may otherwise write on until the context is full.
_BODY = """'{"prompt":"Once upon a time","max_tokens":60}'"""

_NAME = 11  #: columns of a line's name
_INDENT = 4  #: of a command that is too long to stand beside its name


def banner(
    *,
    url: str,
    model: str,
    topology: str,
    key: Path,
    logs: Path | None,
    drain_seconds: float,
    seconds: float,
    width: int | None,
) -> list[str]:
    """Lines of a person's next steps.

    Args:
        url: of the proxy.
        model: its name in requests.
        topology: as ``1p1d``.
        key: the admin key's file.
        logs: the folder of the processes' logs; None: they are shown.
        drain_seconds: how long an orderly end waits for open requests.
        seconds: that the start took.
        width: of the terminal; None: there is none, and no line is wrapped.
    """
    named = "" if url == DEFAULT_URL else f" --url {url}"
    facts = [
        ("API", f"{url}/v1"),
        ("model", model),
        ("console", f"{url}/console"),
        ("admin key", f"{key}   (kvbelt workers finds it)"),
        *([] if logs is None else [("logs", f"{logs}   (--logs shows them here, --log-dir DIR keeps them)")]),
    ]
    ask = (f"curl {url}/v1/completions", "-H 'content-type: application/json'", f"-d {_BODY}")
    steps = [
        ("explain", f"kvbelt why{named}"),
        ("watch", f"kvbelt top{named}"),
        (
            "stop",
            f"Ctrl-C: open requests get {drain_seconds:g} s to finish; a second Ctrl-C ends them at once",
        ),
    ]
    return [
        "",
        f"{topology} is ready after {seconds:.1f} s",
        "",
        *(line for name, value in facts for line in _wrapped(name, value, width)),
        "",
        *_command("ask", ask, width),
        *(line for name, value in steps for line in _wrapped(name, value, width)),
        "",
    ]


def _named(name: str) -> str:
    return f"  {name:<{_NAME}}"


def _wrapped(name: str, value: str, width: int | None) -> list[str]:
    if width is None:
        return [_named(name) + value]
    return textwrap.wrap(
        value,
        width,
        initial_indent=_named(name),
        subsequent_indent=_named(""),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _command(name: str, parts: Sequence[str], width: int | None) -> list[str]:
    """A shell command, broken between its parts where it is too long, so that it can still be copied."""
    whole = _named(name) + " ".join(parts)
    if width is None or len(whole) <= width:
        return [whole]
    lines = [*(f"{part} \\" for part in parts[:-1]), parts[-1]]
    if len(_named(name)) + max(map(len, lines)) <= width:
        return [_named(name if number == 0 else "") + line for number, line in enumerate(lines)]
    return [_named(name).rstrip(), *(" " * _INDENT + line for line in lines)]
