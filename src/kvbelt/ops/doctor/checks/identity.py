"""Whether the workers can exchange KV."""

from collections.abc import Iterator, Mapping

from kvbelt.ops.doctor.evidence import Evidence, PairSeen
from kvbelt.ops.doctor.finding import Finding, Severity
from kvbelt.wire.handshake import first_difference
from kvbelt.wire.reasons import find

#: Refusals because of keys; all others are about the model or its KV layout.
_KEYS = {"no_key", "untrusted_key", "another_key"}


def models_equal(evidence: Evidence) -> Iterator[Finding]:
    """One model, revision and layout on all workers (the seed's anti-pattern 1)."""
    found = {(pair.prefill, pair.decode): said for pair in evidence.pairs if (said := _misfit(pair, evidence))}
    if found:
        yield _mixed(found, evidence)
    names = {worker.model for worker in evidence.workers if worker.model}
    if len(names) > 1 and not found:
        yield Finding(
            "mixed_names",
            Severity.WARNING,
            f"the workers call their model by {len(names)} names: {', '.join(sorted(names))}",
            "some of them refuse a client that names the model",
            "start every worker with the same --model, or with the same --served-model-name",
            tuple(f"{worker.role} {worker.name}: {worker.model}" for worker in evidence.workers),
        )


def _misfit(pair: PairSeen, evidence: Evidence) -> str:
    """The difference that their handshake found or would find; empty if none is known."""
    if pair.state == "refused":
        return "" if pair.reason in _KEYS else f"{pair.reason}: {pair.detail}".rstrip(": ")
    both = [evidence.worker(pair.prefill), evidence.worker(pair.decode)]
    ours, theirs = (one.about.compatibility if one is not None and one.about is not None else None for one in both)
    difference = first_difference(ours, theirs) if ours is not None and theirs is not None else None
    if difference is None:
        return ""
    return f"{difference.field} is {difference.ours} on {pair.prefill} and {difference.theirs} on {pair.decode}"


def _mixed(found: Mapping[tuple[str, str], str], evidence: Evidence) -> Finding:
    prefill, decode = ({pair[side] for pair in found} for side in (0, 1))
    whom = f"prefill {_workers(prefill)} and decode {_workers(decode)}"
    models = {worker.name: worker.model for worker in evidence.workers}
    named = sorted({models.get(name, "") for name in prefill | decode} - {""})
    return Finding(
        "mixed_models",
        Severity.ERROR,
        f"{whom} do not serve the same model in the same form",
        "neither can use the other's KV: the pair is refused before any memory is shared, and the decode worker "
        "computes prompts itself",
        "start all with the same --model, --dtype and --block-size (vLLM: and attention backend)"
        + (
            f"; they serve {' and '.join(named)}"
            if len(named) > 1
            else "; the name is the same, so compare the folders"
        ),
        tuple(dict.fromkeys(found.values())),
    )


def _workers(names: set[str]) -> str:
    return f"worker{'' if len(names) == 1 else 's'} {', '.join(sorted(names))}"


def pairs_connected(evidence: Evidence) -> Iterator[Finding]:
    """Pairs that could not connect, and did not carry the doctor's own prompt either."""
    for pair in evidence.pairs:
        if pair.state == "refused" and pair.reason in _KEYS:
            yield _unkeyed(pair)
        elif pair.state == "failed" and not (pair.trial is not None and pair.trial.ok):
            known = find(pair.reason)
            if pair.reason == "channel" or of_data_path(pair.detail):
                yield _no_data_path(pair)
                continue
            yield Finding(
                "pair_failed",
                Severity.ERROR,
                f"prefill worker {pair.prefill} cannot reach decode worker {pair.decode}",
                "requests avoid this pair, or the decode worker computes their prompts itself",
                "open the decode worker's init, alloc and liveness ports (pd_peer_init_port, pd_peer_alloc_port, "
                "pd_peer_liveness_port) to the prefill worker, and set pd_peer_host to an address that it can reach",
                (f"{pair.reason}: {pair.detail}".rstrip(": "), *((f"that is: {known.meaning}",) if known else ())),
            )


def of_data_path(said: str) -> bool:
    """Whether NIXL or UCX failed, after the control ports had answered."""
    return "NIXL_ERR" in said or "UCX" in said


def _no_data_path(pair: PairSeen) -> Finding:
    return Finding(
        "data_path",
        Severity.ERROR,
        f"prefill worker {pair.prefill} reaches the control ports of decode worker {pair.decode}, but NIXL moves "
        "nothing to it",
        "UCX opens connections of its own, on addresses and ports that it chooses: control ports say nothing of them",
        DATA_PATH,
        (f"{pair.reason}: {pair.detail}".rstrip(": "),),
    )


DATA_PATH = (
    "on several networks name the one that joins the hosts: export UCX_NET_DEVICES=eth1 (or mlx5_0:1) on both; through "
    "a firewall: export UCX_TCP_PORT_RANGE=20000-20100, and open these ports between the workers; in containers: mount "
    "/sys, from which UCX reads its devices, and for RDMA /dev/infiniband with ulimit -l unlimited; ucx_info -d shows "
    "what UCX sees"
)


def _unkeyed(pair: PairSeen) -> Finding:
    return Finding(
        "keys",
        Severity.ERROR,
        f"prefill worker {pair.prefill} and decode worker {pair.decode} do not trust each other's keys",
        "nothing is sent between them; the decode worker computes prompts itself",
        "put the public key of each into pd_trusted_keys_dir of the other (kvbelt keys new DIR makes both), and "
        "restart them",
        (f"{pair.reason}: {pair.detail}".rstrip(": "),),
    )
