"""vLLM's tests, and a hub that has every model they name.

    python -m tests.vllm.upstream.source RELEASE FOLDER MODEL

``FOLDER/source`` gets the tests of the release, ``FOLDER/packages`` what they need beside vLLM, and ``FOLDER/hub`` is a
cache of a hub in which each model is the one in the folder ``MODEL``. Prints the names of the models.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

API = "tests/entrypoints/openai"

#: How tests name models.
NAMED = re.compile(r'(?:NAME|MODEL|PATH|model_name|repo_id)\s*=\s*\(?\s*"([\w.-]+/[\w.-]+)"')
REVISION = "0" * 40


def fetch(release: str, folder: Path) -> None:
    """Have pip download the source, and unpack the tests from it."""
    if (folder / "source").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    packages = folder / "packages"
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, "pytest-asyncio"], check=True)
    with tempfile.TemporaryDirectory() as temporary:
        # pip asks a source distribution for its metadata, for which it runs this.
        tools = Path(temporary, "tools")
        subprocess.run([*pip, "install", "--target", tools, "setuptools-rust", "setuptools-scm"], check=True)
        environment = os.environ | {"PYTHONPATH": str(tools), "VLLM_TARGET_DEVICE": "empty"}
        environment |= {"VLLM_VERSION_OVERRIDE": release}
        download = [*pip, "download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--dest", temporary]
        subprocess.run([*download, f"vllm=={release}"], check=True, env=environment)
        unpacked = Path(temporary, "unpacked")
        with tarfile.open(Path(temporary, f"vllm-{release}.tar.gz")) as archive:
            # Without the package: it would be imported instead of the installed one.
            root = f"vllm-{release}/"
            members = [member for member in archive if member.name.startswith(root + "tests/")]
            archive.extractall(unpacked, members, filter="data")
        # Across file systems, which a rename is not.
        subprocess.run(["cp", "-r", unpacked / root, folder / "source.part"], check=True)
    (folder / "source.part").rename(folder / "source")


def models(source: Path) -> list[str]:
    """Every model that the tests of the API name."""
    files = [source / "tests/entrypoints/conftest.py", *(source / API).rglob("*.py")]
    return sorted({name for file in files for name in NAMED.findall(file.read_text())})


def fill_hub(hub: Path, names: list[str], model: Path) -> None:
    for name in names:
        cached = hub / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs/main").write_text(REVISION)
        (cached / "snapshots").mkdir(exist_ok=True)
        snapshot = cached / "snapshots" / REVISION
        snapshot.unlink(missing_ok=True)
        snapshot.symlink_to(model.resolve())


if __name__ == "__main__":
    release, folder, model = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    fetch(release, folder)
    found = models(folder / "source")
    fill_hub(folder / "hub", found, model)
    print(" ".join(found))  # noqa: T201
