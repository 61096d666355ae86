"""How long a request may take: the proxy's limit, or less where the client says so."""

from kvbelt.errors import RequestError
from kvbelt.http import Headers

#: A client's own limit, in seconds from the request's arrival.
HEADER = b"x-kvbelt-deadline-seconds"


def deadline_seconds(headers: Headers, most: float) -> float:
    """Seconds that a request may take, at most ``most``.

    Raises:
        RequestError: 400, the header is not a positive number.
    """
    said = headers.get(HEADER)
    if said is None:
        return most
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        name = HEADER.decode()
        raise RequestError(
            f"{name} is {said[:64].decode('latin-1')!r}; it must be a number of seconds greater than 0", param=name
        )
    return min(seconds, most)
