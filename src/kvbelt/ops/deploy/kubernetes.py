"""A kustomize overlay for one deployment: base, keys, components, and this deployment's changes.

The output is deterministic. It contains no keys, because manifests may be stored where secrets must not be.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from kvbelt.errors import SettingsError
from kvbelt.ops.deploy.gpus import PRODUCT_LABEL, Gpu
from kvbelt.ops.topology import Topology
from kvbelt.settings import parse_belt_file

GIB = 1 << 30

#: Those of the base. No registry has them: they are built (docs/deployment.md).
WORKER_IMAGE = "kvbelt/kvbelt-vllm:0.2.0"
PROXY_IMAGE = "kvbelt/kvbelt-proxy:0.2.0"

#: A namespace of Kubernetes (RFC 1123).
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MODEL = re.compile(r"[A-Za-z0-9._/-]+")
_RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:-]*")

#: The places in the files that contain the namespace.
_NAMESPACE = re.compile(r'(?m)(namespace: |namespace="|^  name: |^      name: )inference\b')

_WORKERS = ("vllm-prefill", "vllm-decode")


@dataclass(frozen=True, slots=True)
class OverlaySpec:
    """The deployment to write."""

    topology: Topology
    model: str  #: a model hub's name, or a path inside the workers
    gpu: Gpu
    gpus_per_worker: int = 1
    namespace: str = "inference"
    max_model_len: int = 8192
    send_buffer_bytes: int = GIB
    receive_buffer_bytes: int = 2 * GIB
    model_claim: str | None = None  #: a PersistentVolumeClaim with the weights, mounted at /models
    rdma: str | None = None  #: a network card's resource
    autoscale: Literal["keda", "hpa"] | None = None
    monitoring: bool = True
    worker_image: str = WORKER_IMAGE
    proxy_image: str = PROXY_IMAGE

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingsError: a value is invalid.
        """
        if self.topology.aggregated:
            raise SettingsError(f"--topology {self.topology} has no prefill worker; say for example 1p1d")
        for option, value, form, what in (
            ("--namespace", self.namespace, _LABEL, "lower-case letters, digits and '-', at most 63"),
            ("--model", self.model, _MODEL, "a name of a model hub, or a path inside the workers"),
            ("--model-claim", self.model_claim, _LABEL, "lower-case letters, digits and '-', at most 63"),
            ("--rdma", self.rdma, _RESOURCE, "a resource of a device plugin, such as rdma/ib"),
            ("--worker-image", self.worker_image, _IMAGE, f"an image, such as {WORKER_IMAGE}"),
            ("--proxy-image", self.proxy_image, _IMAGE, f"an image, such as {PROXY_IMAGE}"),
        ):
            if value is not None and not form.fullmatch(value):
                raise SettingsError(f"{option} is {value!r}; it must be {what}")

    @property
    def components(self) -> tuple[str, ...]:
        """Names below ``deploy/kubernetes/components``, in the order in which they apply."""
        wanted = (("rdma", self.rdma), ("monitoring", self.monitoring), (self.autoscale, self.autoscale))
        return tuple(name for name, on in wanted if name is not None and on)


def templates() -> Path:
    """``deploy/kubernetes`` of the repository, or as the wheel contains it."""
    here = Path(__file__)
    for place in (here.parents[4] / "deploy" / "kubernetes", here.parent / "kubernetes"):
        if (place / "base" / "kustomization.yaml").is_file():
            return place
    raise SettingsError(f"deploy/kubernetes is missing beside {here}; install kvbelt again")


def overlay_files(plan: OverlaySpec, source: Path) -> dict[str, str]:
    """The files of an overlay, by their path in it."""
    files = {}
    for part in ("base", "keys", *(f"components/{name}" for name in plan.components)):
        for file in sorted((source / part).rglob("*.yaml")):
            text = _NAMESPACE.sub(rf"\g<1>{plan.namespace}", file.read_text(encoding="utf-8"))
            files[str(file.relative_to(source))] = text
    # Keys are applied with the rest here, so that Secrets can have names by their content: new keys replace the Pods.
    keys = files["keys/kustomization.yaml"]
    files["keys/kustomization.yaml"] = keys[keys.index("apiVersion:") :].replace("  disableNameSuffixHash: true\n", "")
    files["keys/.gitignore"] = (source / "keys" / ".gitignore").read_text(encoding="utf-8")
    if plan.rdma is not None:
        name = "components/rdma/kustomization.yaml"
        files[name] = files[name].replace("rdma~1ib", plan.rdma.replace("/", "~1"))
    for role, name in (("prefill", "prefiller"), ("decode", "decoder")):
        files[f"config/{name}-config.yaml"] = _belt_file(plan, role, files[f"base/config/{name}-config.yaml"])
    files["kustomization.yaml"] = _kustomization(plan)
    return files


