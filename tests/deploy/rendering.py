"""Renders manifests as kubectl and helm do from ``deploy/``."""

import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from kvbelt.ops.ports import LIVENESS_PORT, PROXY_PORT, seed_ports
from kvbelt.ops.topology import Topology
from kvbelt.proxy.settings import ProxySettings
from kvbelt.security.admin_key import write_admin_key
from kvbelt.security.keys import write_new_keys

ROOT = Path(__file__).parents[2]

#: Where scripts/test puts programs: those that no Python package is, and those that one carries.
TOOLS = f"{sys.prefix}/tools:{sys.prefix}/bin"


def tool(name: str) -> str:
    """A program; the test is skipped without it, except in CI."""
    found = shutil.which(name, path=f"{TOOLS}:{os.environ.get('PATH', '')}")
    if found is None:
        said = f"there is no {name}; scripts/test brings it"
        pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
    return found


@dataclass(frozen=True)
class Rendering:
    """What one way of deploying would make, and the folder of its keys."""

    name: str
    objects: list[dict]
    keys: Path

    def of_kind(self, kind: str) -> dict[str, dict]:
        """Objects of a kind, by name."""
        return {one["metadata"]["name"]: one for one in self.objects if one["kind"] == kind}

    def pods(self) -> dict[str, dict]:
        """The template of each Deployment's Pods, by its name."""
        return {name: one["spec"]["template"] for name, one in self.of_kind("Deployment").items()}


def copied(folder: Path) -> Path:
    """A copy of ``deploy/`` with keys, made as its documentation says."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    make_keys(folder / "deploy" / "kubernetes" / "keys")
    return folder / "deploy"


def make_keys(folder: Path) -> None:
    """``kvbelt keys new`` and an admin key."""
    write_new_keys(folder, ["proxy", "prefill", "decode"])
    write_admin_key(folder / "admin.key")


def kustomized(folder: Path) -> list[dict]:
    """What ``kubectl apply -k`` would apply."""
    return _objects(_run(tool("kubectl"), "kustomize", str(folder)))


def helmed(chart: Path, keys: Path, *settings: str) -> list[dict]:
    """What ``helm install`` would apply."""
    files = [f"keys.admin={keys}/admin.key"]
    for name in ("proxy", "prefill", "decode"):
        files += [f"keys.secret.{name}={keys}/{name}.key_secret", f"keys.public.{name}={keys}/trusted/{name}.key"]
    argv = [tool("helm"), "template", "kvbelt", str(chart), "--namespace", "inference", "--set", "keys.create=true"]
    argv += [part for file in files for part in ("--set-file", file)]
    return _objects(_run(*argv, *(part for setting in settings for part in ("--set", setting))))


def _run(*argv: str) -> str:
    home = {"HELM_CACHE_HOME": "/nonexistent", "HELM_CONFIG_HOME": "/nonexistent", "KUBECONFIG": "/nonexistent"}
    ran = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **home})
    assert ran.returncode == 0, f"{' '.join(argv[:3])}: {ran.stderr}"
    return ran.stdout


def _objects(text: str) -> list[dict]:
    # The loader in C where there is one: ten times as fast.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [one for one in yaml.load_all(text, Loader=loader) if one is not None]


PORTS = seed_ports(Topology.parse("1p1d"), proxy=PROXY_PORT)


PROXY = {field.name: field.default for field in dataclasses.fields(ProxySettings)}


OURS = {"prefill": PORTS.prefill[0], "decode": PORTS.decode[0], "init": PORTS.init[0], "alloc": PORTS.alloc[0],
        "liveness": LIVENESS_PORT}  # fmt: skip


def matches(selector, labels):
    """Whether a label selector takes these labels."""
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def containers(pod):
    """Every container of a Pod."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


#: What UCX listens on (UCX_TCP_PORT_RANGE).
UCX = (7600, 7699)
