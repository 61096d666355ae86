"""NetworkPolicies allow what kvbelt needs, and nothing else."""

import pytest

from tests.deploy.rendering import OURS, UCX, containers, matches

NAMESPACE = "inference"

#: Who a peer may be, by the labels of its Pod and of its namespace.
ELSEWHERE = {
    "a client elsewhere": ({}, {"kubernetes.io/metadata.name": "web"}),
    "Prometheus": ({}, {"kubernetes.io/metadata.name": "monitoring"}),
}


def ports_of(rule):
    """The (protocol, first, last) of each port of a rule."""
    return {(p["protocol"], p["port"], p.get("endPort", p["port"])) for p in rule["ports"]}


def lets(peers, labels, namespace, here):
    """Whether a rule's peers include a Pod; without peers it includes all."""
    if peers is None:
        return True
    for peer in peers:
        place = peer.get("namespaceSelector")
        inside = namespace["kubernetes.io/metadata.name"] == here if place is None else matches(place, namespace)
        if inside and matches(peer.get("podSelector", {}), labels):
            return True
    return False


def allowed(rendering):
    """(source, destination, protocol, first port, last port) of everything that is allowed."""
    here = next(one["metadata"]["namespace"] for one in rendering.objects if one["kind"] == "Deployment")
    own = {name: (pod["metadata"]["labels"], {"kubernetes.io/metadata.name": here})
           for name, pod in rendering.pods().items()}  # fmt: skip
    policies = rendering.of_kind("NetworkPolicy")
    assert set(policies) == set(own)  # each has one
    found = set()
    for whom, (labels, _) in own.items():
        assert policies[whom]["spec"]["policyTypes"] == ["Ingress", "Egress"]
        coming = policies[whom]["spec"]["ingress"]
        for who, (theirs, namespace) in {**own, **ELSEWHERE}.items():
            into = {p for rule in coming if lets(rule.get("from"), theirs, namespace, here) for p in ports_of(rule)}
            if who in own:
                going = policies[who]["spec"]["egress"]
                home = {"kubernetes.io/metadata.name": here}
                out = {p for rule in going if lets(rule.get("to"), labels, home, here) for p in ports_of(rule)}
                into &= out
            found |= {(who, whom, *port) for port in into}
    return found


def test_exactly_what_is_needed_is_let_through(split):
    """Every pair and port is checked, in both directions."""
    ranks = int(containers(split.pods()["vllm-decode"])[0]["resources"]["limits"]["nvidia.com/gpu"]) - 1
    prefill, decode, proxy = "vllm-prefill", "vllm-decode", "kvbelt-proxy"
    expected = {
        (proxy, prefill, "TCP", OURS["prefill"], OURS["prefill"]),
        (proxy, decode, "TCP", OURS["decode"], OURS["decode"]),
        (prefill, decode, "TCP", OURS["init"], OURS["init"] + ranks),
        (prefill, decode, "TCP", OURS["alloc"], OURS["alloc"] + ranks),
        (prefill, decode, "TCP", OURS["liveness"], OURS["liveness"] + ranks),
        (prefill, decode, "TCP", *UCX),
        (decode, prefill, "TCP", *UCX),
        (prefill, proxy, "TCP", 7500, 7500),
        (decode, proxy, "TCP", 7500, 7500),
        (prefill, proxy, "TCP", 9100, 9100),
        (decode, proxy, "TCP", 9100, 9100),
        ("a client elsewhere", proxy, "TCP", 9100, 9100),
        ("Prometheus", proxy, "TCP", 9100, 9100),
        ("Prometheus", prefill, "TCP", OURS["prefill"], OURS["prefill"]),
        ("Prometheus", decode, "TCP", OURS["decode"], OURS["decode"]),
    }
    assert allowed(split) == expected


def test_what_leaves_the_deployment_is_dns_and_the_model_hub(split):
    """The proxy needs DNS only."""
    for name, policy in split.of_kind("NetworkPolicy").items():
        anywhere = {port for rule in policy["spec"]["egress"] if "to" not in rule for port in ports_of(rule)}
        hub = set() if name == "kvbelt-proxy" else {("TCP", 443, 443)}
        assert anywhere == {("UDP", 53, 53), ("TCP", 53, 53)} | hub


def test_of_one_pod_only_the_proxy_is_reached(renderings):
    """Its workers listen on loopback."""
    found = allowed(renderings["kustomize/one-pod"])
    assert found == {(who, "kvbelt", "TCP", 9100, 9100) for who in ELSEWHERE}


@pytest.mark.parametrize("rank_port", [7300, 7400, 7700])
def test_ranks_do_not_run_into_other_ports(rank_port):
    """A hundred ranks are the maximum."""
    assert not {rank_port + rank for rank in range(100)} & set(range(UCX[0], UCX[1] + 1))
