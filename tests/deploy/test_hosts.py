"""Images, units and scripts for machines without Kubernetes."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from kvbelt.cli import build_parser
from tests.deploy.rendering import ROOT, tool

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("kvbelt*"))
SCRIPTS = sorted((DEPLOY / "scripts").glob("*.sh"))


def copied_into_images():
    """The sources of the Dockerfile's COPY instructions."""
    lines = (DEPLOY / "docker/Dockerfile").read_text().splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert sources
    return sources


def test_the_dockerfile_has_no_lint():
    """Hadolint finds nothing, style included."""
    argv = [tool("hadolint"), "--failure-threshold", "style", str(DEPLOY / "docker/Dockerfile")]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_images_are_built_as_documented():
    """The page has the Dockerfile's own lines, and each target is a stage, the last one without being named."""
    dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
    line = re.compile(r"docker build -f deploy/docker/Dockerfile( +--target (\w+))? +-t (\S+) \.")
    told = [found.groups()[1:] for found in line.finditer(dockerfile)]
    page = (ROOT / "docs/deployment.md").read_text()
    assert told == [found.groups()[1:] for found in line.finditer(page)]
    stages = re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)
    assert [target or stages[-1] for target, _ in told] == ["proxy", "vllm", "embedded"]
    assert set(stages) == {"source", "proxy", "vllm", "embedded"}


def test_the_dockerfile_copies_what_is_there():
    """Each source of a COPY exists, and .dockerignore lets it through, but no key."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    for source in copied_into_images():
        assert (ROOT / source).exists()
        assert any(Path(source).match(rule.removeprefix("!")) for rule in ignored if rule.startswith("!"))
    assert "deploy/kubernetes/keys/*" in ignored


def test_an_image_holds_all_that_a_wheel_is_built_from():
    """Every file and folder that pyproject.toml names for the build is copied."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    copied = copied_into_images()
    assert not [name for name in needed if not any(Path(name).is_relative_to(source) for source in copied)]


def test_units_are_ones_that_systemd_takes(tmp_path):
    """Every directive exists and parses. kvbelt is installed elsewhere here, so another program replaces it."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/kvbelt/bin/kvbelt", shutil.which("true") or "/bin/true")
        (tmp_path / unit.name.replace("@", "@0")).write_text(text)
    argv = [tool("systemd-analyze"), "verify", "--recursive-errors=no", *map(str, sorted(tmp_path.iterdir()))]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    complaints = [line for line in ran.stderr.splitlines() if "kvbelt" in line]
    assert complaints == []


def test_units_call_kvbelt_as_it_is_called():
    """Every command line of a unit is accepted by kvbelt."""
    calls = [
        line
        for unit in UNITS
        for line in re.findall(r"^Exec\w+=-?/opt/kvbelt/bin/kvbelt (.*)$", unit.read_text(), re.MULTILINE)
    ]
    assert {line.split()[0] for line in calls} == {"proxy", "worker", "workers"}
    for line in calls:
        filled = line.replace("${MODEL}", "m").replace("${PORT}", "7100")
        build_parser().parse_args(filled.replace("$WORKERS", "--prefill-host a --decode-host b").split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.name)
def test_scripts_have_no_lint(script):
    """Shellcheck finds nothing."""
    argv = [tool("shellcheck"), "--shell=bash", "--external-sources", f"--source-path={script.parent}", str(script)]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def sourced(tmp_path, code, **env):
    """Run code with the scripts' common part loaded and nothing of kvbelt behind it."""
    env = {**os.environ, "ENGINE": "embedded", "KVBELT": "true", "DIR": str(tmp_path), **env}
    argv = ["bash", "-uc", f". deploy/scripts/_disagg.sh; {code}", "script"]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_start_says_every_two_seconds_what_it_waits_for(tmp_path):
    """And what is ready. Here each look takes a second."""
    ran = sourced(
        tmp_path,
        """
        unset SECONDS; SECONDS=0  # a variable like any other then
        names=(prefiller decoder proxy)
        all_alive() { :; }
        sleep() { SECONDS=$((SECONDS + 1)); }
        status() { [ $SECONDS -lt $(($1 % 100)) ] || echo 200; }
        PROXY_PORT=9104
        serve 7101 7203
        """,
        MODEL="tiny",
        DEVICE="cpu",
    )
    said = [line.removeprefix("script: ") for line in ran.stderr.splitlines()]
    assert said == [
        f"starting prefiller decoder proxy of tiny on cpu; logs are {tmp_path}/NAME.log",
        "prefiller is ready after 1 s",
        "2 s: waiting for decoder proxy",
        "decoder is ready after 3 s",
        "proxy is ready after 4 s",
    ]
    assert ran.stdout == "disaggregated prefill is ready on http://127.0.0.1:9104\n"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_the_embedded_engine_takes_the_cpu_where_there_is_no_gpu(tmp_path):
    """With the demo model; what is set counts."""
    unset = {"MODEL": "", "DEVICE": ""}
    assert sourced(tmp_path, 'echo "$MODEL $DEVICE"', **unset).stdout == "demo cpu\n"
    assert sourced(tmp_path, 'echo "$MODEL $DEVICE"', MODEL="tiny", DEVICE="cuda").stdout == "tiny cuda\n"


def test_a_wrong_engine_is_refused(tmp_path):
    """The error is one line, and nothing is started."""
    env = {**os.environ, "ENGINE": "triton", "DIR": str(tmp_path)}
    ran = subprocess.run([DEPLOY / "scripts/disagg_1p1d.sh"], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, "ENGINE is 'triton'" in ran.stderr) == (2, True)
