"""The base installation: the wheel and the dependencies that it names, in an empty environment."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.rendering import ROOT


@dataclass(frozen=True)
class Installed:
    """An environment with kvbelt installed from a wheel."""

    folder: Path
    wheel: Path

    @property
    def env(self) -> dict[str, str]:
        """This process's environment variables without its modules and models."""
        return _without_path() | {"KVBELT_CACHE": str(self.folder / "cache")}

    def call(self, *args: object) -> list[str]:
        """Run ``kvbelt ARGS``."""
        return [str(self.folder / "bin/kvbelt"), *map(str, args)]

    def run(self, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.call(*args), env=self.env, capture_output=True, text=True, check=False)

    def python(self, code: str) -> str:
        """Run code in the environment, and return its output."""
        argv = [self.folder / "bin/python", "-c", code]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, check=True).stdout


def _without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def install(folder: Path) -> Installed:
    """Build the wheel and its dependencies' wheels, and install only these."""
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    wheels, environment = folder / "wheels", folder / "environment"
    subprocess.run([sys.executable, *pip, "wheel", "--wheel-dir", wheels, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin/python", *pip, "install", "--no-index", "--find-links", wheels, "kvbelt"]
    subprocess.run(install, env=_without_path(), check=True)
    return Installed(environment, next(wheels.glob("kvbelt-*.whl")))
