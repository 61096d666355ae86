"""Metrics of the workers, and of every process: what each means, and what to do when it moves."""

from kvbelt.metrics.spec import By, Group, Kind, Spec

C, G, H, S = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM, Kind.SUMMARY

_BELT = By.WORKER | By.VLLM
_BOTH = By.PROXY | By.WORKER

_ENGINE = (
    Spec(
        "kvbelt_worker_info",
        G,
        "1; who this worker is: its role, this life's engine id, its model.",
        "joins the role to the other metrics of a worker: `… * on (instance) group_left (role) kvbelt_worker_info`",
        ("role", "engine_id", "model"),
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_requests_running",
        G,
        "Sequences in the batch.",
        "at its limit (64) with a queue: saturated",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_requests_waiting",
        G,
        "Sequences not yet admitted, those that load included.",
        "more than a few for minutes: add workers of this role",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_requests_loading",
        G,
        "Sequences whose KV is being loaded.",
        "stays up: the copy into the engine's blocks is slow",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_engine_busy_seconds_total",
        C,
        "Seconds that the engine spent in steps. Its rate is the engine's utilisation, 0 to 1.",
        "near 1: saturated. Low on both sides and still slow: look at the transfers and at the proxy's CPU",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_engine_steps_total",
        C,
        "Steps of the engine.",
        "busy seconds a step: how long one takes",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_request_queue_seconds",
        H,
        "From a request's submission to its first step.",
        "the time that more workers would save",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_request_prefill_seconds",
        H,
        "From a request's first step to its first token, without loading.",
        "on a prefill worker it follows the prompts' lengths; on a decode worker it is one step, unless the "
        "prompt was computed there",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_request_kv_wait_seconds",
        H,
        "How long a request waited for its KV's commit.",
        "grows: transfers are late, see the prefill side",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_request_load_seconds",
        H,
        "From a request's admission until its KV was in the engine's blocks.",
        "the copy out of the receive buffer; a part of TTFT on the re-derive path only",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_inter_token_seconds",
        H,
        "Between two outputs of one request.",
        "grows with the batch; on a decode worker with prompts in its batch, they were computed there: see the "
        "`local` path",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_kv_blocks",
        G,
        "KV blocks of the engine.",
        "constant",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_kv_blocks_free",
        G,
        "KV blocks nobody holds; cached ones are among them.",
        "near 0: requests wait, or are preempted; more memory (`--kv-gb`) or more workers",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_kv_blocks_cached",
        G,
        "KV blocks in the prefix cache, in use or not.",
        "",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_preemptions_total",
        C,
        "Sequences put back to be computed anew.",
        "any a second: KV memory is too small for the load",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_prompt_tokens_total",
        C,
        "Prompt tokens computed.",
        "on a decode worker: prompts that were not sent to it",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_generated_tokens_total",
        C,
        "Tokens generated.",
        "the throughput",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_prefix_cache_query_tokens_total",
        C,
        "Prompt tokens looked for in the prefix cache.",
        "",
        by=By.WORKER,
    ),
    Spec(
        "kvbelt_prefix_cache_hit_tokens_total",
        C,
        "Prompt tokens found there.",
        "with the one above: the hit rate; it falls when prompts differ from their beginning on",
        by=By.WORKER,
    ),
)

