"""Metrics of the proxy: what each means, and what to do when it moves."""

from kvbelt.metrics.spec import Group, Kind, Spec

C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

_REQUESTS = (
    Spec(
        "lmcache_ttft",
        H,
        "Time to first token, in milliseconds.",
        "p99 above 500: DisaggHighTTFT. Compare with `kvbelt_proxy_prefill_leg_seconds`: if that has grown, too, "
        "look at the prefill workers' queue, else at the decode workers. `kvbelt why ID` of a slow request says "
        "which part it was",
    ),
    Spec(
        "kvbelt_ttft_seconds",
        H,
        "Time to first token, in seconds. Of an answer that is not streamed: until the first token was known "
        "here, where it was.",
        "as `lmcache_ttft`",
    ),
    Spec(
        "kvbelt_tpot_seconds",
        H,
        "From one token to the next, as the client had them: the mean of each streamed answer.",
        "grows with the decode workers' batches: see `kvbelt_decode_queue_size` and `kvbelt_inter_token_seconds`",
    ),
    Spec(
        "kvbelt_proxy_request_seconds",
        H,
        "Whole requests, from their arrival to the end of their answer.",
        "follows the lengths of answers; without longer ones, look at TTFT and at the gaps between tokens",
    ),
    Spec(
        "kvbelt_proxy_prefill_leg_seconds",
        H,
        "From asking a prefill worker to its whole answer: its queue and its computing.",
        "grows with `lmcache_prefill_queue_size`: add prefill workers. Grows without: prompts have become longer, "
        "or the prefill workers slower",
    ),
    Spec(
        "kvbelt_proxy_decode_wait_seconds",
        H,
        "From asking a decode worker to the head of its answer: the KV's arrival, its queue, its loading, and "
        "(embedded engine) its first step.",
        "above the usual with a queue: add decode workers; without one: look at the transfers",
    ),
    Spec(
        "kvbelt_proxy_requests_total",
        C,
        "Requests, by the path taken and why.",
        "a growing share of `local` means that KV does not travel: look the reason up in [failures.md](failures.md)",
        ("path", "reason"),
    ),
    Spec(
        "kvbelt_proxy_answers_total",
        C,
        "Answers, by HTTP status; 499: the client has gone.",
        "5xx: see `kvbelt_proxy_errors_total`; 499: clients give up, see TTFT",
        ("status",),
    ),
    Spec(
        "kvbelt_proxy_errors_total",
        C,
        "Errors that this proxy answered itself, by reason.",
        "any is a request that failed: look the reason up in [failures.md](failures.md)",
        ("reason",),
    ),
    Spec(
        "kvbelt_proxy_failed_attempts_total",
        C,
        "Legs that gave no answer to use; what came of their requests, kvbelt_proxy_requests_total says.",
        "look the reason up in [failures.md](failures.md); `kvbelt workers list` shows who is lost",
        ("leg", "reason"),
    ),
    Spec(
        "kvbelt_proxy_broken_streams_total",
        C,
        "Streams that ended with an error event, because a worker was lost behind the first token.",
        "find the decode worker that died: `kvbelt_proxy_worker_state`, and its log",
    ),
    Spec(
        "kvbelt_proxy_traces_total",
        C,
        "Traces of requests ([tracing.md](tracing.md)): sent, failed (the receiver did not take them), dropped (the "
        "queue was full).",
        "dropped or failed: the receiver is slow or gone; trace fewer requests (`--trace-ratio`)",
        ("outcome",),
    ),
    Spec(
        "kvbelt_proxy_requests_in_flight",
        G,
        "Requests under way.",
        "grows without end: more comes in than goes out; see both queues",
    ),
    Spec(
        "kvbelt_proxy_prefill_legs",
        G,
        "Prefill legs under way.",
        "most of the requests in flight: prefill is the bottleneck",
    ),
)

