"""From the end of prefill to usable KV on the decode worker, in a real 1p1d, one request at a time.

It has two parts, which the proxy's record of the request contains: the exposed part of the transfer (from the end of
the computation to the acknowledged commit, on the prefill worker), and the scatter into the decode worker's blocks.
Target: p50 of their sum at most 10 ms for 1,000 tokens.

The engines' memory is small, so the warm-up uses all of it. With prefix caching a worker uses all its memory before it
uses a block again, and the first write to memory is slow.

    python -m benchmarks.handover [--tokens 1000] [--requests 60] [--json FILE]
"""

import sys
import time
from typing import Any

import httpx
from benchmarks._run import (
    Prompts,
    add_model_arguments,
    figure,
    finish,
    model_folder,
    note,
    parser,
    quiet_terminal,
    summarise,
    table,
    verdict,
)

from kvbelt.ops.deployment import running
from kvbelt.ops.processes import SPLIT_ALL, DeploymentSpec, cpu_cores
from kvbelt.ops.topology import Topology
from kvbelt.wire.request_record import REQUEST_RECORD, DoneTransfer, FailedTransfer, RequestRecord

TARGET_MS = 10.0
_WARM_UP_REQUESTS = 10
_RECORD_SECONDS = 10.0


class NotHandedOverError(Exception):
    """The KV was not transferred, or its record did not come in time."""


def handed_over(client: httpx.Client, model: str, prompt: list[int]) -> RequestRecord:
    """Send one request over the belt, and fetch its record.

    Raises:
        NotHandedOverError: what became of it instead.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body).raise_for_status()
    deadline = time.monotonic() + _RECORD_SECONDS
    while True:
        told = client.get(f"/kvbelt/requests/{answer.headers['x-request-id']}")
        record = REQUEST_RECORD.parse(told.content, "the proxy")
        if record.complete:
            break
        if time.monotonic() > deadline:
            raise NotHandedOverError(f"no report says how the transfer of {record.request_id} ended")
        time.sleep(0.01)
    if not record.over_belt:
        reason = record.transfer.reason if isinstance(record.transfer, FailedTransfer) else record.decision.reason
        raise NotHandedOverError(f"{record.decision.path}, {reason}")
    return record


def main() -> int:
    """Measure and print. Status 1 if the target was missed."""
    arguments = parser(__doc__)
    add_model_arguments(arguments)
    arguments.add_argument("--tokens", type=int, default=1000)
    arguments.add_argument("--requests", type=int, default=60)
    arguments.add_argument("--threads", type=int, default=max(1, cpu_cores() // 2), help="of each worker")
    arguments.add_argument("--kv-gb", type=float, default=0.25, help="memory of each engine")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    spec = DeploymentSpec(
        topology=Topology(1, 1),
        model=model_folder(args.model),
        dtype=args.dtype,
        auto_ports=True,
        threads=args.threads,
        kv_gb=args.kv_gb,
        max_model_len=args.tokens + 64,
        proxy_args=SPLIT_ALL,
    )
    prompts = Prompts(spec.model, args.seed)
    parts: dict[str, list[float]] = {
        name: [] for name in ("exposed transfer", "scatter", "handover", "whole transfer", "prefill", "wait on decode")
    }
    megabytes = writes = 0.0
    lost: list[str] = []
    with running(spec, quiet_terminal()) as deployment, httpx.Client(base_url=deployment.url, timeout=300) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        for number in range(-_WARM_UP_REQUESTS, args.requests):
            if number % 10 == 0:
                note(f"request {number + 1} of {args.requests}" if number >= 0 else "warming up")
            try:
                record = handed_over(client, model, prompts.make(args.tokens))
            except NotHandedOverError as error:
                lost.append(str(error))
                note(f"request {number + 1} did not cross: {error}")
                continue
            if number < 0:
                continue
            transfer, timings = record.transfer, record.timings_ms
            assert isinstance(transfer, DoneTransfer)
            exposed, load = transfer.exposed_ms, timings.load or 0.0
            parts["exposed transfer"].append(exposed)
            parts["scatter"].append(load)
            parts["handover"].append(exposed + load)
            parts["whole transfer"].append(transfer.milliseconds)
            parts["prefill"].append(timings.prefill or 0.0)
            parts["wait on decode"].append(timings.kv_wait or 0.0)
            megabytes, writes = transfer.bytes / 1e6, transfer.writes
    if not parts["handover"]:
        note(f"nothing crossed: {lost}")
        return 1
    summaries = {name: summarise(values) for name, values in parts.items()}
    rows = [
        [name, figure(summary.median), figure(summary.low), figure(summary.high), figure(summary.p99)]
        for name, summary in summaries.items()
    ]
    reached = summaries["handover"].median <= TARGET_MS and not lost
    shown = table(["part, ms", "p50", "p10", "p90", "p99"], rows)
    shown += f"\n\n{megabytes:.1f} MB in {writes:.0f} writes a request; {len(lost)} requests did not cross\n"
    shown += verdict(reached, f"handover p50 {summaries['handover'].median:.2f} ms, target {TARGET_MS:g} ms")
    results: dict[str, Any] = {"tokens": args.tokens, "mb": megabytes, "writes": writes, "lost": lost, "ms": summaries}
    title = f"handover, {args.tokens} tokens, {args.requests} requests, {args.threads} threads a worker, {args.dtype}"
    finish(title, shown, results, args.json)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