def write_overlay(plan: OverlaySpec, folder: Path) -> list[Path]:
    """Write an overlay into a new or empty folder and return its files.

    Raises:
        SettingsError: the folder is not empty or not writable.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"--output {folder} exists already; remove it, or choose another")
    written = []
    try:
        for name, text in overlay_files(plan, templates()).items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            written.append(file)
    except OSError as error:
        raise SettingsError(f"cannot write {error.filename}: {error.strerror}") from None
    return written


def _belt_file(plan: OverlaySpec, role: str, base: str) -> str:
    """A role's YAML file: the base's, with this deployment's buffer size, and one port per tensor-parallel rank."""
    content: dict[str, Any] = yaml.safe_load(base)
    content["pd_buffer_size"] = plan.send_buffer_bytes if role == "prefill" else plan.receive_buffer_bytes
    if role == "decode" and plan.gpus_per_worker > 1:
        for key in ("pd_peer_init_port", "pd_peer_alloc_port", "pd_peer_liveness_port"):
            content[key] = [content[key] + rank for rank in range(plan.gpus_per_worker)]
    parse_belt_file(content, source=f"the {role} workers' file", environ={"POD_IP": "127.0.0.1"})
    return yaml.safe_dump(content, sort_keys=False)


def _kustomization(plan: OverlaySpec) -> str:
    content: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": plan.namespace,
        "resources": ["base", "keys"],
        "components": [f"components/{name}" for name in plan.components],
        "configMapGenerator": [
            {"name": f"lmcache-{role}-config", "behavior": "replace", "files": [f"config/{name}-config.yaml"]}
            for role, name in (("prefill", "prefiller"), ("decode", "decoder"))
        ]
        + [
            {
                "name": "kvbelt-model",
                "behavior": "merge",
                "literals": [f"MODEL={plan.model}", f"MAX_MODEL_LEN={plan.max_model_len}"],
            }
        ],
        "images": [
            _image("kvbelt/kvbelt-vllm", plan.worker_image),
            _image("kvbelt/kvbelt-proxy", plan.proxy_image),
        ],
        "patches": list(_patches(plan)),
    }
    if plan.autoscale is None:
        counts = (plan.topology.prefill, plan.topology.decode)
        content["replicas"] = [{"name": name, "count": count} for name, count in zip(_WORKERS, counts, strict=True)]
    kept = {key: value for key, value in content.items() if value}
    head = (
        f"# {plan.topology} of {plan.model}, written by kvbelt deploy k8s. Make the keys, then: kubectl apply -k .\n"
        "#   kvbelt keys new keys && (umask 077; openssl rand -hex 32 > keys/admin.key)\n"
    )
    return head + yaml.dump(kept, Dumper=_Dumper, sort_keys=False, width=120)


def _image(name: str, wanted: str) -> dict[str, str]:
    repository, colon, tag = wanted.rpartition(":")
    if not colon or "/" in tag:  # the colon may be a registry's port
        return {"name": name, "newName": wanted}
    return {"name": name, "newName": repository, "newTag": tag}


def _patches(plan: OverlaySpec) -> Iterator[dict[str, Any]]:
    for name in _WORKERS:
        operations = [*_gpu_operations(plan)]
        if operations:
            yield {"target": {"kind": "Deployment", "name": name}, "patch": _dump(operations)}
    if plan.model_claim is not None:
        volume = {"name": "models", "emptyDir": None, "persistentVolumeClaim": {"claimName": plan.model_claim}}
        for name in _WORKERS:
            yield {"patch": _dump(_deployment(name, plan.namespace, {"volumes": [volume]}))}
    if plan.autoscale is not None:
        yield from _limits(plan)
    if plan.gpus_per_worker > 1:
        last = plan.gpus_per_worker - 1
        for name, rule in (("vllm-decode", "ingress/1"), ("vllm-prefill", "egress/0")):
            operations = []
            for index, first in enumerate((7300, 7400, 7700)):
                place = f"/spec/{rule}/ports/{index}"
                operations += [
                    {"op": "test", "path": f"{place}/port", "value": first},
                    {"op": "add", "path": f"{place}/endPort", "value": first + last},
                ]
            yield {"target": {"kind": "NetworkPolicy", "name": name}, "patch": _dump(operations)}


def _gpu_operations(plan: OverlaySpec) -> Iterator[dict[str, Any]]:
    pod = "/spec/template/spec"
    if plan.gpus_per_worker > 1:
        limits = f"{pod}/containers/0/resources/limits"
        yield {"op": "replace", "path": f"{limits}/nvidia.com~1gpu", "value": str(plan.gpus_per_worker)}
        value = f"--tensor-parallel-size={plan.gpus_per_worker}"
        yield {"op": "add", "path": f"{pod}/containers/0/args/-", "value": value}
    if plan.gpu.products:
        rule = {"key": PRODUCT_LABEL, "operator": "In", "values": list(plan.gpu.products)}
        required = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
        yield {
            "op": "add",
            "path": f"{pod}/affinity",
            "value": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}},
        }


def _limits(plan: OverlaySpec) -> Iterator[dict[str, Any]]:
    """Between the topology and four times its size."""
    kind, least, most = {
        "keda": ("ScaledObject", "minReplicaCount", "maxReplicaCount"),
        "hpa": ("HorizontalPodAutoscaler", "minReplicas", "maxReplicas"),
    }[plan.autoscale or "keda"]
    for name, count in zip(_WORKERS, (plan.topology.prefill, plan.topology.decode), strict=True):
        operations = [
            {"op": "replace", "path": f"/spec/{least}", "value": count},
            {"op": "replace", "path": f"/spec/{most}", "value": 4 * count},
        ]
        yield {"target": {"kind": kind, "name": name}, "patch": _dump(operations)}


def _deployment(name: str, namespace: str, pod: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": {"spec": dict(pod)}},
    }


def _dump(content: object) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no references, so that patches are readable."""

    def ignore_aliases(self, _: Any) -> bool:
        """Write aliases out."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
