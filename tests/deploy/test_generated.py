"""``kvbelt deploy k8s``."""

import pytest

from kvbelt.cli import main

GIVEN = ["deploy", "k8s", "--topology", "4p8d", "--model", "some/model", "--gpu", "h100"]


def written(folder):
    """The content of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_request_gives_the_same_bytes(tmp_path, capsys):
    """This holds in another folder, too."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert main([*GIVEN, "--output", str(folder)]) == 0
    assert written(folders[0]) == written(folders[1])
    assert f"kubectl apply -k {folders[1]}" in capsys.readouterr().out


def test_what_was_asked_for_is_what_is_deployed(renderings):
    """Replicas, model, GPUs, rank ports, weights, network card and autoscaler limits are as requested."""
    plain = renderings["generated/4p8d"]
    deployments = plain.of_kind("Deployment")
    assert deployments["vllm-prefill"]["spec"]["replicas"] == 4
    assert deployments["vllm-decode"]["spec"]["replicas"] == 8
    (model,) = (one["data"] for name, one in plain.of_kind("ConfigMap").items() if name.startswith("kvbelt-model"))
    assert model["MODEL"] == "some/model"
    assert model["GPU_MEMORY_UTILIZATION"]  # of the base
    assert "NVIDIA-H100-80GB-HBM3" in str(plain.pods()["vllm-decode"]["spec"]["affinity"])
    more = renderings["generated/2p2d, all options"]
    pod = more.pods()["vllm-decode"]["spec"]
    assert "--tensor-parallel-size=2" in pod["containers"][0]["args"]
    assert pod["containers"][0]["resources"]["limits"].items() >= {
        ("nvidia.com/gpu", "2"),
        ("nvidia.com/rdma", "1"),
    }
    (models,) = (volume for volume in pod["volumes"] if volume["name"] == "models")
    assert models == {"name": "models", "persistentVolumeClaim": {"claimName": "weights"}}
    assert more.of_kind("ScaledObject")["vllm-decode"]["spec"]["maxReplicaCount"] == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--gpu", "h10"], "--gpu 'h10' is not known (did you mean 'h100'?)"),
        (["--topology", "4p"], "topology '4p' is not of the form XpYd"),
        (["--topology", "0p2d"], "--topology 0p2d has no prefill worker"),
        (["--namespace", "My_Space"], "--namespace is 'My_Space'"),
        (["--model", "a model"], "--model is 'a model'"),
        (["--rdma", "yes"], "--rdma is 'yes'"),
    ],
)
def test_unknown_values_are_refused(change, said, tmp_path, capsys):
    """One line names the value, and nothing is written."""
    assert main([*GIVEN, *change, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    """An existing folder may have been edited."""
    (tmp_path / "mine").write_text("x")
    assert main([*GIVEN, "--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_unusual_settings_give_warnings(tmp_path, capsys):
    """More prefill than decode workers, and KV over TCP, give warnings."""
    assert main([*GIVEN, "--topology", "8p1d", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "8p1d has more prefill than decode workers" in said
    assert "without --rdma" in said


def test_images_that_no_registry_has_are_said(tmp_path, capsys):
    """Until both are named where they were pushed to."""
    assert main([*GIVEN, "--worker-image", "mine/vllm:1", "--output", str(tmp_path / "one")]) == 0
    assert "no registry has kvbelt/kvbelt-proxy:" in capsys.readouterr().err
    both = ["--worker-image", "mine/vllm:1", "--proxy-image", "mine/proxy:1"]
    assert main([*GIVEN, *both, "--output", str(tmp_path / "both")]) == 0
    assert "registry" not in capsys.readouterr().err
