"""Every reference resolves: labels, ports, ConfigMaps, Secrets, targets, metrics, command lines."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from kvbelt.cli import build_parser
from kvbelt.settings import belt_for, load_belt_file
from kvbelt.vllm.settings import load_settings
from kvbelt.wire.health import Role
from tests.deploy.rendering import OURS, PROXY, ROOT, containers, kustomized, matches

#: What may follow ``kvbelt`` in a shell block; elsewhere it is a user's or a release's name.
COMMANDS = ("deploy", "doctor", "keys", "proxy", "up", "why", "worker", "workers")


def test_selectors_take_their_own_pods(rendering):
    """Deployments, Services, PodDisruptionBudgets, NetworkPolicies and monitors each find what they are for."""
    pods = {name: pod["metadata"]["labels"] for name, pod in rendering.pods().items()}
    for name, deployment in rendering.of_kind("Deployment").items():
        taken = [one for one, labels in pods.items() if matches(deployment["spec"]["selector"], labels)]
        assert taken == [name]
    for kind, place in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for name, one in rendering.of_kind(kind).items():
            assert [pod for pod, labels in pods.items() if matches(one["spec"][place], labels)] == [name]
    services = rendering.of_kind("Service")
    for service in services.values():
        selector = {"matchLabels": service["spec"]["selector"]}
        (pod,) = (pod for name, pod in rendering.pods().items() if matches(selector, pods[name]))
        named = {port["name"]: port["containerPort"] for one in containers(pod) for port in one.get("ports", [])}
        for port in service["spec"]["ports"]:
            assert named[port["targetPort"]] == port["port"]
    for one in rendering.of_kind("ServiceMonitor").values():
        (found,) = (s for s in services.values() if matches(one["spec"]["selector"], s["metadata"]["labels"]))
        ports = {port["name"] for port in found["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in one["spec"]["endpoints"]} <= ports
    for one in rendering.of_kind("PodMonitor").values():
        assert sum(matches(one["spec"]["selector"], labels) for labels in pods.values()) == 2
    for kind in ("ScaledObject", "HorizontalPodAutoscaler"):
        for one in rendering.of_kind(kind).values():
            deployment = rendering.of_kind("Deployment")[one["spec"]["scaleTargetRef"]["name"]]
            assert "replicas" not in deployment["spec"]  # which would fight with it at each apply


def test_every_namespace_is_the_same(rendering):
    """Every object, query and the Namespace itself use one namespace."""
    names = {one["metadata"].get("namespace") for one in rendering.objects if one["kind"] != "Namespace"}
    assert len(names) == 1
    assert set(rendering.of_kind("Namespace")) <= names
    assert set(re.findall(r'namespace="([^"]*)"', str(rendering.objects))) <= names


def test_every_configmap_and_secret_that_is_named_exists(rendering):
    """All references exist, except optional ones."""
    configs, secrets = rendering.of_kind("ConfigMap"), rendering.of_kind("Secret")
    for pod in rendering.pods().values():
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in configs
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in configs
            for variable in container.get("env", []):
                key = variable.get("valueFrom", {}).get("secretKeyRef", {})
                assert not key or key.get("optional") or key["name"] in secrets
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["spec"]["volumes"]}


def test_ports_are_those_of_the_settings(split):
    """Every process listens on kvbelt's default port."""
    named = {
        (name, port["name"]): port["containerPort"]
        for name, pod in split.pods().items()
        for container in containers(pod)
        for port in container["ports"]
    }
    assert named == {
        ("kvbelt-proxy", "http"): PROXY["port"],
        ("kvbelt-proxy", "notify"): PROXY["notification_port"],
        ("vllm-prefill", "http"): OURS["prefill"],
        ("vllm-decode", "http"): OURS["decode"],
        ("vllm-decode", "init"): OURS["init"],
        ("vllm-decode", "alloc"): OURS["alloc"],
        ("vllm-decode", "liveness"): OURS["liveness"],
    }
    for name, pod in split.pods().items():
        for port in re.findall(r"--port=(\d+)", " ".join(containers(pod)[0]["args"])):
            assert int(port) == named[name, "http"]


@pytest.mark.parametrize(("role", "app"), [(Role.PREFILL, "vllm-prefill"), (Role.DECODE, "vllm-decode")])
def test_configmaps_are_files_that_workers_load(split, role, app, tmp_path, monkeypatch):
    """Kvbelt's workers and the vLLM connector load them, keys included."""
    pod = split.pods()[app]
    env = {one["name"]: one.get("value") for one in containers(pod)[0]["env"]}
    path = Path(env["LMCACHE_CONFIG_FILE"])
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "config")
    text = split.of_kind("ConfigMap")[volume["configMap"]["name"]]["data"][path.name]
    places = {"/etc/kvbelt/keys": split.keys, "/etc/kvbelt/trusted": split.keys / "trusted"}
    mounts = {mount["mountPath"] for mount in containers(pod)[0]["volumeMounts"]}
    for place, folder in places.items():
        assert place in mounts
        text = text.replace(place, str(folder))
    file = tmp_path / path.name
    file.write_text(text)
    monkeypatch.setenv("POD_IP", "10.1.2.3")
    belt = belt_for(role, file)
    ranks = int(containers(pod)[0]["resources"]["limits"]["nvidia.com/gpu"])
    kv_role = re.search(r'"kv_role": "(\w+)"', str(containers(pod)[0]["args"]))[1]
    environ = {"LMCACHE_CONFIG_FILE": str(file), "POD_IP": "10.1.2.3"}
    connector = load_settings(kv_role, {}, "cuda", environ, num_ranks=ranks)
    assert connector.role == role.value
    assert connector.keys is not None
    control = split.of_kind("Service")[belt.pd_proxy_host]
    assert belt.pd_proxy_port in [port["port"] for port in control["spec"]["ports"]]
    assert connector.notification_endpoint == f"tcp://{belt.pd_proxy_host}:{belt.pd_proxy_port}"
    if role is Role.DECODE:
        assert belt.pd_peer_host == connector.host == "10.1.2.3"
        ports = (connector.init_ports[0], connector.alloc_ports[0], connector.liveness_ports[0])
        assert ports == (OURS["init"], OURS["alloc"], OURS["liveness"])


