"""Counts on their way to vLLM's metrics."""

import msgspec

from kvbelt.channels.nixl import NixlChannel
from kvbelt.vllm.background import Background
from kvbelt.vllm.figures import REPORT_SECONDS, Figure, families_of, figures_of, host_families
from kvbelt.vllm.host_scheduler import HostScheduler
from kvbelt.vllm.step_messages import ScheduledPrompt
from kvbelt.wire.block_hash import block_hashes
from tests.vllm.belts import BeltServer, Clock, until


def value(figures: list[Figure], name: str, **labels: str) -> float:
    """The value of one series."""
    (found,) = [figure.value for figure in figures if figure.name == name and figure.labels == labels]
    return found


def test_a_belt_reports_periodically(prefill: BeltServer) -> None:
    """The first step begins a report and a later one takes it; the next report begins when its time has come."""
    clock = Clock()
    channel = NixlChannel("p")
    reports = Background(lambda: figures_of(families_of(prefill.belt, channel)), REPORT_SECONDS, clock)
    try:
        assert reports.take() is None
        figures = until(reports.take)
        assert value(figures, "kvbelt_sent_bytes") == 0
        assert value(figures, "kvbelt_write_seconds_count") == 0
        assert msgspec.convert(msgspec.to_builtins(figures), list[Figure]) == figures
        assert reports.take() is None
        clock.now += REPORT_SECONDS
        reports.take()
        assert until(reports.take)
    finally:
        reports.close()


def test_host_memory_is_counted() -> None:
    """Tokens asked for and loaded, blocks kept and used, are counted."""
    host = HostScheduler(4, 10)
    hashes = block_hashes(range(12), 4)
    host.on_new_request("a", 12, hashes)
    host.take_step([ScheduledPrompt("a", [1, 2, 3], 0, 12)], ())
    host.on_new_request("b", 12, hashes)
    host.on_allocated("b", [4, 5, 6], host.loadable_tokens("b", 0))
    figures = figures_of(host_families(host))
    assert value(figures, "kvbelt_host_blocks") == 10
    assert value(figures, "kvbelt_host_blocks_used") == 3
    assert value(figures, "kvbelt_host_kept_blocks") == 3
    assert value(figures, "kvbelt_host_asked_tokens") == 24
    assert value(figures, "kvbelt_host_loaded_tokens") == 8
