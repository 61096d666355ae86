"""How Pods start, become ready and end, and what they may do."""

import re

from tests.deploy.rendering import PROXY, UCX, containers


def test_ready_means_that_health_is_good(rendering):
    """/health answers 200 once a handshake is possible."""
    for pod in rendering.pods().values():
        for container in pod["spec"]["containers"]:
            assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_busy_or_draining_process_is_not_killed(rendering):
    """The liveness probe does not use /health, which answers 503 while draining, and has a long timeout."""
    for name, pod in rendering.pods().items():
        for container in pod["spec"]["containers"]:
            probe = container["livenessProbe"]
            assert probe["httpGet"]["path"] != "/health"
            patience = probe["periodSeconds"] * probe["failureThreshold"]
            assert patience >= (60 if name == "kvbelt-proxy" else 150)


def test_a_model_may_take_half_an_hour_to_load(rendering):
    """The startup probe delays the other probes."""
    for name, pod in rendering.pods().items():
        for container in pod["spec"]["containers"]:
            if name != "kvbelt-proxy":
                probe = container["startupProbe"]
                assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_workers_are_drained_before_they_end(split):
    """A preStop hook waits for requests that need the worker; the grace period is longer."""
    for role in ("prefill", "decode"):
        pod = split.pods()[f"vllm-{role}"]
        container = pod["spec"]["containers"][0]
        command = container["lifecycle"]["preStop"]["exec"]["command"][2]
        wait = int(re.search(rf" drain .* --role {role} --wait (\d+)$", command)[1])
        assert pod["spec"]["terminationGracePeriodSeconds"] > wait
        if role == "decode":
            assert wait >= PROXY["deadline_seconds"]
        assert " undrain " in container["lifecycle"]["postStart"]["exec"]["command"][2]
        assert container["livenessProbe"]["terminationGracePeriodSeconds"] <= 60


def test_the_proxy_lets_answers_end(split):
    """Its grace period covers the preStop sleep and the drain."""
    pod = split.pods()["kvbelt-proxy"]
    container = pod["spec"]["containers"][0]
    drain = int(re.search(r"--drain-seconds=(\d+)", " ".join(container["args"]))[1])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain + sleep
    assert drain >= PROXY["deadline_seconds"]


def test_containers_are_locked(rendering):
    """They run as an ordinary user with a read-only root and no capability; RDMA adds one, visible in the namespace."""
    rdma = False
    for pod in rendering.pods().values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            added = context["capabilities"].get("add", [])
            assert added in ([], ["IPC_LOCK"])
            rdma = rdma or bool(added)
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
    for namespace in rendering.of_kind("Namespace").values():
        level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        assert level == ("privileged" if rdma else "restricted")


def test_the_seeds_way_is_kept(split):
    """Runtime class, hash seed, transports, GPU and disruption budgets are the seed's."""
    for role in ("prefill", "decode"):
        pod = split.pods()[f"vllm-{role}"]
        assert pod["spec"]["runtimeClassName"] == "nvidia"
        env = {one["name"]: one.get("value") for one in containers(pod)[0]["env"]}
        assert env["PYTHONHASHSEED"] == "0"
        assert {"cuda_ipc", "cuda_copy", "tcp"} <= set(env["UCX_TLS"].split(","))
        assert env["UCX_TCP_PORT_RANGE"] == f"{UCX[0]}-{UCX[1]}"
        assert int(containers(pod)[0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert set(split.of_kind("PodDisruptionBudget")) == {"vllm-prefill", "vllm-decode", "kvbelt-proxy"}
