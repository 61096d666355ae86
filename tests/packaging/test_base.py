"""``pip install kvbelt`` is the proxy and the tools; every other command names the extra that it needs."""

import asyncio
import json
import subprocess
import zipfile
from collections.abc import Iterator

import httpx
import pytest

from tests.http.support import SECONDS, async_test, free_port
from tests.packaging.installed import Installed, install
from tests.proxy.standin import Standin

#: Modules that only extras may bring.
EXTRAS = (
    "torch", "transformers", "tokenizers", "safetensors", "nixl", "mooncake", "numpy", "jinja2", "starlette", "uvicorn",
    "gguf", "accelerate", "opentelemetry", "vllm",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An environment with kvbelt and no extra."""
    return install(tmp_path_factory.mktemp("base"))


@pytest.fixture
def proxy(base: Installed) -> Iterator[tuple[int, int, str]]:
    """The URL of a proxy that is started as a user starts it, with the ports of two future workers."""
    prefill, decode, port, notify = (free_port() for _ in range(4))
    argv = base.call(
        "proxy", "--prefill-port", prefill, "--decode-port", decode, "--port", port, "--notify-port", notify,
        "--prefill-host", "127.0.0.1", "--decode-host", "127.0.0.1", "--placement", "split",
    )  # fmt: skip
    with subprocess.Popen(argv, env=base.env) as process:
        yield prefill, decode, f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(SECONDS) == 0


async def _ready(url: str) -> None:
    async with asyncio.timeout(SECONDS), httpx.AsyncClient() as client:
        while True:
            try:
                workers = (await client.get(f"{url}/health")).json()["workers"]
                if all(worker["state"] == "ready" and not worker["warming"] for worker in workers):
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)


def test_the_wheel_holds_the_product_and_the_manifests(base: Installed) -> None:
    """It has no key, and no file of tools, tests or benchmarks."""
    names = zipfile.ZipFile(base.wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"kvbelt"}
    assert "kvbelt/ops/deploy/kubernetes/base/kustomization.yaml" in names
    assert [name for name in names if name.partition("keys/")[2]] == [
        f"kvbelt/ops/deploy/kubernetes/keys/{name}" for name in (".gitignore", "kustomization.yaml")
    ]


def test_the_base_brings_no_package_of_an_extra(base: Installed) -> None:
    """No dependency brings one either."""
    assert base.python(f"import importlib.util as u; print([one for one in {EXTRAS} if u.find_spec(one)])") == "[]\n"


@async_test
async def test_the_proxy_and_its_tools_serve(base: Installed, proxy: tuple[int, int, str]) -> None:
    """Two workers answer a request, and why, top and the doctor show it."""
    prefill, decode, url = proxy
    workers = [await Standin("prefill").start(prefill), await Standin("decode").start(decode)]
    try:
        await _ready(url)
        body = {"prompt": "hello", "max_tokens": 5, "temperature": 0}
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            answer = await client.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "asked"})
        assert (answer.status_code, answer.headers["x-kvbelt-path"]) == (200, "first-token")
        for args in (["why", "asked"], ["top", "--once"]):
            ran = await asyncio.to_thread(base.run, *args, "--url", url)
            assert (ran.returncode, ran.stderr) == (0, "")
        looked = await asyncio.to_thread(base.run, "doctor", "--url", url, "--json", "--seconds", "0.1")
        assert "1p1d, 1 requests" in json.loads(looked.stdout)["about"]
    finally:
        for worker in workers:
            await worker.stop()


def test_the_doctor_says_that_no_worker_can_run_here(base: Installed) -> None:
    """The finding is a note on a proxy's machine, and an error if workers are to be started."""
    for args, severity, status in ((), "note", 0), (("1p1d",), "error", 2):
        ran = base.run("doctor", *args, "--json")
        (found,) = (one for one in json.loads(ran.stdout)["findings"] if one["name"] == "no_engine")
        assert (found["severity"], ran.returncode) == (severity, status)
        assert "kvbelt[embedded]" in found["change"]


@pytest.mark.parametrize(
    "command",
    ["worker", "proxy", "up", "demo", "doctor", "chaos", "chaos --list", "keys new", "workers list", "why", "top",
     "deploy k8s"],
)  # fmt: skip
def test_every_command_says_what_it_takes(base: Installed, command: str) -> None:
    """No command's --help needs an extra."""
    ran = base.run(*command.split(), "--help")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("worker --role prefill --model tiny", "kvbelt[embedded]"),
        ("up 1p1d --model tiny", "kvbelt[embedded]"),
        ("up 1p1d --engine vllm", "docs/vllm.md"),
        ("demo --once", "kvbelt[embedded]"),
        ("chaos 1p1d", "kvbelt[embedded]"),
        ("doctor --model demo --device cpu", "kvbelt[demo-model]"),
        ("proxy --otlp-endpoint http://127.0.0.1:1", "kvbelt[traces]"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(base: Installed, command: str, remedy: str) -> None:
    """Nothing is started, and there is no traceback."""
    ran = base.run(*command.split())
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert remedy in ran.stderr
