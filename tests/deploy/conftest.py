"""Every way of deploying, rendered once a session."""

from pathlib import Path

import pytest
import yaml

from kvbelt.ops.deploy.gpus import gpu_named
from kvbelt.ops.deploy.kubernetes import OverlaySpec, write_overlay
from kvbelt.ops.topology import Topology
from tests.deploy.rendering import Rendering, copied, helmed, kustomized, make_keys

#: kustomize overlay → the chart's settings that must give the same.
CHARTS = {
    "1p1d": (),
    "2p2d": ("prefill.replicas=2", "decode.replicas=2"),
    "multi-node": ("rdma.enabled=true", "autoscaling.kind=keda"),
    "hpa": ("autoscaling.kind=hpa",),
}

#: ``kvbelt deploy k8s``
PLANS = {
    "4p8d": {},
    "2p2d, all options": {
        "gpus_per_worker": 2,
        "namespace": "llm",
        "model_claim": "weights",
        "rdma": "nvidia.com/rdma",
        "autoscale": "keda",
    },
    "1p2d, hpa": {"autoscale": "hpa", "monitoring": False},
}

#: A chart's settings that no overlay has.
MORE_CHARTS = {"tensor parallelism": ("prefill.gpus=2", "decode.gpus=2")}


@pytest.fixture(scope="session")
def deploy(tmp_path_factory) -> Path:
    """A copy of ``deploy/`` with keys."""
    return copied(tmp_path_factory.mktemp("deploy"))


@pytest.fixture(scope="session")
def renderings(deploy, tmp_path_factory) -> dict[str, Rendering]:
    """All renderings by name. A name begins with kustomize/, helm/ or generated/."""
    kubernetes = deploy / "kubernetes"
    keys = kubernetes / "keys"
    one = yaml.safe_load((kubernetes / "overlays/1p1d/kustomization.yaml").read_text())
    del one["replicas"]
    one["components"].append("../../components/hpa")
    (kubernetes / "overlays/hpa").mkdir()
    (kubernetes / "overlays/hpa/kustomization.yaml").write_text(yaml.safe_dump(one))
    secrets = kustomized(keys)
    made = {f"kustomize/{name}": kustomized(kubernetes / "overlays" / name) + secrets for name in CHARTS}
    made["kustomize/one-pod"] = kustomized(kubernetes / "one-pod")
    charts = CHARTS | MORE_CHARTS
    made |= {f"helm/{name}": helmed(deploy / "helm/kvbelt", keys, *settings) for name, settings in charts.items()}
    found = {name: Rendering(name, objects, keys) for name, objects in made.items()}
    for name, options in PLANS.items():
        folder = tmp_path_factory.mktemp("generated") / "overlay"
        topology = Topology.parse(name.partition(",")[0])
        write_overlay(OverlaySpec(topology=topology, model="some/model", gpu=gpu_named("h100"), **options), folder)
        make_keys(folder / "keys")
        found[f"generated/{name}"] = Rendering(name, kustomized(folder), folder / "keys")
    return found


#: Of charts only those that no overlay equals (test_charts.py compares the others).
NAMES = [
    *(f"kustomize/{name}" for name in (*CHARTS, "one-pod")),
    *(f"helm/{name}" for name in MORE_CHARTS),
    *(f"generated/{name}" for name in PLANS),
]


@pytest.fixture(scope="session", params=NAMES)
def rendering(request, renderings) -> Rendering:
    """Each rendering in turn."""
    return renderings[request.param]


@pytest.fixture(scope="session", params=[name for name in NAMES if "one-pod" not in name])
def split(request, renderings) -> Rendering:
    """Each rendering whose workers have Pods of their own."""
    return renderings[request.param]
