"""Counters that only ``/metrics`` has, and what they have grown by while the doctor looked."""

from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families

from kvbelt.ops.http_client import Client, NoAnswerError

#: Of each field: the metrics that are summed, kvbelt's and vLLM's.
_NAMES = {
    "cpu_seconds": ("process_cpu_seconds_total",),
    "preemptions": ("kvbelt_preemptions_total", "vllm:num_preemptions_total"),
    "refused": ("kvbelt_refused_messages_total",),
}


@dataclass(frozen=True, slots=True)
class Counted:
    cpu_seconds: float = 0.0
    preemptions: float = 0.0
    refused: float = 0.0  #: messages on control sockets

    def since(self, before: "Counted") -> "Counted":
        """The growth; a process that was restarted has counted anew."""
        grown = {field.name: getattr(self, field.name) - getattr(before, field.name) for field in fields(self)}
        return Counted(**{name: max(0.0, value) for name, value in grown.items()})


NOTHING = Counted()


def counted(text: str) -> Counted:
    """Missing metrics count as 0."""
    totals = dict.fromkeys(_NAMES, 0.0)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                for name, metrics in _NAMES.items():
                    if sample.name in metrics:
                        totals[name] += sample.value
    except ValueError:
        return Counted()
    return Counted(**totals)


async def scrape(client: Client) -> Counted:
    try:
        reply = await client.get("/metrics")
    except NoAnswerError:
        return Counted()
    return counted(reply.body.decode(errors="replace")) if reply.status == 200 else Counted()
