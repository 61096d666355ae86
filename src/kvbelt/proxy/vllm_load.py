"""How busy a vLLM server is, from its own ``/metrics``: its ``/health`` has no body."""

import re

PATH = "/metrics"
MAX_BYTES = 8 * 1024 * 1024

#: Between two looks: making that text costs the server some milliseconds.
EVERY_SECONDS = 5.0

#: For one look, which the server's health waits for.
LOOK_SECONDS = 1.0

#: vLLM tells its KV memory as a share. Blocks of a worker's load are parts of this.
WHOLE = 10_000

#: Nobody has so many requests.
_MOST = 1e9

_SERIES = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^\n]*\})? ([0-9.eE+-]+)\s*$",
    re.MULTILINE,
)


def load_of(text: bytes) -> dict[str, int]:
    """The load as a worker of ours tells it: sums over the server's engines, and of their KV memory the mean.

    Empty where the text says nothing of it.
    """
    found: dict[bytes, list[float]] = {}
    for name, said in _SERIES.findall(text):
        try:
            value = float(said)
        except ValueError:
            return {}
        if not 0.0 <= value < _MOST:
            return {}
        found.setdefault(name, []).append(value)
    load = {
        word: int(sum(found[name]))
        for word, name in (("running", b"num_requests_running"), ("waiting", b"num_requests_waiting"))
        if name in found
    }
    if used := found.get(b"kv_cache_usage_perc"):
        free = 1.0 - min(1.0, sum(used) / len(used))
        load |= {"blocks_total": WHOLE, "blocks_free": round(WHOLE * free)}
    return load
