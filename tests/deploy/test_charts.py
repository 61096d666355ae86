"""The Helm chart renders what kustomize renders, and refuses unknown values."""

import json
import re
import subprocess

import pytest

from tests.deploy.conftest import CHARTS
from tests.deploy.rendering import ROOT, containers, tool

HELMS_OWN = {"app.kubernetes.io/managed-by", "app.kubernetes.io/instance", "helm.sh/chart"}


def plain(objects):
    """Objects by kind and name, without labels of their tool."""
    text = json.dumps([one for one in objects if one["kind"] != "Namespace"])
    for one in objects:
        name = one["metadata"]["name"]
        if one["kind"] in ("ConfigMap", "Secret"):  # kustomize names them by their content
            text = text.replace(name, re.sub(r"-[0-9a-z]{10}$", "", name))
    found = json.loads(text)
    for one in found:
        one["metadata"]["labels"] = {k: v for k, v in one["metadata"]["labels"].items() if k not in HELMS_OWN}
        if one["kind"] == "Secret":  # base64 with and without line breaks
            one["data"] = {key: value.replace("\n", "") for key, value in one["data"].items()}
        if one["kind"] == "Deployment":
            template = one["spec"]["template"]
            template["metadata"].pop("annotations", None)  # a checksum instead of names
            for container in containers(template):
                container.get("env", []).sort(key=lambda variable: variable["name"])
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.mark.parametrize("name", CHARTS)
def test_the_chart_makes_what_kustomize_makes(renderings, name):
    """All objects are equal, except Namespaces, which a chart does not make."""
    chart, overlay = plain(renderings[f"helm/{name}"].objects), plain(renderings[f"kustomize/{name}"].objects)
    assert chart.keys() == overlay.keys()
    for key in overlay:
        assert chart[key] == overlay[key], key


def test_tensor_parallel_workers_listen_once_a_rank(renderings):
    """Each rank has its own ports, and vLLM gets the number of ranks."""
    rendering = renderings["helm/tensor parallelism"]
    file = rendering.of_kind("ConfigMap")["lmcache-decode-config"]["data"]["decoder-config.yaml"]
    assert "pd_peer_init_port: [7300, 7301]" in file
    assert "pd_peer_alloc_port: [7400, 7401]" in file
    assert "pd_peer_liveness_port: [7700, 7701]" in file
    assert "--tensor-parallel-size=2" in rendering.pods()["vllm-decode"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("decode.replica=2", "replica"),
        ("autoscaling.kind=vpa", "kind"),
        ("keys.create=true", "keys.secret.proxy is empty"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting, said):
    """Unknown, invalid and missing values are refused by name."""
    argv = [tool("helm"), "template", "kvbelt", str(ROOT / "deploy/helm/kvbelt"), "--set", setting]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert said in ran.stderr


def test_the_chart_has_no_lint():
    """Helm lint has no complaint, warnings included."""
    argv = [tool("helm"), "lint", "--strict", "--quiet", str(ROOT / "deploy/helm/kvbelt")]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "")
