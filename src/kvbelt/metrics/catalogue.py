"""Every metric: name, kind, labels, meaning, and what to do when it moves.

``docs/metrics.md`` is generated from it (``python -m tools.draw_metrics docs/metrics.md``). Tests compare it with
what a running proxy and running workers export, and with deploy/prometheus and deploy/grafana.

Names without ``kvbelt_`` are those that existing alerts may use. vLLM's own metrics are not listed.
"""

from functools import partial

from kvbelt.metrics.spec import By, Kind, Spec, group

C, G, H, S = (partial(Spec, kind) for kind in (Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.SUMMARY))

#: Labels of what one worker has sent to another.
PAIR = ("prefill", "decode", "prefill_device", "decode_device")

# A row: name, help, what to do when it moves, labels.
# fmt: off
_REQUESTS = group("Requests, at the proxy", By.PROXY,
    H("lmcache_ttft", "Time to first token, in milliseconds.",
      "p99 above 500: DisaggHighTTFT. Compare with `kvbelt_proxy_prefill_leg_seconds`: if that has grown, too, look at "
      "the prefill workers' queue, else at the decode workers. `kvbelt why ID` of a slow request says which part it "
      "was"),
    H("kvbelt_ttft_seconds",
      "Time to first token, in seconds. Of an answer in one piece: until the proxy had the first token, if it came by "
      "itself; the whole answer's time is `kvbelt_proxy_request_seconds`.", "as `lmcache_ttft`"),
    H("kvbelt_tpot_seconds", "Mean time between tokens at the client, of each streamed answer.",
      "grows with the decode workers' batches: see `kvbelt_decode_queue_size` and `kvbelt_inter_token_seconds`"),
    H("kvbelt_proxy_request_seconds", "Whole requests, from arrival to the end of the answer.",
      "follows the lengths of answers; without longer ones, look at TTFT and at the gaps between tokens"),
    H("kvbelt_proxy_prefill_leg_seconds",
      "From the request to a prefill worker to its whole answer: queue and computation.",
      "grows with `lmcache_prefill_queue_size`: add prefill workers. Grows without: prompts have become longer, or the "
      "prefill workers slower"),
    H("kvbelt_proxy_decode_wait_seconds",
      "From the request to a decode worker to the head of its answer: KV arrival, queue, loading, and (embedded "
      "engine) the first step.",
      "above the usual with a queue: add decode workers; without one: look at the transfers"),
    C("kvbelt_proxy_requests_total", "Requests, by the path taken and why.",
      "a growing share of `local` means that KV does not travel: look up the reason in [failures.md](failures.md)",
      ("path", "reason")),
    C("kvbelt_placements_total", "Requests, by where they were placed (`split`, `whole`) and why.",
      "look up the reason in [failures.md](failures.md); `kvbelt why ID` shows one request's",
      ("action", "reason")),
    G("kvbelt_proxy_requests_waiting", "Requests that wait in the proxy for a worker.",
      "grows: more work comes than the workers can do within the levels. Add workers; beyond `--max-waiting` requests "
      "get 429"),
    H("kvbelt_queue_wait_seconds", "How long a request waited in the proxy for a worker; 0: it did not.",
      "as `kvbelt_proxy_requests_waiting`"),
    H("kvbelt_ttft_prediction_error_seconds",
      "Expected less actual time to first token. Below 0: it came later than expected.",
      "far from 0 for long: placement works with wrong costs. Look for a worker that is throttled, or that does not "
      "tell its costs"),
    G("kvbelt_placement_mode", "1 for the mode in which requests are placed: elastic, split, whole.",
      "`whole` although `elastic` is set: splitting has lost, see the next metric", ("mode",)),
    G("kvbelt_placement_regret_ratio",
      "Share of the last window's requests within their levels if all had been whole, less that with splits. Both by "
      "replay.",
      "above 0.02 in two windows: splitting is switched off until it wins again ([placement.md](placement.md)). Look "
      "at the links first: `kvbelt doctor` measures them"),
    G("kvbelt_placement_within_levels_ratio",
      "Share of the last window's requests within their levels: actual, and expected by the replay.",
      "apart by more than 0.1: something is slow that the workers' step costs do not show, such as a link",
      ("account",)),
    C("kvbelt_proxy_answers_total", "Answers, by HTTP status; 499: the client left.",
      "5xx: see `kvbelt_proxy_errors_total`; 499: clients give up, see TTFT", ("status",)),
    C("kvbelt_proxy_errors_total", "Errors that the proxy itself answered, by reason.",
      "each is a failed request: look up the reason in [failures.md](failures.md)", ("reason",)),
    C("kvbelt_proxy_failed_attempts_total",
      "Legs without a usable answer. kvbelt_proxy_requests_total shows how their requests ended.",
      "look up the reason in [failures.md](failures.md); `kvbelt workers list` shows lost workers", ("leg", "reason")),
    C("kvbelt_proxy_broken_streams_total",
      "Streams that ended with an error event, because a worker was lost after the first token.",
      "find the decode worker that died: `kvbelt_proxy_worker_state`, and its log"),
    C("kvbelt_proxy_traces_total",
      "Traces of requests ([tracing.md](tracing.md)): sent, failed (the receiver did not take them), dropped (the "
      "queue was full).", "dropped or failed: the receiver is slow or gone; trace fewer requests (`--trace-ratio`)",
      ("outcome",)),
    G("kvbelt_proxy_requests_in_flight", "Running requests.",
      "grows without end: more requests arrive than end; see both queues"),
    G("kvbelt_proxy_prefill_legs", "Running prefill legs.",
      "most of the requests in flight: prefill is the bottleneck"),
)

