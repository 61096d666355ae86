"""Images, units and scripts for machines without Kubernetes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvbelt.cli import build_parser
from tests.deploy.rendering import ROOT, tool

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("kvbelt*"))
SCRIPTS = sorted((DEPLOY / "scripts").glob("*.sh"))


def required(file):
    """Name → requirement of a file of requirements."""
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {re.match(r"[\w.-]+", line)[0]: line for line in lines}


def test_the_dockerfile_has_no_lint():
    """Nothing that hadolint knows, its style rules included."""
    argv = [tool("hadolint"), "--failure-threshold", "style", str(DEPLOY / "docker/Dockerfile")]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_dockerfile_copies_what_is_there():
    """And .dockerignore lets it through: nothing but what is copied, and no key."""
    lines = (DEPLOY / "docker/Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    for source in copied:
        assert (ROOT / source).exists()
        assert any(Path(source).match(rule.removeprefix("!")) for rule in ignored if rule.startswith("!"))
    assert "deploy/kubernetes/keys/*" in ignored


def test_images_ask_for_the_versions_that_kvbelt_asks_for():
    """Their short lists are parts of pyproject.toml's."""
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {re.match(r"[\w.-]+", line)[0]: line for line in ours}
    pins = required(ROOT / "constraints.txt")
    for name in ("proxy", "vllm"):
        asked = required(DEPLOY / "docker" / f"{name}.txt")
        assert asked.items() <= (ranges | {"nixl": pins["nixl"]}).items()


def test_the_proxys_image_has_all_that_a_proxy_imports():
    """The proxy and the commands that hooks call run with its short list alone."""
    code = (
        "import sys, kvbelt.cli, kvbelt.proxy.main, kvbelt.ops.workers, kvbelt.ops.deploy.command;"
        "kvbelt.cli.build_parser();"
        "print(*sorted({n.partition('.')[0] for n, m in sys.modules.items()"
        " if 'site-packages' in (getattr(m, '__file__', None) or '')}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {"yaml": "pyyaml", "zmq": "pyzmq", "prometheus_client": "prometheus-client"}
    needed = {imported.get(name, name) for name in ran.stdout.split()}
    # structlog takes rich (with pygments) and greenlet where they are there, setuptools patches distutils everywhere.
    optional = {"rich", "pygments", "greenlet", "attr", "attrs", "typing_extensions", "_distutils_hack", "kvbelt"}
    assert needed - optional <= set(required(DEPLOY / "docker/proxy.txt"))


def test_units_are_ones_that_systemd_takes(tmp_path):
    """Every directive exists and parses; kvbelt itself is elsewhere here."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/kvbelt/bin/kvbelt", shutil.which("true") or "/bin/true")
        (tmp_path / unit.name.replace("@", "@0")).write_text(text)
    argv = [tool("systemd-analyze"), "verify", "--recursive-errors=no", *map(str, sorted(tmp_path.iterdir()))]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    complaints = [line for line in ran.stderr.splitlines() if "kvbelt" in line]
    assert complaints == []


def test_units_call_kvbelt_as_it_is_called():
    """Flags that do not exist would show only at the start."""
    for unit in UNITS:
        for line in re.findall(r"^Exec\w+=-?/opt/kvbelt/bin/kvbelt (.*)$", unit.read_text(), re.MULTILINE):
            filled = line.replace("${MODEL}", "m").replace("${PORT}", "7100")
            words = filled.replace("$WORKERS", "--prefill-host a --decode-host b").split()
            build_parser().parse_args(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.name)
def test_scripts_have_no_lint(script):
    """Nothing that shellcheck knows."""
    argv = [tool("shellcheck"), "--shell=bash", "--external-sources", f"--source-path={script.parent}", str(script)]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_a_wrong_engine_is_refused(tmp_path):
    """In one line, before anything is started."""
    env = {**os.environ, "ENGINE": "triton", "DIR": str(tmp_path)}
    ran = subprocess.run([DEPLOY / "scripts/disagg_1p1d.sh"], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, "ENGINE is 'triton'" in ran.stderr) == (2, True)
