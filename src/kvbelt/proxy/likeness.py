"""Whether the workers were started alike, where a difference is refused by nobody and yet deserves a word."""

import logging
from collections.abc import Iterable

from kvbelt.proxy.workers import Worker

log = logging.getLogger("kvbelt.proxy")


class Likeness:
    """Says what it has seen once, not with every health check."""

    def __init__(self) -> None:
        self._said: set[frozenset[str]] = set()

    def appeared(self, worker: Worker, all_workers: Iterable[Worker]) -> None:
        """A worker is healthy for the first time in its life: compare it."""
        mine = worker.endpoint.report.hash_seed
        if mine is None:
            return
        for other in all_workers:
            theirs = other.endpoint.report.hash_seed
            if theirs in (None, mine) or not other.healthy:
                continue
            differ = frozenset({mine, theirs or ""})
            if differ in self._said:
                continue
            self._said.add(differ)
            vllm = "vllm" in (worker.endpoint.report.engine, other.endpoint.report.engine)
            log.log(
                logging.WARNING if vllm else logging.INFO,
                "PYTHONHASHSEED is %s at %s and %s at %s; KV is found all the same, because kvbelt's block hashes do "
                "not depend "
                "on it%s. Export PYTHONHASHSEED=0 before every worker's start",
                mine,
                worker.name,
                theirs,
                other.name,
                ", but vLLM's own do" if vllm else "",
            )
