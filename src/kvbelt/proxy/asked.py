"""Parameters of the proxy's own routes."""

from urllib.parse import parse_qs

from kvbelt.errors import RequestError


def number_of(target: str, name: str, *, otherwise: int, least: int = 0, most: int) -> int:
    """A whole number of a target's query.

    Raises:
        RequestError: 400, it is none, or out of its range.
    """
    said = parse_qs(target.partition("?")[2], keep_blank_values=True).get(name)
    if said is None:
        return otherwise
    text = said[-1]
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise RequestError(f"{name} is {text[:40]!r}; it is a whole number from {least} to {most}", param=name)
    return int(text)