_QUEUES = group("Workers and queues, at the proxy", By.PROXY,
    G("lmcache_prefill_queue_size",
      "Prompts that wait in all prefill workers. kvbelt's report each second, vLLM's every five.",
      "above 10 for minutes: PrefillerOverload. Add prefill workers, or shorten prompts"),
    G("kvbelt_decode_queue_size", "Requests that wait in all decode workers, reported likewise.",
      "above 10: decode is the bottleneck. Add decode workers (1 prefill worker to 1 or 2 of them is usual)"),
    G("kvbelt_proxy_worker_ready", "1: this worker takes requests.", "0: `kvbelt workers list` says why",
      ("worker", "role")),
    G("kvbelt_proxy_worker_state",
      "1 for this worker's state: unknown, ready, unready, lost, warming, draining, leaving.",
      "`lost`: the process is gone, stopped or cut off; start it again", ("worker", "role", "state")),
    G("kvbelt_proxy_worker_info", "1 for each known worker, with its engine id and model.",
      "more than one model: workers of different models cannot exchange KV; `kvbelt doctor`",
      ("worker", "role", "engine_id", "model")),
    G("kvbelt_proxy_worker_requests", "Running requests that need this worker.",
      "much higher on one worker: that worker is slow", ("worker", "role")),
    G("kvbelt_proxy_worker_running", "Requests in this worker's batch, by its last health check.",
      "0 while others have queues: it gets no requests; see its state", ("worker", "role")),
    G("kvbelt_proxy_worker_waiting", "Requests in this worker's queue, by its last health check.", "see the sums above",
      ("worker", "role")),
    G("kvbelt_proxy_worker_kv_free_ratio", "Share of this worker's KV blocks that is free, by its last health check.",
      "near 0 on a decode worker: requests wait for memory; more memory, or more workers", ("worker", "role")),
    G("kvbelt_proxy_pairs", "Pairs of a prefill and a decode worker, by how they are connected.",
      "`refused`: they do not fit (another model, dtype, block size, key), `failed`: they cannot reach each other; "
      "`kvbelt workers list` has both values side by side", ("state",)),
)

_TRANSFERS = group("Transfers, at the proxy", By.PROXY,
    C("nixl_transfer_total", "Completed transfers.", "constant under load: see the share of `local` paths"),
    C("nixl_transfer_bytes_total", "Bytes of completed transfers.", "with `nixl_transfer_seconds_sum`: bytes a second"),
    H("nixl_transfer_seconds",
      "From the first posted write to the last completed one. A transfer runs while the prompt is computed.",
      "grows with prompts; to judge the network use `kvbelt_proxy_transfer_exposed_seconds`"),
    C("lmcache_nixl_transfer_failures_total", "Transfers that ended without a commit, except those no longer wanted.",
      "above 0.1 a second: NIXLTransferFailure. The next metric has the reasons"),
    C("kvbelt_proxy_transfer_failures_total", "Transfers that ended without a commit, by reason.",
      "look up the reason in [failures.md](failures.md). `digest`: memory or network damages data; remove the worker",
      ("reason",)),
    H("kvbelt_proxy_transfer_exposed_seconds",
      "From the end of a prompt's computation to its acknowledged commit: the part that compute did not hide.",
      "tenths of a second: the network is slow, or UCX uses TCP (`kvbelt doctor`), or the decode worker's buffer is "
      "full"),
    H("kvbelt_proxy_transfer_size_bytes", "KV bytes that one transfer moved.",
      "to size `pd_buffer_size`: at least a few of the largest"),
    C("kvbelt_pair_transfers_total",
      "Completed transfers of each pair, with the device of both: `cpu`, or `cuda:` and the GPU's number on its host "
      "(or its UUID).",
      "one pair of GPUs has none: kvbelt workers list says whether it is connected", PAIR),
    C("kvbelt_pair_transfer_bytes_total", "Their bytes.", "with the metric below: bytes a second between GPUs", PAIR),
    C("kvbelt_pair_transfer_seconds_total", "Their seconds, from the first write posted to the last one completed.",
      "by the count: the mean time of a transfer between these two GPUs, at prefill's pace", PAIR),
)

