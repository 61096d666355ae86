"""What is counted, on its way to vLLM's metrics."""

from functools import partial

import msgspec

from kvbelt.channels.nixl import NixlChannel
from kvbelt.vllm.belt_setup import families_of
from kvbelt.vllm.figures import LOOK_SECONDS, BeltWatch, Figure, figures_of, host_families
from kvbelt.vllm.host_scheduler import HostScheduler
from kvbelt.vllm.orders import ScheduledPrompt
from kvbelt.wire.block_hash import block_hashes
from tests.vllm.test_scheduler_side import Clock
from tests.vllm.test_worker_side import Server, network, prefill, until  # noqa: F401 -- fixtures


def value(figures: list[Figure], name: str, **labels: str) -> float:
    """Of one series."""
    (found,) = [figure.value for figure in figures if figure.name == name and figure.labels == labels]
    return found


def test_a_belt_is_looked_at_now_and_then(prefill: Server) -> None:  # noqa: F811
    """The first step begins a look, a later one takes it; the next look comes when it is time."""
    clock = Clock()
    watch = BeltWatch(partial(families_of, prefill.belt, NixlChannel("p")), clock)
    try:
        assert watch.take() is None
        figures = until(watch.take)
        assert value(figures, "kvbelt_sent_bytes") == 0
        assert value(figures, "kvbelt_write_seconds_count") == 0
        assert msgspec.convert(msgspec.to_builtins(figures), list[Figure]) == figures
        assert watch.take() is None
        clock.now += LOOK_SECONDS
        watch.take()
        assert until(watch.take)
    finally:
        watch.close()


def test_host_memory_is_counted() -> None:
    """What was asked for, what was found, what is there."""
    host = HostScheduler(4, 10)
    hashes = block_hashes(range(12), 4)
    host.on_new_request("a", 12, hashes)
    host.orders([ScheduledPrompt("a", [1, 2, 3], 0, 12)], ())
    host.on_new_request("b", 12, hashes)
    host.on_allocated("b", [4, 5, 6], host.loadable_tokens("b", 0))
    figures = figures_of(host_families(host))
    assert value(figures, "kvbelt_host_blocks") == 10
    assert value(figures, "kvbelt_host_blocks_used") == 3
    assert value(figures, "kvbelt_host_kept_blocks") == 3
    assert value(figures, "kvbelt_host_asked_tokens") == 24
    assert value(figures, "kvbelt_host_loaded_tokens") == 8
