"""Which workers took part in a request, from the proxy's record. Pure."""

from dataclasses import dataclass

from kvbelt.wire.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class Participants:
    """Addresses, ``host:port``, as the proxy names its workers."""

    prefill: str | None  #: computed the prompt; None: the decode worker did
    decode: str | None
    troubled: frozenset[str]  #: workers with a failed attempt

    @property
    def used(self) -> frozenset[str]:
        """Workers with a part in the answer."""
        return frozenset(filter(None, (self.prefill, self.decode)))


def participants_of(record: RequestRecord, workers: frozenset[str]) -> Participants:
    """From the proxy's record. ``workers``: every worker of the deployment.

    A worker is troubled if an attempt with it failed, or an error names it.
    """
    path = record.decision.path
    troubles = [*record.errors, *(attempt.worker for attempt in record.attempts if attempt.reason)]
    return Participants(
        prefill=None if path == "local" else record.workers.prefill,
        decode=None if path == "prefill-only" else record.workers.decode,
        troubled=frozenset(worker for worker in workers if any(worker in trouble for trouble in troubles)),
    )
