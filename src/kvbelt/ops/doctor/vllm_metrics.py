"""A vLLM server's load from its ``/metrics``, because its ``/health`` has no body."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from kvbelt.ops.doctor.evidence import Sample

#: vLLM reports blocks as a share.
_WHOLE = 10_000


def sample_of(text: str) -> Sample:
    """Missing values count as 0."""
    values: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            for found in family.samples:
                values[found.name] += found.value
                for label in ("state", "side"):
                    if label in found.labels:
                        values[f"{found.name}:{found.labels[label]}"] += found.value
                if {"state", "side"} <= found.labels.keys():
                    values[f"{found.name}:{found.labels['side']}:{found.labels['state']}"] += found.value
    except ValueError:
        return Sample()
    usage = values["vllm:kv_cache_usage_perc"]
    return Sample(
        running=int(values["vllm:num_requests_running"]),
        waiting=int(values["vllm:num_requests_waiting"]),
        blocks_total=_WHOLE,
        blocks_free=int(_WHOLE * (1 - usage)),
        receive_bytes=int(values["kvbelt_receive_buffer_bytes"]),
        bytes_held=int(values["kvbelt_receive_bytes"] - values["kvbelt_overflow_bytes"]),
        bytes_quarantined=int(values["kvbelt_receive_bytes:quarantined"]),
        queued=int(values["kvbelt_transfers:receive:queued"]),
        sends_waiting=int(values["kvbelt_transfers:send:waiting"]),
    )