_ENGINE = group("The engine, at each worker", By.WORKER,
    G("kvbelt_worker_info", "1, with this worker's role, engine id and model.",
      "joins the role to the other metrics of a worker: `… * on (instance) group_left (role) kvbelt_worker_info`",
      ("role", "engine_id", "model")),
    G("kvbelt_requests_running", "Sequences in the batch.", "at its limit (64) with a queue: saturated"),
    G("kvbelt_requests_waiting", "Sequences not yet admitted, including those that load KV.",
      "more than a few for minutes: add workers of this role"),
    G("kvbelt_requests_loading", "Sequences whose KV is being loaded.",
      "stays up: the copy into the engine's blocks is slow"),
    C("kvbelt_engine_busy_seconds_total",
      "Seconds that the engine spent in steps. Its rate is the engine's utilisation, 0 to 1.",
      "near 1: saturated. Low on both sides and still slow: look at the transfers and at the proxy's CPU"),
    C("kvbelt_engine_steps_total", "Steps of the engine.", "with busy seconds: the time of one step"),
    H("kvbelt_request_queue_seconds", "From a request's submission to its first step.", "grows: add workers"),
    H("kvbelt_request_prefill_seconds", "From a request's first step to its first token, without loading.",
      "on a prefill worker it follows the prompts' lengths; on a decode worker it is one step, unless the prompt was "
      "computed there"),
    H("kvbelt_request_kv_wait_seconds", "Time that a request waited for the commit of its KV.",
      "grows: transfers are late, see the prefill side"),
    H("kvbelt_request_load_seconds", "From a request's admission until its KV was in the engine's blocks.",
      "it is the copy out of the receive buffer; part of TTFT only on the re-derive path"),
    H("kvbelt_inter_token_seconds", "Time between two outputs of one request.",
      "grows with the batch; on a decode worker with prompts in its batch, they were computed there: see the `local` "
      "path"),
    G("kvbelt_kv_blocks", "KV blocks of the engine.", "constant"),
    G("kvbelt_kv_blocks_free", "KV blocks without a user, including cached ones.",
      "near 0: requests wait, or are preempted; more memory (`--kv-gb`) or more workers"),
    G("kvbelt_kv_blocks_cached", "KV blocks in the prefix cache, in use or not."),
    C("kvbelt_preemptions_total", "Sequences put back to be computed again.",
      "any a second: KV memory is too small for the load"),
    C("kvbelt_prompt_tokens_total", "Prompt tokens computed.", "grows on a decode worker: their KV was not sent"),
    C("kvbelt_generated_tokens_total", "Generated tokens.", "its rate is the throughput"),
    C("kvbelt_prefix_cache_query_tokens_total", "Prompt tokens looked for in the prefix cache."),
    C("kvbelt_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.",
      "with the metric above: the hit rate; it falls when prompts have different beginnings"),
)