_QUEUES = (
    Spec(
        "lmcache_prefill_queue_size",
        G,
        "Prompts that wait in all prefill workers, as they last said: kvbelt's own each second, vLLM's each five.",
        "above 10 for minutes: PrefillerOverload. Add prefill workers, or shorten prompts",
    ),
    Spec(
        "kvbelt_decode_queue_size",
        G,
        "Requests that wait in all decode workers, likewise.",
        "above 10: decode is the bottleneck. Add decode workers (1 prefill worker to 1 or 2 of them is usual)",
    ),
    Spec(
        "kvbelt_proxy_worker_ready",
        G,
        "1: this worker takes requests.",
        "0: `kvbelt workers list` says why",
        ("worker", "role"),
    ),
    Spec(
        "kvbelt_proxy_worker_state",
        G,
        "1 for the state that this worker is in: unknown, ready, unready, lost, warming, draining, leaving.",
        "`lost`: the process is gone, stopped or cut off; start it again",
        ("worker", "role", "state"),
    ),
    Spec(
        "kvbelt_proxy_worker_info",
        G,
        "1 for each worker that has said who it is: the engine's life and the model.",
        "more than one model: workers of different models cannot exchange KV; `kvbelt doctor`",
        ("worker", "role", "engine_id", "model"),
    ),
    Spec(
        "kvbelt_proxy_worker_requests",
        G,
        "Requests that need this worker.",
        "much more on one than on others: that one is slow",
        ("worker", "role"),
    ),
    Spec(
        "kvbelt_proxy_worker_running",
        G,
        "Requests in this worker's batch, by its last health check.",
        "0 while others have queues: it gets nothing; see its state",
        ("worker", "role"),
    ),
    Spec(
        "kvbelt_proxy_worker_waiting",
        G,
        "Requests in this worker's queue, likewise.",
        "see the sums above",
        ("worker", "role"),
    ),
    Spec(
        "kvbelt_proxy_worker_kv_free_ratio",
        G,
        "Share of this worker's KV blocks that is free, likewise.",
        "near 0 on a decode worker: requests wait for memory; more memory, or more workers",
        ("worker", "role"),
    ),
    Spec(
        "kvbelt_proxy_pairs",
        G,
        "Pairs of a prefill and a decode worker, by how they are connected.",
        "`refused`: they do not fit (another model, dtype, block size, key), `failed`: they cannot reach each "
        "other; `kvbelt workers list` has both values side by side",
        ("state",),
    ),
)

_TRANSFERS = (
    Spec(
        "nixl_transfer_total",
        C,
        "Transfers done.",
        "stands still under load: see the share of `local` paths",
    ),
    Spec(
        "nixl_transfer_bytes_total",
        C,
        "Bytes of transfers done.",
        "with `nixl_transfer_seconds_sum`: bytes a second",
    ),
    Spec(
        "nixl_transfer_seconds",
        H,
        "From a transfer's first write posted to its last one completed. It goes on while the prompt is computed.",
        "grows with prompts; to judge the network take `kvbelt_proxy_transfer_exposed_seconds`",
    ),
    Spec(
        "lmcache_nixl_transfer_failures_total",
        C,
        "Transfers that ended without a commit, but for those that nobody wanted any more.",
        "above 0.1 a second: NIXLTransferFailure. The reasons are next door",
    ),
    Spec(
        "kvbelt_proxy_transfer_failures_total",
        C,
        "The same, by reason.",
        "look the reason up in [failures.md](failures.md). `digest`: memory or network damages data, take the "
        "worker out",
        ("reason",),
    ),
    Spec(
        "kvbelt_proxy_transfer_exposed_seconds",
        H,
        "From the end of a prompt's computation to its acknowledged commit: what compute did not hide.",
        "tenths of a second: the network is slow, or UCX has fallen back to TCP (`kvbelt doctor`), or the decode "
        "worker's buffer is full",
    ),
    Spec(
        "kvbelt_proxy_transfer_size_bytes",
        H,
        "KV bytes that one transfer moved.",
        "to size `pd_buffer_size`: at least a few of the largest",
    ),
)

GROUPS = (
    Group("Requests, at the proxy", _REQUESTS),
    Group("Workers and queues, at the proxy", _QUEUES),
    Group("Transfers, at the proxy", _TRANSFERS),
)