def test_a_pod_without_its_address_is_an_error(split, tmp_path, monkeypatch):
    """The file says which variable is missing."""
    monkeypatch.delenv("POD_IP", raising=False)
    (text,) = (c["data"]["decoder-config.yaml"] for c in split.of_kind("ConfigMap").values()
               if "decoder-config.yaml" in c["data"])  # fmt: skip
    file = tmp_path / "decoder-config.yaml"
    file.write_text(text)
    with pytest.raises(Exception, match=r"pd_peer_host is \$\{POD_IP\}, but the environment has no POD_IP"):
        load_belt_file(file)


def test_secrets_have_what_is_read_from_them(split):
    """Each file named by a flag or setting is a key of the mounted Secret."""
    for app, pod in split.pods().items():
        folders = {mount["mountPath"]: mount["name"] for mount in containers(pod)[0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        texts = [
            *map(str, containers(pod)[0]["args"]),
            *(str(one.get("value")) for one in containers(pod)[0].get("env", [])),
        ]
        if "config" in volumes:
            texts += split.of_kind("ConfigMap")[volumes["config"]["configMap"]["name"]]["data"].values()
        files = {Path(found) for text in texts for found in re.findall(r"/etc/kvbelt/[\w./]+", text)}
        assert files, app
        for file in files - {Path("/etc/kvbelt/trusted")}:
            secret = split.of_kind("Secret")[volumes[folders[str(file.parent)]]["secret"]["secretName"]]
            assert file.name in secret["data"], f"{app}: {file}"


def test_command_lines_are_ones_that_kvbelt_takes(rendering):
    """A wrong flag in a container or hook would only show in a cluster."""
    lines = []
    for pod in rendering.pods().values():
        for container in containers(pod):
            lines.append([*container["command"], *container["args"]])
            for hook in container.get("lifecycle", {}).values():
                command = hook["exec"]["command"]
                if command[:2] == ["sh", "-c"]:
                    assert subprocess.run(["/bin/sh", "-n", "-c", command[2]], check=False).returncode == 0
                    command = shlex.split(command[2].removesuffix(" || true"))
                lines.append(command)
    ours = [line[1:] for line in lines if line[0] == "kvbelt"]
    assert ours
    for line in ours:
        build_parser().parse_args(line)


def test_queries_ask_for_metrics_that_exist(rendering):
    """Each metric of ours in an autoscaler is one that the code writes."""
    code = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    triggers = [t for one in rendering.of_kind("ScaledObject").values() for t in one["spec"]["triggers"]]
    names = {name for t in triggers for name in re.findall(r"\b(?:lmcache|kvbelt)_\w+", t["metadata"]["query"])}
    assert names or not triggers
    for name in names:
        assert f'"{name}"' in code


@pytest.mark.parametrize("name", ["overlays/1p1d", "overlays/2p2d", "overlays/multi-node", "one-pod"])
def test_an_overlay_works_from_a_clone_with_images_of_ones_own(name, tmp_path):
    """It renders before there are keys, and names each image that its containers have."""
    shutil.copytree(
        ROOT / "deploy/kubernetes", tmp_path / "kubernetes", ignore=shutil.ignore_patterns("*.key*", "trusted")
    )
    overlay = tmp_path / "kubernetes" / name
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("newName: kvbelt/", "newName: registry.example:5000/mine/"))
    pods = [one["spec"]["template"] for one in kustomized(overlay) if one["kind"] == "Deployment"]
    images = {container["image"].rpartition("/")[0] for pod in pods for container in containers(pod)}
    assert images == {"registry.example:5000/mine"}


def test_new_keys_of_a_generated_overlay_replace_its_pods(renderings):
    """Its Secrets are named by their content."""
    names = renderings["generated/4p8d"].of_kind("Secret")
    assert all(re.fullmatch(r"kvbelt-[a-z-]+-[0-9a-z]{10}", name) for name in names)


@pytest.mark.parametrize("page", ["kubernetes.md", "deployment.md"])
def test_documented_commands_are_ones_that_kvbelt_takes(page):
    """Each kvbelt command of a shell block parses."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text().replace("\\\n", ""), re.DOTALL)
    lines = [found for block in blocks for found in re.findall(r"(?<![\w/.-])kvbelt ([a-z][^#|&\n]*)", block)]
    commands = [shlex.split(line) for line in lines if line.split()[0] in COMMANDS]
    assert commands
    for words in commands:
        build_parser().parse_args(words)
