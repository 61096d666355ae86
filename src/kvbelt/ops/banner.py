"""What ``kvbelt up`` says once it serves."""

from pathlib import Path

from kvbelt.ops.proxy_client import DEFAULT_URL

_BODY = """'{"messages": [{"role": "user", "content": "Hello!"}]}'"""


def banner(
    *, url: str, model: str, topology: str, key: Path, logs: Path | None, drain_seconds: float, seconds: float
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
    """
    named = "" if url == DEFAULT_URL else f" --url {url}"
    facts = [
        ("API", f"{url}/v1"),
        ("model", model),
        ("console", f"{url}/console"),
        ("admin key", f"{key}   (kvbelt workers finds it)"),
        *([] if logs is None else [("logs", f"{logs}   (--logs shows them here, --log-dir DIR keeps them)")]),
    ]
    steps = [
        ("ask", f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d {_BODY}"),
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
        *(f"  {name:<11}{value}" for name, value in facts),
        "",
        *(f"  {name:<11}{value}" for name, value in steps),
        "",
    ]