_BELT = group("The belt, at each worker", By.WORKER | By.VLLM,
    G("kvbelt_receive_buffer_bytes", "Size of the receive buffer; 0 if there is none.", "`pd_buffer_size`"),
    G("kvbelt_receive_bytes", "Bytes of the receive buffers in use, by state: reserved, committed, quarantined.",
      "reserved or committed near the size: KVBeltBufferFull; a larger `pd_buffer_size` or more decode workers. "
      "quarantined: a silent prefill worker may still write there; end or repair it", ("state",)),
    G("kvbelt_overflow_buffer_bytes", "Size of the overflow buffer; 0 if there is none.", "`pd_overflow_size`"),
    G("kvbelt_overflow_bytes", "Bytes of the overflow buffer in use.", "often in use: the receive buffer is too small"),
    G("kvbelt_staging_buffer_bytes", "Size of the send staging; 0 if there is none.", "`pd_buffer_size` of a sender"),
    G("kvbelt_staging_bytes", "Bytes of the send staging in use.",
      "at its size for long: writes do not complete; see the receivers"),
    G("kvbelt_transfers", "Current transfers in each state ([transfer.md](transfer.md#the-states)).",
      "`queued` on the receive side: no room in the buffer", ("side", "state")),
    C("kvbelt_transfers_ended_total", "Transfers ended, by reason.", "look up the reason in [failures.md](failures.md)",
      ("side", "reason")),
    C("kvbelt_sent_bytes_total", "Bytes sent by completed transfers."),
    C("kvbelt_received_bytes_total", "Bytes of committed KV."),
    C("kvbelt_reused_bytes_total", "Bytes of KV that were not sent because the engine held them.",
      "falls: common beginnings of prompts are evicted; more KV memory"),
    C("kvbelt_writes_total", "Writes posted."),
    S("kvbelt_write_seconds", "From the first posted write to the last completed one, of each transfer.",
      "as `nixl_transfer_seconds`, by sender"),
    S("kvbelt_transfer_exposed_seconds",
      "From the end of a prompt's computation to its acknowledged commit: the part that compute did not hide.",
      "as `kvbelt_proxy_transfer_exposed_seconds`, by sender"),
    G("kvbelt_connected_receivers", "Decode workers that this prefill worker is connected to.",
      "fewer than the decode workers: `kvbelt workers list` says why"),
    C("kvbelt_link_bytes_total",
      "Bytes that have landed at each decode worker; `receiver` is its engine id, which the proxy's "
      "`kvbelt_proxy_worker_info` joins to its address.",
      "with the metric below: bytes a second of this link while it is used", ("receiver",)),
    C("kvbelt_link_busy_seconds_total", "Seconds in which at least one write to this decode worker was in flight.",
      "KVBeltLinkSlow: one link is much slower than the others; check its cable, card and neighbours", ("receiver",)),
    G("kvbelt_transport_over_tcp", "The transport that the carrier uses for its largest messages; 1 if it is only TCP.",
      "1 within one host: KVBeltTCPFallback. UCX_TLS must have cuda_ipc and cuda_copy for GPUs, shared memory for "
      "CPUs, and containers must share IPC; between hosts: RDMA was not found",
      ("scope", "operation", "memory", "transport")),
    C("kvbelt_refused_messages_total", "Messages and peers refused on control ports.",
      "an untrusted peer, or a wrong key or version ([security.md](security.md))", ("socket", "reason"),
      by=By.WORKER | By.VLLM | By.PROXY),
)

_HOST = group("Mixed storage, at vLLM prefill servers", By.VLLM,
    G("kvbelt_host_blocks", "KV blocks that fit into host memory.", "`max_local_cpu_size`"),
    G("kvbelt_host_blocks_used", "KV blocks in host memory."),
    C("kvbelt_host_asked_tokens_total", "Prompt tokens, in whole blocks, looked for in host memory."),
    C("kvbelt_host_loaded_tokens_total", "Tokens loaded from host memory instead of being computed.",
      "with the metric above: the hit rate"),
    C("kvbelt_host_kept_blocks_total", "KV blocks copied to host memory."),
    C("kvbelt_host_evicted_blocks_total", "KV blocks evicted from host memory.",
      "as fast as blocks are copied in: host memory is too small"),
)

_PROCESS = group("Processes", By.PROXY | By.WORKER,
    G("kvbelt_build_info", "1, with the version of kvbelt.", "differs between processes: finish the upgrade",
      ("version",)),
    C("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.",
      "the proxy near 1 a second: it is the bottleneck; run a second one"),
    G("process_resident_memory_bytes", "Resident memory size in bytes.", "grows without end: report it"),
    G("process_virtual_memory_bytes", "Virtual memory size in bytes."),
    G("process_start_time_seconds", "Start time of the process since unix epoch in seconds.",
      "changes: the process was restarted; its log says why"),
    G("process_open_fds", "Number of open file descriptors.", "near the limit below: raise it (`ulimit -n`)"),
    G("process_max_fds", "Maximum number of open file descriptors."),
)
# fmt: on

GROUPS = (_REQUESTS, _QUEUES, _TRANSFERS, _ENGINE, _BELT, _HOST, _PROCESS)

CATALOGUE: dict[str, Spec] = {spec.name: spec for each in GROUPS for spec in each.specs}


def spec_of(name: str, kind: Kind) -> Spec:
    """Look up a metric that is about to be exported.

    Raises:
        LookupError: the catalogue has no metric of this name and kind.
    """
    found = CATALOGUE.get(name)
    if found is None or found.kind is not kind:
        raise LookupError(f"the catalogue has no {kind} named {name} (metrics/catalogue.py)")
    return found
