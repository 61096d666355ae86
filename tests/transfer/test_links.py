"""How fast bytes reach a peer."""

from kvbelt.transfer.send.links import LinkTallies


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_counts_once_while_several_writes_are_in_flight() -> None:
    """Overlapping writes count as one busy span."""
    clock = Clock()
    links = LinkTallies(clock)
    first = links.posting("a", 100)
    clock.now = 1.0
    second = links.posting("a", 50)
    clock.now = 2.0
    links.ended(first, 100, landed=True)
    clock.now = 3.0
    links.ended(second, 50, landed=True)
    tally = links.of("a")
    assert tally is first
    assert (tally.writes, tally.num_bytes, tally.busy_seconds, tally.bytes_in_flight) == (2, 150, 3.0, 0)


def test_pauses_do_not_count() -> None:
    """Time without a write in flight does not count."""
    clock = Clock()
    links = LinkTallies(clock)
    for start in (0.0, 100.0):
        clock.now = start
        write = links.posting("a", 10)
        clock.now = start + 0.5
        links.ended(write, 10, landed=True)
    assert links.of("a").busy_seconds == 1.0


def test_what_is_in_flight_counts_as_busy_and_not_as_landed() -> None:
    """A link on which nothing lands shows busy time without bytes."""
    clock = Clock()
    links = LinkTallies(clock)
    links.posting("a", 10)
    clock.now = 7.0
    tally = links.of("a")
    assert (tally.busy_until(clock.now), tally.num_bytes, tally.bytes_in_flight) == (7.0, 0, 10)


def test_a_write_that_ends_after_its_peer_was_forgotten_is_not_counted() -> None:
    """A write that ends after its peer was forgotten does not count for a new connection of that name."""
    clock = Clock()
    links = LinkTallies(clock)
    late = links.posting("a", 10)
    links.forget("a")
    again = links.posting("a", 5)
    links.ended(late, 10, landed=False)
    assert (again.in_flight, again.bytes_in_flight) == (1, 5)