_BELTS = (
    Spec(
        "kvbelt_receive_buffer_bytes",
        G,
        "Size of the receive buffer; 0: receives nothing.",
        "`pd_buffer_size`",
        by=_BELT,
    ),
    Spec(
        "kvbelt_receive_bytes",
        G,
        "Bytes of the receive buffers in use, by state: reserved, committed, quarantined.",
        "reserved or committed near the size: KVBufferFull, a larger `pd_buffer_size` or more decode workers. "
        "quarantined: a prefill worker that does not answer may still write there; end or mend it",
        ("state",),
        by=_BELT,
    ),
    Spec(
        "kvbelt_overflow_buffer_bytes",
        G,
        "Size of the overflow buffer; 0: there is none.",
        "`pd_overflow_size`",
        by=_BELT,
    ),
    Spec(
        "kvbelt_overflow_bytes",
        G,
        "Bytes of the overflow buffer in use.",
        "often in use: the receive buffer is too small",
        by=_BELT,
    ),
    Spec(
        "kvbelt_staging_buffer_bytes",
        G,
        "Size of the send staging; 0: sends nothing.",
        "`pd_buffer_size` of a sender",
        by=_BELT,
    ),
    Spec(
        "kvbelt_staging_bytes",
        G,
        "Bytes of the send staging in use.",
        "at its size for long: writes do not end; see the receivers",
        by=_BELT,
    ),
    Spec(
        "kvbelt_transfers",
        G,
        "Transfers now in each state (transfer.md).",
        "`queued` on the receive side: no room in the buffer",
        ("side", "state"),
        by=_BELT,
    ),
    Spec(
        "kvbelt_transfers_ended_total",
        C,
        "Transfers ended, by reason.",
        "look the reason up in [failures.md](failures.md)",
        ("side", "reason"),
        by=_BELT,
    ),
    Spec(
        "kvbelt_sent_bytes_total",
        C,
        "Bytes sent by completed transfers.",
        "",
        by=_BELT,
    ),
    Spec(
        "kvbelt_received_bytes_total",
        C,
        "Bytes of committed KV.",
        "",
        by=_BELT,
    ),
    Spec(
        "kvbelt_reused_bytes_total",
        C,
        "Bytes of KV that did not have to come, because the engine held them.",
        "falls: common beginnings of prompts are evicted; more KV memory",
        by=_BELT,
    ),
    Spec(
        "kvbelt_writes_total",
        C,
        "Writes posted.",
        "",
        by=_BELT,
    ),
    Spec(
        "kvbelt_write_seconds",
        S,
        "First write posted to last completed.",
        "as `nixl_transfer_seconds`, by sender",
        by=_BELT,
    ),
    Spec(
        "kvbelt_transfer_exposed_seconds",
        S,
        "From the end of a prompt's computation to its acknowledged commit: what compute did not hide.",
        "as `kvbelt_proxy_transfer_exposed_seconds`, by sender",
        by=_BELT,
    ),
    Spec(
        "kvbelt_connected_receivers",
        G,
        "Decode workers that this prefill worker is connected to.",
        "fewer than there are: `kvbelt workers list` says why",
        by=_BELT,
    ),
    Spec(
        "kvbelt_link_bytes_total",
        C,
        "Bytes that have landed at each decode worker; `receiver` is its engine id, which the proxy's "
        "`kvbelt_proxy_worker_info` joins to its address.",
        "with the one below: bytes a second of this link while it is used",
        ("receiver",),
        by=_BELT,
    ),
    Spec(
        "kvbelt_link_busy_seconds_total",
        C,
        "Seconds in which at least one write to this decode worker was in flight.",
        "KVBeltLinkSlow: one link is much slower than the others; look at its cable, its card, its neighbours",
        ("receiver",),
        by=_BELT,
    ),
    Spec(
        "kvbelt_transport_over_tcp",
        G,
        "What the carrier has really chosen for its largest messages, as it says itself; 1: nothing but TCP.",
        "1 within one host: KVBeltTCPFallback. UCX_TLS must have cuda_ipc and cuda_copy for GPUs, shared memory for "
        "CPUs, and containers must share IPC; between hosts: RDMA was not found",
        ("scope", "operation", "memory", "transport"),
        by=_BELT,
    ),
    Spec(
        "kvbelt_refused_messages_total",
        C,
        "Messages and peers refused on control ports.",
        "somebody else talks to them, or a key or version is wrong ([security.md](security.md))",
        ("socket", "reason"),
        by=_BELT | By.PROXY,
    ),
)

_HOST = (
    Spec(
        "kvbelt_host_blocks",
        G,
        "KV blocks that fit into host memory.",
        "`max_local_cpu_size`",
        by=By.VLLM,
    ),
    Spec(
        "kvbelt_host_blocks_used",
        G,
        "KV blocks in host memory.",
        "",
        by=By.VLLM,
    ),
    Spec(
        "kvbelt_host_asked_tokens_total",
        C,
        "Tokens of prompts, in whole blocks, that host memory was asked for.",
        "",
        by=By.VLLM,
    ),
    Spec(
        "kvbelt_host_loaded_tokens_total",
        C,
        "Tokens loaded from host memory instead of being computed.",
        "with the one above: the hit rate",
        by=By.VLLM,
    ),
    Spec(
        "kvbelt_host_kept_blocks_total",
        C,
        "KV blocks copied to host memory.",
        "",
        by=By.VLLM,
    ),
    Spec(
        "kvbelt_host_evicted_blocks_total",
        C,
        "KV blocks that left host memory for others.",
        "as fast as they are kept: host memory is too small",
        by=By.VLLM,
    ),
)

_PROCESS = (
    Spec(
        "kvbelt_build_info",
        G,
        "1; the version of kvbelt.",
        "differs between processes: finish the upgrade",
        ("version",),
        by=_BOTH,
    ),
    Spec(
        "process_cpu_seconds_total",
        C,
        "Total user and system CPU time spent in seconds.",
        "the proxy near 1 a second: it is the bottleneck; run a second one",
        by=_BOTH,
    ),
    Spec(
        "process_resident_memory_bytes",
        G,
        "Resident memory size in bytes.",
        "grows without end: report it",
        by=_BOTH,
    ),
    Spec(
        "process_virtual_memory_bytes",
        G,
        "Virtual memory size in bytes.",
        "",
        by=_BOTH,
    ),
    Spec(
        "process_start_time_seconds",
        G,
        "Start time of the process since unix epoch in seconds.",
        "moves: it was started again; its log says why",
        by=_BOTH,
    ),
    Spec(
        "process_open_fds",
        G,
        "Number of open file descriptors.",
        "near the limit below: raise it (`ulimit -n`)",
        by=_BOTH,
    ),
    Spec(
        "process_max_fds",
        G,
        "Maximum number of open file descriptors.",
        "",
        by=_BOTH,
    ),
)

GROUPS = (
    Group("The engine, at each worker", _ENGINE),
    Group("The belt, at each worker", _BELTS),
    Group("Mixed storage, at vLLM prefill servers", _HOST),
    Group("Processes", _PROCESS),
)
